"""Train a prior from a JSON config.

    accelerate launch -m fastprior.train_diffusion_prior --config_file FILE

or `python -m …`, or `fastprior train`. One process or several, under DDP, FSDP or DeepSpeed as the launcher says;
Ctrl-C and SIGTERM save, and the run goes on from there.
"""

from __future__ import annotations

from fastprior.program import explain_errors, heedless_output, open_standard_streams, say, this_program

if __name__ == "__main__":
    open_standard_streams()
    explain_errors()  # those of the imports that follow, too

import argparse
import contextlib
import math
import os
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

try:
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs, set_seed
except ImportError as error:
    raise ImportError('accelerate is not installed: pip install "fastprior[train]"') from error

from fastprior.dataloaders import PairStream
from fastprior.dataloaders.files import ShardError, finite_rows
from fastprior.dataloaders.shards import EmbeddingShards, check_conditions
from fastprior.models.prior_transformer.as_network import PriorTransformerNet
from fastprior.prior.curves import plot_curves
from fastprior.prior.diffusion_prior import DiffusionPrior
from fastprior.prior.evaluate import evaluate
from fastprior.prior.record import MADE_BEFORE
from fastprior.trackers import Tracker, read_metrics
from fastprior.train_configs import TrainDiffusionPriorConfig
from fastprior.trainer import DiffusionPriorTrainer, TrainingDiverged
from fastprior.trainer.agree import together

SPLITS = "train", "validation", "test"
STATISTICS_PAIRS = 50_000  # about so many give the mean and deviation of image embeddings


@contextlib.contextmanager
def watched_signals() -> Iterator[list[int]]:
    """The signals that asked the run to end, as they come; the second ends it at once."""
    received: list[int] = []

    def note(number, frame):
        if received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def split_edges(shares: tuple[float, ...], pairs: int) -> list[int]:
    """Where the splits of so many pairs begin and end: the first is [edges[0], edges[1]) and so on."""
    ends = [round(pairs * math.fsum(shares[: index + 1])) for index in range(len(shares))]
    return [0, *(min(end, pairs) for end in ends)]


class TrainingRun:
    """One training run: data, trainer and tracker, and how far it is."""

    def __init__(self, config: TrainDiffusionPriorConfig, accelerator: Accelerator, config_path: Path | None = None):
        train, data = config.train, config.data
        self.config, self.accelerator = config, accelerator
        set_seed(train.random_seed)  # the same weights on every rank
        prior = config.prior.create()
        kinds = {name: spec["kind"] for name, spec in (config.prior.net.conditions or {}).items()}
        self.conditions = {name: (kinds[name], source) for name, source in (data.conditions or {}).items()}
        urls = data.image_url, data.meta_url, data.text_url, data.encodings_url
        on_fault = dict(on_problem=data.on_problem, on_bad_rows=data.on_bad_rows)
        self.shards = EmbeddingShards.open(*urls, conditions=self.conditions, **on_fault)
        self._check_data(prior)
        prior.text_encoder = MADE_BEFORE if config.prior.clip is None else config.prior.clip.model_dump()
        if isinstance(prior.net, PriorTransformerNet):
            self._prepare(prior)
        self.streams = self._streams()
        self.trainer = DiffusionPriorTrainer(
            prior,
            accelerator,
            **{name: getattr(train, name) for name in (
                "use_ema", "lr", "wd", "max_grad_norm", "warmup_steps", "cosine_decay_max_steps", "ema_beta",
                "ema_update_after_step", "ema_update_every", "draws", "compile", "checkpoint_activations",
                "max_bad_steps", "amp",
            )},
        )  # fmt: skip
        set_seed(train.random_seed, device_specific=True)  # other noise on every rank
        self.epoch, self.samples_seen = train.current_epoch, train.num_samples_seen
        self.best = train.best_validation_loss
        extra = dict(processes=accelerator.num_processes, pairs=self.shards.pairs)
        self.tracker: Tracker = config.tracker.create(config, extra, dummy_mode=not accelerator.is_main_process)
        if config_path is not None:
            self.tracker.save_config(config_path)
        self._kept: int | None = None  # the step of the last checkpoint, if there is one
        if self.tracker.can_recall:
            with together(accelerator):
                state = self.tracker.recall()
            self._resume(state)
        else:
            self.streams["train"].set_epoch(self.epoch)
        # seconds of training; what evaluations and checkpoints take counts for no interval, or one would follow another
        self._saved = self._evaluated = self._now = time.monotonic()
        self._paused = 0.0
        self._logged: tuple[float, int] | None = None  # when, and samples seen then

    def _check_data(self, prior) -> None:
        columns, dim = self.shards.columns, self.shards.dim
        if dim != prior.image_embed_dim:
            raise ValueError(f"data.image_url has embeddings of {dim}; prior.image_embed_dim={prior.image_embed_dim}")
        embedded = ["image_embed", "text_embed", *["text_encodings"] * prior.condition_on_text_encodings]
        self.columns = embedded if set(embedded) <= set(columns) else ["image_embed", "text"]
        if "text" in self.columns and ("text" not in columns or prior.clip is None):
            wanted = "text_url and encodings_url" if prior.condition_on_text_encodings else "text_url"
            raise ValueError(
                f"the data has {', '.join(columns)}, and this prior needs prior.clip to make its text condition of "
                f"captions (data.meta_url), or data.{wanted}"
            )
        check_conditions(self.shards, prior, self.columns)

    def _prepare(self, prior: DiffusionPrior) -> None:
        """Take what is not learned from the data and the CLIP: normalisation where none was loaded, and empty text."""
        net = prior.net
        if not net.prior.clip_std.all():
            share = -(-STATISTICS_PAIRS // len(self.shards.shards))
            rows = np.concatenate([shard.files["image_embed"].peek(share) for shard in self.shards.shards])
            net.set_statistics(torch.from_numpy(rows[finite_rows(rows)]).float())
        if prior.clip is not None:
            net.set_null_text(*prior.clip.embed_text(prior.clip.tokenize([""])))

    def _streams(self) -> dict[str, PairStream]:
        data = self.config.data
        ranks = dict(rank=self.accelerator.process_index, world_size=self.accelerator.num_processes)
        pairs = min(self.shards.pairs, data.num_data_points)
        edges = split_edges((data.splits.train, data.splits.val, data.splits.test), pairs)
        streams = {}
        for name, start, stop in zip(SPLITS, edges, edges[1:]):
            training = name == "train"
            if not training and data.max_eval_pairs is not None:
                stop = min(stop, start + data.max_eval_pairs)
            streams[name] = PairStream(
                self.shards, start=start, stop=stop, batch_size=data.batch_size, drop_last=training,
                seed=data.shuffle_seed if training else None, workers=data.workers, prefetch=data.prefetch, **ranks,
            )  # fmt: skip
        if not len(streams["train"]):
            raise ValueError(
                f"data.batch_size={data.batch_size}; the training split has {edges[1]} pairs for "
                f"{self.accelerator.num_processes} processes, which is not one batch"
            )
        return streams

    def _resume(self, state: dict) -> None:
        try:
            self.trainer.load(state)
        except ValueError as error:
            cure = "take another tracker.data_path, or leave tracker.load out"
            raise ValueError(
                f"what tracker.load finds does not fit this config: {error}. To begin anew, {cure}"
            ) from error
        progress = state.get("progress")
        if progress is None:  # of another trainer: its weights, and a run that begins
            self.accelerator.print(f"resuming the weights of step {int(self.trainer.step)}; the data begins anew")
            return
        self.streams["train"].load_state_dict(self._of_as_many_processes(progress["data"]))
        self.epoch, self.samples_seen, self.best = (progress[name] for name in ("epoch", "samples_seen", "best"))
        self._kept = int(self.trainer.step)
        self.accelerator.print(f"resuming at step {self._kept}, sample {self.samples_seen:,}")

    def _of_as_many_processes(self, data: dict) -> dict:
        """Where the data stood: exactly, or with another number of processes after as large a share of the epoch."""
        stream, world = self.streams["train"], self.accelerator.num_processes
        if data["world_size"] == world or not data["sample"]:
            return data
        self.accelerator.print(
            f"the checkpoint is of {data['world_size']} process(es), and this run has {world}: the rest of the epoch "
            "is dealt out anew, so that it repeats some pairs and leaves out others; later epochs are whole"
        )
        sample = min(data["sample"] * data["world_size"] // world, stream.pairs_per_rank)
        return {**data, "world_size": world, "sample": sample}

    # one run

    def train(self) -> int:
        """Train to the last epoch: 0, or 128 + the number of the signal that ended it before.

        Raises:
            ShardError: data cannot be read. What was trained is saved, where that is one process's to decide.
            OSError: a checkpoint could not be written, as the disk is full.
        """
        try:
            with watched_signals() as signals, self._bar() as bar:
                return self._train(signals, bar)
        except ShardError as error:
            # of several processes the others wait in a step; and half a step cannot be saved
            if self.accelerator.num_processes == 1 and self.accelerator.sync_gradients:
                with contextlib.suppress(OSError):
                    self.save()
            raise ShardError(error.path, f"{error.what}; {self._what_is_kept()}") from error
        except OSError as error:
            raise OSError(f"{error}; {self._what_is_kept()}") from error

    def _train(self, signals: list[int], bar: tqdm) -> int:
        train, stream = self.config.train, self.streams["train"]
        while self.epoch < train.epochs:
            for batch in stream:
                loss = self._step(batch, bar)
                if not self.accelerator.sync_gradients:
                    continue
                step = int(self.trainer.step)
                if step % train.log_every_steps == 0:
                    self._log_step(loss, step, bar)
                stop, evaluate_now, save_now = self._due(step, signals)
                began = time.monotonic()
                if evaluate_now:
                    self.evaluate("validation")
                if stop or save_now:
                    self.save()
                self._paused += time.monotonic() - began
                if stop:
                    return self._stopped(signals)
            self.epoch += 1
        self.evaluate("validation")
        failures = self.save()
        if self._anywhere([bool(signals)])[0]:
            return self._stopped(signals)
        if len(self.streams["test"]):
            self.evaluate("test")
        self._plot()
        if failures:
            raise OSError(failures[0])
        if (command := self.next_command()) is not None:
            self.accelerator.print(f"measure it on the pairs that it was not trained on with\n  {command}")
        return 0

    def _stopped(self, signals: list[int]) -> int:
        number = next(iter(signals), signal.SIGTERM)  # or another process was asked to end
        self.accelerator.print(f"{signal.Signals(number).name}: saved at step {int(self.trainer.step)}")
        return 128 + number

    def _what_is_kept(self) -> str:
        """How a run that an error ended can go on."""
        if self._kept is None:
            return "no checkpoint was saved before"
        tracker = self.config.tracker
        again = ", and the same command goes on from there" if tracker.log.auto_resume and tracker.load else ""
        return f"the checkpoint of step {self._kept} is kept{again}"

    def next_command(self) -> str | None:
        """The command that measures what was saved, the best if there is one, on the pairs behind the training's."""
        data, train, tracker = self.config.data, self.config.train, self.config.tracker
        local = [saver for saver in tracker.save if saver.save_to == "local"]
        saved = [getattr(saver, f"save_{kind}_to", None) for kind in ("best", "latest") for saver in local]
        saved += [str(Path(tracker.data_path, name)) for name in ("checkpoint.pth", "model.safetensors", "model.pth")]
        saved = [path for path in saved if path and Path(path).exists()]
        if not saved:
            return None
        argv = ["evaluate", "--checkpoint", saved[0], "--images", data.image_url]
        if "text" in self.columns or any(kind != "vector" for kind, _ in self.conditions.values()):
            argv += ["--captions", data.meta_url]
        if "text_embed" in self.columns:
            argv += ["--texts", data.text_url]
        if "text_encodings" in self.columns:
            argv += ["--encodings", data.encodings_url]
        for name, (_, source) in self.conditions.items():
            argv += ["--condition", f"{name}={source}"]
        trained, pairs = self.streams["train"].stop, min(self.shards.pairs, data.num_data_points)
        if trained < pairs:
            argv += ["--skip-pairs", str(trained)]
        if data.max_eval_pairs is not None and data.max_eval_pairs < pairs - trained:
            argv += ["--max-pairs", str(data.max_eval_pairs)]
        argv += ["--timesteps", *map(str, train.eval_timesteps)] if train.eval_timesteps != [64] else []
        argv += ["--cond-scale", f"{train.eval_cond_scale:g}"] if train.eval_cond_scale != 1 else []
        argv += ["--on-problem", data.on_problem] if data.on_problem != "error" else []
        argv += ["--on-bad-rows", data.on_bad_rows] if data.on_bad_rows is not None else []
        return f"{this_program()} {shlex.join(argv)}"

    def _inputs(self, batch: dict) -> dict:
        inputs = {name: batch[name] for name in self.columns}
        if names := self.config.data.conditions:
            inputs["conditions"] = {name: batch[name] for name in names}
        return inputs

    def _step(self, batch: dict, bar: tqdm) -> float:
        loss = self.trainer(**self._inputs(batch), max_batch_size=self.config.train.max_batch_size)
        self.trainer.update()
        count = len(batch["image_embed"]) * self.accelerator.num_processes
        self.samples_seen += count
        bar.update(count)
        return loss

    def _bar(self) -> tqdm:
        stream = self.streams["train"]
        total = len(stream) * stream.batch_size * self.accelerator.num_processes * self.config.train.epochs
        shown = self.accelerator.is_main_process and sys.stderr.isatty()
        return tqdm(
            total=total, initial=min(self.samples_seen, total), desc="training", unit=" samples", unit_scale=True,
            disable=not shown,
        )  # fmt: skip

    def _log_step(self, loss: float, step: int, bar: tqdm) -> None:
        loss = self.accelerator.reduce(torch.tensor(loss, device=self.accelerator.device), "mean").item()
        now, last = (time.monotonic() - self._paused, self.samples_seen), self._logged
        self._logged = now
        log = {f"training/{self.config.prior.loss_type}-loss": loss, "lr": self.trainer.scheduler.get_last_lr()[0]}
        log |= dict(epoch=self.epoch, samples_seen=self.samples_seen, bad_steps=self.trainer.bad_steps)
        log["bad_rows"] = len(self.streams["train"].bad_rows)
        if last is not None:
            log["samples_per_second"] = (now[1] - last[1]) / max(now[0] - last[0], 1e-9)
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        self.tracker.log(log, step=step)

    def _due(self, step: int, signals: list[int]) -> tuple[bool, bool, bool]:
        """Whether to stop, evaluate and save now: what one process wants, all do."""
        if self.accelerator.num_processes > 1 and step % self.config.train.log_every_steps:
            return False, False, False
        self._now = time.monotonic() - self._paused
        due = [
            bool(signals),
            self._now - self._evaluated >= self.config.data.eval_every_seconds,
            self._now - self._saved >= self.config.train.save_every_seconds,
        ]
        return tuple(self._anywhere(due))

    def _anywhere(self, wishes: list[bool]) -> list[bool]:
        """Which of these some process has."""
        if self.accelerator.num_processes == 1:
            return wishes
        wishes = torch.tensor(wishes, dtype=torch.int32, device=self.accelerator.device)
        return (self.accelerator.reduce(wishes, "sum") > 0).tolist()

    def evaluate(self, split: str) -> None:
        """Measure the online weights and those that sample, log both, and save where the loss is the best so far."""
        self._evaluated = self._now
        stream, train = self.streams[split], self.config.train
        if not len(stream):
            return
        which = {"online": ()} if train.use_ema else {}
        which["ema" if train.use_ema else "online"] = tuple(train.eval_timesteps)
        log = {}
        for name, timesteps in which.items():
            stream.set_epoch(0)
            batches = map(self._inputs, stream)
            with self.trainer.whole_prior(online=name == "online") as prior:
                metrics = evaluate(
                    prior, batches, cond_scale=train.eval_cond_scale, timesteps=timesteps, accelerator=self.accelerator
                )
            log |= {f"{split}/{name} {metric}": value for metric, value in metrics.items()}
        self.tracker.log(log, step=int(self.trainer.step))
        loss = log[f"{split}/{name} {self.config.prior.loss_type}-loss"]
        if split == "validation" and loss < self.best:
            self.best = loss
            self.save(is_best=True)

    def save(self, is_best: bool = False) -> list[str]:
        """Save wherever the config says; what some saver could not take is returned."""
        self._saved = self._now
        progress: dict[str, Any] = dict(epoch=self.epoch, samples_seen=self.samples_seen, best=self.best)
        progress["data"] = self.streams["train"].state_dict()
        with self.trainer.gathered(), together(self.accelerator):
            failures = self.tracker.save(self.trainer, is_best=is_best, is_latest=True, progress=progress)
        if not failures:
            self._kept = int(self.trainer.step)
        return failures

    def _plot(self) -> None:
        if not self.accelerator.is_main_process:
            return
        path = self.tracker.data_path / "curves.png"
        try:
            plot_curves(read_metrics(self.tracker.metrics_path), path)
        except ImportError:
            pass  # matplotlib is of another extra
        except OSError as error:
            warnings.warn(f"the curves are not drawn: {error}")


def make_accelerator(config: TrainDiffusionPriorConfig) -> Accelerator:
    """The accelerator that the launcher set up; `train.amp` asks for mixed precision where the launcher did not."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if config.train.amp and precision == "no":
        precision = "fp16" if torch.cuda.is_available() and not torch.cuda.is_bf16_supported() else "bf16"
    # said outright, because accelerate does not join several processes without a GPU by itself
    without_gpu = not torch.accelerator.is_available()
    zero = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    accelerator = Accelerator(
        cpu=without_gpu and not zero,
        mixed_precision=precision,
        # a plugin, because the number of steps would give way to the launcher's
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.train.gradient_accumulation_steps),
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if without_gpu and zero else None,
    )
    # `accelerate launch --cpu --num_processes N` leaves these, and starts one process, unless by MPI
    alone = accelerator.num_processes == 1 and "WORLD_SIZE" not in os.environ and "MASTER_ADDR" in os.environ
    if alone and os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true":
        warnings.warn(
            "this run has one process: on CPUs accelerate starts several through MPI alone; torchrun --nproc_per_node "
            "does without"
        )
    return accelerator


def train(config: TrainDiffusionPriorConfig, config_path: Path | None = None) -> int:
    """Train as the config says; returns the exit status."""
    with heedless_output():
        accelerator = make_accelerator(config)
        status = TrainingRun(config, accelerator, config_path).train()
        accelerator.end_training()  # processes that leave a group open may abort at exit
    return status


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastprior.train_diffusion_prior", description=__doc__)
    parser.add_argument("--config_file", "--config_path", "--config-file", required=True, metavar="FILE.json")
    path = Path(parser.parse_args(argv).config_file)
    try:
        return train(TrainDiffusionPriorConfig.from_json_path(path), path)
    except TrainingDiverged as error:
        say("error", f"{error}; the last checkpoint is kept")
        return 1


if __name__ == "__main__":
    sys.exit(main())

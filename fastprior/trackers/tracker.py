"""Where a run logs to, saves to and resumes from: dalle2-pytorch's trackers, configured by the same names.

TensorBoard and loading from the Hugging Face hub come besides. Whatever the logger, a run leaves `metrics.jsonl` in its
`data_path`: one line for each call of `log`.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastprior.checkpoints import save as save_prior
from fastprior.peer import PEER_VERSION
from fastprior.prior.record import entry
from fastprior.trackers.loggers import BaseLogger, to_json, without_secrets
from fastprior.trackers.storage import BaseLoader, BaseSaver
from fastprior.utils import atomic

RESERVED = ("scaler", "optimizer", "model", "version", "step", "steps")  # a checkpoint's own keys


def read_metrics(path: str | os.PathLike) -> list[dict]:
    """The records of a `metrics.jsonl`; a line that a crash cut short is left out."""
    records = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def sampling_weights(trainer) -> dict:
    """The weights to sample with, without CLIP's: of the moving average where there is one.

    Args:
        trainer: a `DiffusionPriorTrainer`, or dalle2-pytorch's `DecoderTrainer`.
    """
    unwrap = trainer.accelerator.unwrap_model
    if hasattr(trainer, "diffusion_prior"):
        state = unwrap(_sampling_prior(trainer)).state_dict()
    else:
        decoder = unwrap(trainer.decoder)
        state = decoder.state_dict()
        if trainer.use_ema:
            averaged = {f"unets.{key}": value for key, value in trainer.unets.state_dict().items()}
            state = {key: averaged.get(key, value) for key, value in state.items()}
    return {key: value for key, value in state.items() if not key.startswith("clip.")}


def _sampling_prior(trainer):
    if hasattr(trainer, "sampling_prior"):
        return trainer.sampling_prior
    return trainer.ema_diffusion_prior.ema_model if trainer.use_ema else trainer.diffusion_prior


class _OfTheBlock(Exception):
    """Carries an error through `atomic`, which would take it for one of its own file."""


class Tracker:
    """Logs, saves and loads for one run.

    Args:
        data_path: folder of `metrics.jsonl`, the config and the last checkpoint; made where it does not exist.
        overwrite_data_path: allow it to exist; the metrics of an earlier run, unless this one resumes it, are kept
            under another name.
        dummy_mode: for all processes but the main one: nothing is written, `recall` works.
    Raises:
        FileExistsError: data_path exists, and overwrite_data_path is False.
    """

    def __init__(
        self,
        data_path: str | os.PathLike = ".tracker_data",
        overwrite_data_path: bool = False,
        dummy_mode: bool = False,
    ):
        self.data_path = Path(data_path)
        if not dummy_mode:
            if self.data_path.exists() and not overwrite_data_path:
                raise FileExistsError(
                    f"data_path={os.fspath(data_path)!r} exists; overwrite_data_path=True allows that"
                )
            self.data_path.mkdir(parents=True, exist_ok=True)
        self.dummy_mode = dummy_mode
        self.logger: BaseLogger | None = None
        self.loader: BaseLoader | None = None
        self.savers: list[BaseSaver] = []
        self.save_metadata: dict[str, Any] = {"version": PEER_VERSION}
        self.did_auto_resume = False
        self.auto_resume_path = self.data_path / "auto_resume.json"
        self.metrics_path = self.data_path / "metrics.jsonl"
        self._unwritten = b""  # of the metrics, while the disk takes no more
        self._warned_of: set[str] = set()

    def add_logger(self, logger: BaseLogger) -> None:
        self.logger = logger

    def add_loader(self, loader: BaseLoader | None) -> None:
        self.loader = loader

    def add_saver(self, saver: BaseSaver) -> None:
        self.savers.append(saver)

    def add_save_metadata(self, state_dict_key: str, metadata: Any) -> None:
        """Save a value under a key of its own with everything that is saved from now on."""
        self.save_metadata[state_dict_key] = metadata

    def init(self, full_config, extra_config: dict) -> None:
        """Begin, after the parts were added.

        Args:
            full_config: the config of the run, a pydantic model or a dict.
            extra_config: what is not in it, such as the number of processes.
        """
        if self.logger is None:
            raise ValueError("logger=None; add_logger must be called before init")
        if not self.savers and not self.dummy_mode:
            raise ValueError("savers=[]; add_saver must be called before init")
        self.did_auto_resume = self._auto_resume()
        if not self.dummy_mode:
            self.logger.init(full_config, extra_config)
        if self.loader is not None and (self.can_recall or not self.loader.only_auto_resume):
            self.loader.init(self.logger)
        if not self.dummy_mode:
            for saver in self.savers:
                saver.init(self.logger)
            self._begin_metrics()

    def _auto_resume(self) -> bool:
        """Whether this run goes on where the last one of this data_path was interrupted."""
        exists = self.auto_resume_path.exists()
        if not self.logger.auto_resume:
            if exists and not self.dummy_mode:
                self.auto_resume_path.unlink()  # so that it is not found by a later run
            return False
        if not exists:
            if not self.dummy_mode:
                print(f"auto_resume: no run to resume in {self.data_path}, so this is the first")
            return False
        data = json.loads(self.auto_resume_path.read_text(encoding="utf-8"))
        last, logger = data.pop("logger_type", None), type(self.logger).__name__
        if last != logger:
            raise ValueError(
                f"the run in {self.data_path} was logged by {last} and would be resumed by {logger}: use the same "
                "log_type, set auto_resume to false, or choose another data_path"
            )
        self.logger.set_resume_data(data)
        if not self.dummy_mode:
            print(f"auto_resume: going on with the run in {self.data_path}")
        return True

    def _begin_metrics(self) -> None:
        if not self.metrics_path.exists():
            return
        if not (self.can_recall or self.logger.resume):
            ended = time.strftime("%Y%m%d-%H%M%S", time.localtime(self.metrics_path.stat().st_mtime))
            self.metrics_path.rename(self.metrics_path.with_stem(f"metrics-{ended}"))
        elif not self.metrics_path.read_bytes().endswith(b"\n"):
            self._append("\n")  # ends the line that a crash cut short

    def _append(self, text: str) -> None:
        self._unwritten += text.encode()
        with self._tolerant("metrics.jsonl"), self.metrics_path.open("ab", buffering=0) as file:
            while self._unwritten:  # in one write, so that lines are whole, where the disk has room
                self._unwritten = self._unwritten[file.write(self._unwritten) :]

    @contextmanager
    def _tolerant(self, what: str) -> Iterator[None]:
        """A block whose OSErrors are warned of, once: what is logged ends no training."""
        try:
            yield
        except OSError as error:
            if what not in self._warned_of:
                self._warned_of.add(what)
                warnings.warn(f"{what} takes no more of what is logged ({error}); the run goes on")

    def _record(self, log: dict, step: int | None) -> None:
        record = {
            **{str(key): to_json(value) for key, value in log.items()},
            "step": to_json(step),
            "time": time.time(),
        }
        self._append(json.dumps(record) + "\n")

    # logging

    def log(self, log: dict, step: int | None = None, **kwargs) -> None:
        """Log numbers by name. A tensor of one element is a number; what is not finite is null in `metrics.jsonl`."""
        if self.dummy_mode:
            return
        self._record(log, step)
        with self._tolerant(type(self.logger).__name__):
            self.logger.log(log, step=step, **kwargs)

    def log_images(self, images, captions: Iterable[str] = (), image_section: str = "images", **kwargs) -> None:
        """Log images (channels, height, width) in 0..1, where the logger can show them."""
        if not self.dummy_mode:
            with self._tolerant(type(self.logger).__name__):
                self.logger.log_images(images, captions=captions, image_section=image_section, **kwargs)

    def log_file(self, file_path: str | os.PathLike, **kwargs) -> None:
        if not self.dummy_mode:
            with self._tolerant(type(self.logger).__name__):
                self.logger.log_file(file_path, **kwargs)

    # saving

    def save_config(self, current_config_path: str | os.PathLike, config_name: str = "config.json") -> None:
        """Keep the JSON config of the run in data_path, and wherever a saver has `save_meta_to`, without secrets."""
        if self.dummy_mode:
            return
        text = Path(current_config_path).read_text(encoding="utf-8")
        try:
            config = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{os.fspath(current_config_path)} is not valid JSON: {error}") from None
        shown = without_secrets(config)
        kept = self.data_path / config_name
        if shown != config and kept.exists() and kept.samefile(current_config_path):
            raise ValueError(f"{kept} holds secrets, and is where they would be left out: keep the config elsewhere")
        with atomic(kept) as temporary:
            temporary.write_text(text if shown == config else json.dumps(shown, indent=4), encoding="utf-8")
        for saver in self.savers:
            if saver.saving_meta:
                self._hand_over(saver, kept, str(Path(saver.save_meta_to) / config_name))

    def save(self, trainer, is_best: bool, is_latest: bool, **kwargs) -> list[str]:
        """Save a trainer wherever the savers say, and return what they could not save, a message each.

        What a saver fails at is logged, and the others go on; the files stay in data_path in any case.

        Args:
            trainer: a `DiffusionPriorTrainer`, or another with `save(path, overwrite, **values)`.
            is_best, is_latest: whether this is the best, and the latest.
            **kwargs: plain values to save with a checkpoint, such as epoch; the savers' paths may have their names, and
                {step}, as placeholders.
        Raises:
            OSError: a file of data_path could not be written; the one of the last save is whole.
        """
        if self.dummy_mode or not (is_best or is_latest):
            return []
        step = getattr(trainer, "step", None)
        values = kwargs if step is None else {"step": int(step), **kwargs}
        local: dict[str, Path] = {}
        failures = []
        with self._resumable():
            for saver in self.savers:
                for target in saver.targets(is_best, is_latest, values):
                    name = "checkpoint.pth"
                    if saver.save_type == "model":
                        name = "model.safetensors" if target.endswith(".safetensors") else "model.pth"
                    if name not in local:
                        local[name] = self._write(trainer, name, kwargs)
                    failures.append(self._hand_over(saver, local[name], target, step=values.get("step")))
        return [failure for failure in failures if failure is not None]

    @contextmanager
    def _resumable(self) -> Iterator[None]:
        """A save, after which the run can be resumed: with what is left of the disk, if it was the first.

        Not before: there is nothing to resume, and other processes may not have looked yet.
        """
        if not self.logger.auto_resume:
            yield
            return
        data = {**self.logger.get_resume_data(), "logger_type": type(self.logger).__name__}
        try:
            with atomic(self.auto_resume_path) as temporary:
                temporary.write_text(json.dumps(data), encoding="utf-8")
                try:
                    yield
                except Exception as error:
                    raise _OfTheBlock from error
        except _OfTheBlock as carrier:
            raise carrier.__cause__ from carrier.__cause__.__cause__

    def _write(self, trainer, name: str, values: dict) -> Path:
        path = self.data_path / name
        if name == "model.safetensors":
            prior = trainer.accelerator.unwrap_model(_sampling_prior(trainer))
            save_prior(prior, path, metadata=to_json({**values, **self.save_metadata}))
            return path
        # never written over: the savers' files may be further names of it
        with atomic(path) as temporary:
            if name == "model.pth":
                own = hasattr(trainer, "diffusion_prior")
                said = entry(trainer.accelerator.unwrap_model(_sampling_prior(trainer))) if own else {}
                torch.save({**self.save_metadata, **said, "model": sampling_weights(trainer)}, temporary)
            else:
                metadata = {key: value for key, value in self.save_metadata.items() if key not in RESERVED}
                trainer.save(temporary, overwrite=True, **{**metadata, **values})
        return path

    def _hand_over(self, saver: BaseSaver, local: Path, target: str, step: int | None = None) -> str | None:
        """Let a saver have a file; what it could not do is logged, and returned."""
        try:
            saver.save_file(local, target)
        except Exception as error:  # of a disk, a network or a service: no reason to end a training
            message = f"{type(saver).__name__} could not save {local} to {target}: {error}"
            self._record({"error": message}, step)
            with self._tolerant(type(self.logger).__name__):
                self.logger.log_error(message, step=step)
            return message
        return None

    # loading

    @property
    def can_recall(self) -> bool:
        """Whether there is a checkpoint to load; with `only_auto_resume`, one that an interrupted run left."""
        if self.loader is None:
            return False
        return not self.loader.only_auto_resume or (self.did_auto_resume and self.loader.available())

    def recall(self) -> dict:
        """The checkpoint that the loader finds, on the CPU, as `DiffusionPriorTrainer.load` takes it."""
        if not self.can_recall:
            raise ValueError("there is nothing to recall: no loader was added, or no run is being resumed")
        return self.loader.recall()

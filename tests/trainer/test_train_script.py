"""The training script on small real files: whole runs, interruptions, resumption, two processes."""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
import sys
import time
from collections import Counter
from types import SimpleNamespace
from typing import Literal, get_args, get_origin

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.commands import launch
from pydantic import BaseModel

from fastprior import train_diffusion_prior
from fastprior.checkpoints import dalle2 as checkpoint
from fastprior.cli import command_line as cli
from fastprior.prior.evaluate import evaluate
from fastprior.trackers import read_metrics
from fastprior.trackers.loggers import LOGGERS
from fastprior.trackers.storage import LOADERS, SAVERS
from fastprior.train_configs import TrainDiffusionPriorConfig
from fastprior.train_diffusion_prior import TrainingRun, make_accelerator, split_edges
from helpers import ROOT, processes

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
DIM, SHARDS, ROWS = 16, 3, 120


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Text embeddings, and image embeddings that are a rotation of them."""
    folder = tmp_path_factory.mktemp("data")
    draw = np.random.default_rng(0)
    rotation = np.linalg.qr(draw.normal(size=(DIM, DIM)))[0]
    for name in ("images", "texts"):
        (folder / name).mkdir()
    for shard in range(SHARDS):
        text = draw.normal(size=(ROWS, DIM))
        text /= np.linalg.norm(text, axis=1, keepdims=True)
        np.save(folder / "texts" / f"text_emb_{shard}.npy", text.astype(np.float32))
        np.save(folder / "images" / f"img_emb_{shard}.npy", (text @ rotation).astype(np.float32))
    return folder


def make_config(data, out, *, train=None, data_options=None, resume=True) -> dict:
    return dict(
        prior=dict(
            net=dict(dim=DIM, depth=2, heads=2, dim_head=8, max_text_len=4, num_timesteps=50),
            image_embed_dim=DIM, timesteps=50, cond_drop_prob=0.1, condition_on_text_encodings=False,
        ),
        data=dict(
            image_url=str(data / "images"), text_url=str(data / "texts"), batch_size=16,
            splits=dict(train=0.8, val=0.1, test=0.1),
        ) | (data_options or {}),
        train=dict(epochs=3, lr=3e-3, wd=0.01, ema_beta=0.9, ema_update_after_step=1, ema_update_every=1,
                   eval_timesteps=[8], log_every_steps=5) | (train or {}),
        tracker=dict(
            data_path=str(out), overwrite_data_path=True, log=dict(log_type="console", auto_resume=resume),
            load=dict(load_from="local", file_path=str(out / "latest.pth"), only_auto_resume=True),
            save=[dict(save_to="local", save_latest_to=str(out / "latest.pth"), save_best_to=str(out / "best.pth"),
                       save_type="checkpoint")],
        ),
    )  # fmt: skip


def write(config: dict, path) -> str:
    path.write_text(json.dumps(config))
    return str(path)


def run(config: dict, path) -> int:
    return train_diffusion_prior.main(["--config_file", write(config, path)])


def weights(path) -> dict:
    return torch.load(path, weights_only=True, map_location="cpu")["model"]


@pytest.mark.slow
def test_a_whole_run(data, tmp_path):
    out = tmp_path / "run"
    assert (
        run(make_config(data, out, train=dict(epochs=30, lr=1e-2, max_grad_norm=None)), tmp_path / "config.json") == 0
    )
    records = read_metrics(out / "metrics.jsonl")
    losses = [r["training/l2-loss"] for r in records if "training/l2-loss" in r]
    assert len(losses) == 30 * 18 // 5 and np.mean(losses[-5:]) < 0.4 * np.mean(losses[:3])
    last = next(r for r in reversed(records) if "test/ema similarity with original image [steps=8]" in r)
    assert last["test/ema similarity with original image [steps=8]"] > 0.7
    assert any("validation/online l2-loss" in r and "validation/ema l2-loss" in r for r in records)
    prior = checkpoint.load(out / "latest.pth")
    text = F.normalize(torch.randn(2, DIM), dim=-1)
    assert prior.p_sample_loop((2, DIM), text_cond=dict(text_embed=text), timesteps=4).isfinite().all()
    assert (out / "best.pth").exists() and (out / "config.json").exists() and (out / "curves.png").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_and_resumed_equals_uninterrupted(data, tmp_path, monkeypatch, number):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(make_config(data, whole), tmp_path / "whole.json") == 0
    plain_step, config = TrainingRun._step, make_config(data, parts)
    for stop_after in (7, 25):

        def step(self, batch, bar, stop_after=stop_after):
            if int(self.trainer.step) == stop_after:
                os.kill(os.getpid(), number)
            return plain_step(self, batch, bar)

        monkeypatch.setattr(TrainingRun, "_step", step)
        assert run(config, tmp_path / "parts.json") == 128 + number
        assert torch.load(parts / "latest.pth", weights_only=True)["step"].item() == stop_after + 1
    monkeypatch.setattr(TrainingRun, "_step", plain_step)
    assert run(config, tmp_path / "parts.json") == 0
    ours, wanted = weights(parts / "latest.pth"), weights(whole / "latest.pth")
    assert ours.keys() == wanted.keys() and all(torch.equal(ours[name], wanted[name]) for name in wanted)


@pytest.mark.slow
def test_online_weights_and_their_average_are_measured_each(data, tmp_path):
    out = tmp_path / "run"
    config = make_config(data, out, train=dict(epochs=1, ema_beta=0.99))
    assert run(config, tmp_path / "config.json") == 0
    (record,) = (r for r in read_metrics(out / "metrics.jsonl") if "validation/ema l2-loss" in r)
    again = make_run(config)
    for name, prior in (("online", again.trainer.prior), ("ema", again.trainer.sampling_prior)):
        loss = evaluate(prior, again.streams["validation"], timesteps=())["l2-loss"]
        assert record[f"validation/{name} l2-loss"] == pytest.approx(loss, rel=1e-6)
    assert abs(record["validation/online l2-loss"] - record["validation/ema l2-loss"]) > 1e-3


def make_run(config: dict) -> TrainingRun:
    config = TrainDiffusionPriorConfig.model_validate(config)
    return TrainingRun(config, make_accelerator(config))


def test_options_of_a_config_arrive(data, tmp_path):
    options = dict(lr=0.25, wd=0.125, max_grad_norm=3.0, warmup_steps=2, cosine_decay_max_steps=8, draws=3,
                   ema_beta=0.5, ema_update_after_step=7, ema_update_every=3, max_bad_steps=4)  # fmt: skip
    trainer = make_run(make_config(data, tmp_path / "run", train=options)).trainer
    ema = trainer.ema_diffusion_prior
    assert (ema.beta, ema.update_after_step, ema.update_every) == (0.5, 7, 3)
    assert (trainer.max_grad_norm, trainer.draws, trainer.max_bad_steps) == (3.0, 3, 4)
    assert trainer.scheduler.base_lrs == [0.25] * 2 and trainer.scheduler.get_last_lr() == [0.125] * 2
    assert [trainer.scheduler.lr_lambdas[0](step) for step in (2, 8)] == pytest.approx([0.8535534, 0])
    assert trainer.optimizer.param_groups[0]["weight_decay"] == 0.125


@pytest.mark.slow
def test_without_an_average(data, tmp_path):
    config = make_config(data, tmp_path / "run", train=dict(use_ema=False, epochs=2))
    assert run(config, tmp_path / "config.json") == 0
    names = set().union(*read_metrics(tmp_path / "run" / "metrics.jsonl"))
    assert "validation/online recall@1 [steps=8]" in names and not [name for name in names if "/ema " in name]
    state = torch.load(tmp_path / "run" / "best.pth", weights_only=True)
    assert "ema_model" not in state and make_run(config).best == state["progress"]["best"] < 2


@pytest.mark.slow
def test_evaluation_does_not_change_the_training(data, tmp_path):
    for name, seconds in (("never", 10**6), ("always", 0)):
        options = dict(data_options=dict(eval_every_seconds=seconds), train=dict(epochs=1))
        assert run(make_config(data, tmp_path / name, **options), tmp_path / "config.json") == 0
    never, always = (weights(tmp_path / name / "latest.pth") for name in ("never", "always"))
    assert all(torch.equal(never[name], always[name]) for name in never)


def test_a_long_evaluation_or_save_is_followed_by_training(data, tmp_path, monkeypatch):
    """A step takes a second, an evaluation 50 and a save 30; both are wanted every ten."""
    clock, begun = [0], dict(evaluation=[], save=[])
    monkeypatch.setattr(train_diffusion_prior, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    config = make_config(data, tmp_path / "run", train=dict(epochs=3, save_every_seconds=10, use_ema=False))
    config["data"] |= dict(eval_every_seconds=10)
    run = make_run(config)
    run.best = 0.0

    def step(batch, bar):
        run.trainer.step += 1
        run.samples_seen += 16
        clock[0] += 1
        return 0.0

    def takes(name, seconds):
        begun[name].append(int(run.trainer.step))
        clock[0] += seconds
        return {"l2-loss": 1.0}

    monkeypatch.setattr(run, "_step", step)
    monkeypatch.setattr(run.tracker, "save", lambda *args, **kwargs: takes("save", 30) and [])
    monkeypatch.setattr(train_diffusion_prior, "evaluate", lambda *args, **kwargs: takes("evaluation", 50))
    assert run.train() == 0
    assert begun == dict(evaluation=[10, 20, 30, 40, 50, 54, 54], save=[10, 20, 30, 40, 50, 54])
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert {r["samples_per_second"] for r in lines if "samples_per_second" in r} == {16.0}


@pytest.mark.slow
@pytest.mark.parametrize("mode", [None, "skip"])
def test_rows_that_are_not_finite(data, tmp_path, mode):
    """One row in a hundred: each spoils its step, or is left out."""
    folder = shutil.copytree(data, tmp_path / "data")
    for path in sorted(folder.glob("*/*.npy")):
        rows = np.load(path)
        rows[0] = np.nan  # the sample is from the middle
        np.save(path, rows)
    config = make_config(folder, tmp_path / "run", train=dict(epochs=2, log_every_steps=1))
    config["data"] |= dict(on_bad_rows=mode)
    with pytest.warns(UserWarning, match="img_emb_0.npy: row 0 holds"):
        assert run(config, tmp_path / "config.json") == 0
    last = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "bad_steps" in r][-1]
    assert last["bad_rows"] == 3 and (last["bad_steps"] > 0) == (mode is None)
    assert last["step"] == 36 - last["bad_steps"]


PHASES = "_step", "save", "evaluate"


def train_and_tell(config, sender):
    """Train, and say what begins, and what a phase within another goes back to."""
    for name in PHASES:
        plain = getattr(TrainingRun, name)

        def told(self, *args, plain=plain, name=name, **kwargs):
            sender.send(name)
            result = plain(self, *args, **kwargs)
            sender.send("between")
            return result

        setattr(TrainingRun, name, told)
    sys.exit(train_diffusion_prior.train(TrainDiffusionPriorConfig.model_validate(config)))


def interrupt(config, number, phase, after, delay, errors):
    """Send a signal so many seconds after the `after`-th begin of a phase; returns what was under way, and the code."""
    receiver, sender = processes.CONTEXT.Pipe(duplex=False)
    process = processes.start(train_and_tell, config, sender, errors=errors)
    sender.close()
    begun, last = 0, None
    while begun < after:
        last = receiver.recv()
        begun += last == phase
    time.sleep(delay)
    os.kill(process.pid, number)
    if number != signal.SIGKILL:
        while process.is_alive() and receiver.poll(60):  # it must not wait for room in the pipe
            with contextlib.suppress(EOFError):
                receiver.recv()
    process.join(60)
    with contextlib.suppress(EOFError):
        while number == signal.SIGKILL and receiver.poll():
            last = receiver.recv()
    return last, process.exitcode


@pytest.mark.slow
def test_interrupted_at_any_moment(data, tmp_path):
    """Twenty times by SIGKILL: every checkpoint that is left can be read, and the run ends where it would have."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = dict(
        train=dict(epochs=5, save_every_seconds=0), data_options=dict(eval_every_seconds=0, max_eval_pairs=8)
    )
    for out in (whole, parts):
        out.mkdir()
    configs = {out: make_config(data, out, **options) for out in (whole, parts)}
    configs[parts]["tracker"]["save"][0]["save_every"] = 4
    assert run(configs[whole], tmp_path / "whole.json") == 0

    draw = np.random.default_rng(0)
    numbers = draw.permutation([signal.SIGKILL] * 20 + [signal.SIGTERM, signal.SIGINT] * 2)
    killed_in, latest = Counter(), parts / "latest.pth"
    for index, number in enumerate(numbers):
        phase, after, delay = PHASES[index % 3], int(draw.integers(1, 5)), draw.uniform(0, 0.01)
        last, code = interrupt(configs[parts], int(number), phase, after, delay, tmp_path / "errors.txt")
        if number == signal.SIGKILL:
            killed_in[last] += 1
        assert code == (-9 if number == signal.SIGKILL else 128 + number), (tmp_path / "errors.txt").read_text()
        for path in parts.glob("*.pth"):
            assert torch.load(path, weights_only=True)["step"] > 0
    assert killed_in.total() == 20 and all(killed_in[phase] for phase in PHASES), killed_in
    assert 24 <= int(torch.load(latest, weights_only=True)["step"]) < 5 * 18
    assert run(configs[parts], tmp_path / "parts.json") == 0

    ours, wanted = (torch.load(out / "latest.pth", weights_only=True) for out in (parts, whole))
    assert_same(ours, wanted)
    assert_same(*(torch.load(out / "best.pth", weights_only=True) for out in (parts, whole)))
    assert [path for path in parts.iterdir() if path.name.endswith(".tmp")] == []


def assert_same(one, other, where="the checkpoint"):
    """Bit for bit: weights, average, moments, generators and counters."""
    assert type(one) is type(other), where
    if torch.is_tensor(one):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}[{key!r}]")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for index, pair in enumerate(zip(one, other)):
            assert_same(*pair, f"{where}[{index}]")
    else:
        assert one == other, where


# several processes


UNEVEN = dict(splits=dict(train=0.85, val=0.15, test=0))  # 306 pairs to train on
COUNTED = (306 // 2 // 16) * 2 * 16  # pairs of an epoch of two processes, of which each has 153


def train_on_ranks(config, status, stop_at=None):
    """Train on this rank; the last one gets a SIGTERM before a step."""
    rank, plain_step = int(os.environ.get("RANK", 0)), TrainingRun._step

    def step(self, batch, bar):
        if int(self.trainer.step) == stop_at and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain_step(self, batch, bar)

    TrainingRun._step = step
    assert train_diffusion_prior.train(TrainDiffusionPriorConfig.model_validate(config)) == status


@pytest.mark.slow
@pytest.mark.parametrize("mode", processes.SEVERAL)
def test_interrupted_on_one_of_two_processes(data, tmp_path, mode):
    """All stop when they next look, every five steps, and together go on to where an uninterrupted run ends."""
    options = dict(processes.MODES[mode], function=train_on_ranks, folder=tmp_path)
    prior = dict(net=dict(dim=DIM, depth=1, heads=2, dim_head=8, max_text_len=4, num_timesteps=50, ff_dropout=0.1))
    configs = [make_config(data, tmp_path / name, data_options=UNEVEN) for name in ("whole", "parts")]
    for config in configs:
        config["prior"] |= prior
    processes.run_ranks(arguments=(configs[0], 0), **options)
    processes.run_ranks(arguments=(configs[1], 128 + signal.SIGTERM, 11), **options)
    assert torch.load(tmp_path / "parts" / "latest.pth", weights_only=True)["step"].item() == 15
    processes.run_ranks(arguments=(configs[1], 0), **options)
    whole, parts = (torch.load(tmp_path / name / "latest.pth", weights_only=True) for name in ("whole", "parts"))
    assert whole["step"].item() == 27 and whole["progress"]["samples_seen"] == 3 * COUNTED
    assert_same(parts, whole)
    assert_same(*(torch.load(tmp_path / name / "best.pth", weights_only=True) for name in ("whole", "parts")))


@pytest.mark.slow
def test_resumed_on_another_number_of_processes(data, tmp_path, capfd):
    config = make_config(data, tmp_path / "run", data_options=UNEVEN)
    options = dict(world=2, function=train_on_ranks, folder=tmp_path)
    processes.run_ranks(arguments=(config, 128 + signal.SIGTERM, 11), **options)
    progress = torch.load(tmp_path / "run" / "latest.pth", weights_only=True)["progress"]
    assert progress["data"]["sample"] == 6 * 16 and progress["samples_seen"] == 15 * 32
    with pytest.warns(UserWarning, match=r"generators of 2 process\(es\), and this run has 1"):
        assert run(config, tmp_path / "config.json") == 0
    assert "is of 2 process(es), and this run has 1: the rest of the epoch is dealt out anew" in capfd.readouterr().out
    state = torch.load(tmp_path / "run" / "latest.pth", weights_only=True)
    left = (306 - 2 * 6 * 16) // 16 + 306 // 16  # batches of the epoch that was begun, and of the last
    assert state["step"].item() == 15 + left and len(state["rng"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("options, key, world", [
    (["--cpu"], "--config_path", 1), (["--use_fsdp", "--fsdp_version", "2"], "--config_file", 2),
], ids=["cpu", "fsdp"])  # fmt: skip
def test_accelerate_launches(data, tmp_path, monkeypatch, capfd, options, key, world):
    for name in ("WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    out = tmp_path / "run"
    config = write(make_config(data, out, train=dict(epochs=2), data_options=UNEVEN), tmp_path / "config.json")
    options += ["--num_processes", "2", "-m", "fastprior.train_diffusion_prior", key, config]
    launch.launch_command(launch.launch_command_parser().parse_args(options))
    assert ("accelerate starts several through MPI alone" in capfd.readouterr().err) is (world == 1)
    state = torch.load(out / "latest.pth", weights_only=True)
    steps = 2 * (306 // world // 16)
    assert state["step"].item() == steps and state["progress"]["samples_seen"] == steps * 16 * world
    assert len(state["rng"]) == world
    assert any("validation/ema l2-loss" in record for record in read_metrics(out / "metrics.jsonl"))


@pytest.mark.slow
def test_diverging_training_keeps_the_last_checkpoint(data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    assert run(make_config(data, out, train=dict(epochs=1)), tmp_path / "config.json") == 0
    before = (out / "latest.pth").read_bytes()
    plain_step = TrainingRun._step

    def step(self, batch, bar):
        return plain_step(self, batch | {"image_embed": batch["image_embed"] * torch.nan}, bar)

    monkeypatch.setattr(TrainingRun, "_step", step)
    assert run(make_config(data, out, train=dict(epochs=2, max_bad_steps=3)), tmp_path / "config.json") == 1
    assert "3 steps in a row" in capsys.readouterr().err
    assert (out / "latest.pth").read_bytes() == before


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(data_options=dict(batch_size=1000)), "data.batch_size=1000; the training split has 288 pairs"),
        (dict(data_options=dict(text_url=None)), "meta_url and text_url are both missing"),
        (dict(data_options=dict(image_urk="x")), "unknown key 'image_urk', the nearest is 'image_url'"),
        (dict(train=dict(draws=0)), "train.draws: Input should be greater than or equal to 1"),
        (dict(data_options=dict(image_url="/nowhere")), "/nowhere"),
    ],
)
def test_wrong_configs(data, tmp_path, change, message):
    config = make_config(data, tmp_path / "run", **change)
    with pytest.raises((ValueError, FileNotFoundError), match=message.replace("(", r"\(")):
        run(config, tmp_path / "config.json")


def leaves(annotation) -> set:
    """The plain types and models in an annotation, and Literal where it has literals."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (dict, Literal) or not parts:
        return {origin or annotation}
    return set().union(*map(leaves, parts))


def wrong_values(model=TrainDiffusionPriorConfig, at=()):
    """Values that a key cannot have, for every key of a config, found in the classes so that none is left out."""
    for name, field in model.model_fields.items():
        kinds, place = leaves(field.annotation), (*at, name)
        sections = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        for section in sorted(sections, key=lambda section: section.__name__):  # every worker must find the same order
            yield from wrong_values(section, (*place, 0) if get_origin(field.annotation) is list else place)
        if sections:
            continue
        values = [3 if dict in kinds else {"wrong": 1}]
        values += [-1] * (bool(kinds & {int, float}) and name != "eval_cond_scale")
        values += [math.nan] * (float in kinds) + ["no such value"] * (Literal in kinds)
        for value in values:
            yield pytest.param(model, place, value, id=f"{model.__name__}-{name}-{value}")


def read_with(tmp_path, place, value, model=None):
    """Read a config file in which one key has another value."""
    config = make_config(tmp_path, tmp_path / "run")
    config["prior"]["clip"], section = dict(make="openai"), config
    for name in place[:-1]:
        section = section[name]
    if model is not None and (make := model.model_fields.get("make")) and make.is_required():
        section.clear()  # another kind of network, which says so
        section["make"] = get_args(make.annotation)[0]
    section[place[-1]] = value
    with pytest.raises(ValueError) as caught:
        TrainDiffusionPriorConfig.from_json_path(write(config, tmp_path / "config.json"))
    return str(caught.value)


@pytest.mark.parametrize("model, place, value", wrong_values())
def test_every_wrong_value_names_its_key(tmp_path, model, place, value):
    assert ".".join(map(str, place)) in read_with(tmp_path, place, value, model)


@pytest.mark.parametrize("key, value", [
    ("prior.net.attn_dropout", 1.5), ("prior.cond_drop_prob", 1.1), ("prior.clamp", "x"), ("prior.timesteps", 0),
    ("prior.net.dim", 0), ("data.batch_size", 0), ("data.num_data_points", 0), ("train.ema_beta", 1),
    ("train.eval_cond_scale", math.inf), ("train.eval_timesteps", [4, 0]), ("train.epochs", 0), ("train.lr", 0),
    ("train.random_seed", 2**32),
])  # fmt: skip
def test_bounds(tmp_path, key, value):
    assert key in read_with(tmp_path, tuple(key.split(".")), value)


PARTS = [("log", "log_type", LOGGERS), ("load", "load_from", LOADERS), ("save", "save_to", SAVERS)]


@pytest.mark.parametrize("section, kind, parts", PARTS)
def test_every_wrong_option_of_a_tracker_is_named(tmp_path, section, kind, parts):
    for choice, part in parts.items():
        own = [field for field in dataclasses.fields(part) if field.name != "data_path"]
        given = {field.name: "https://x/y" for field in own if field.default is dataclasses.MISSING}
        given |= {"save_latest_to": "latest.pth"} if section == "save" else {}
        for field in own:
            options = {kind: choice, **given, field.name: {"wrong": 1}}
            place = ("tracker", section)
            assert field.name in read_with(tmp_path, place, [options] if section == "save" else options), choice


def test_captions_need_a_clip(data, tmp_path):
    config = make_config(data, tmp_path / "run")
    config["prior"]["condition_on_text_encodings"] = True
    with pytest.raises(ValueError, match="needs prior.clip .* or data.text_url and encodings_url"):
        run(config, tmp_path / "config.json")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.json")), ids=lambda p: p.stem)
def test_the_configs_that_come_along_are_valid(path):
    config = TrainDiffusionPriorConfig.from_json_path(path)
    with torch.device("meta"):
        net = config.prior.net.create()
    transformer = net.prior.transformer_blocks if path.stem == "prior_transformer" else net.causal_transformer
    weights = sum(p.numel() for p in transformer.parameters() if p.ndim == 2)
    wanted = {"tiny": 8032, "prior_laion_vit_l14": 248.4e6, "prior_transformer": 1006.6e6}
    assert weights == pytest.approx(wanted.get(path.stem, 100.9e6), rel=0.002)


@pytest.mark.slow
def test_the_tiny_config_trains(data, tmp_path, monkeypatch):
    for name in ("images", "texts"):
        (tmp_path / name).symlink_to(data / name)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--config_path", str(ROOT / "configs" / "tiny.json")]) == 0
    assert (tmp_path / "run" / "best.pth").exists()


def test_splits_are_whole():
    assert split_edges((0.7, 0.2, 0.1), 10) == [0, 7, 9, 10]
    assert split_edges((0.85, 0.15, 0.0), 7) == [0, 6, 7, 7]
    assert split_edges((1.0, 0.0, 0.0), 3) == [0, 3, 3, 3]


@pytest.mark.slow
def test_mixed_precision_and_accumulation(data, tmp_path):
    train = dict(amp=True, gradient_accumulation_steps=2, epochs=1, draws=2)
    config = TrainDiffusionPriorConfig.model_validate(make_config(data, tmp_path / "run", train=train))
    assert make_accelerator(config).mixed_precision == "bf16"
    assert train_diffusion_prior.train(config) == 0
    assert torch.load(tmp_path / "run" / "latest.pth", weights_only=True)["step"].item() == 18 // 2

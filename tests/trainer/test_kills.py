"""SIGKILL at any moment of a training, a conversion and a sampling: what is left can be read, and nothing is lost."""

import functools
import json
import os
import signal
from collections import Counter

import numpy as np
import pytest
import torch

import fastprior
from fastprior import train_diffusion_prior
from fastprior.cli import command_line
from fastprior.train_configs import TrainDiffusionPriorConfig
from helpers.kills import leftovers, run_job
from helpers.priors import make_prior

KILLED = (-signal.SIGKILL, -signal.SIGXFSZ)
DIM = 16


def same(one, other) -> bool:
    if torch.is_tensor(one):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


# what is killed: each has what makes a process of it, what it leaves in a folder, and its result


def train(config):
    train_diffusion_prior.plot_curves = lambda *_: None  # seconds of matplotlib, for a file that is written as others
    return train_diffusion_prior.train(TrainDiffusionPriorConfig.model_validate(config))


def convert(source, target):
    fastprior.convert(source, target, overwrite=True)


def sample(*argv):
    return command_line.main(["sample", *map(str, argv)])


class Training:
    """Of a few steps, which saves after each."""

    def __init__(self, given):
        draw = np.random.default_rng(0)
        for name in ("images", "texts"):
            (given / name).mkdir()
            np.save(given / name / f"{name[:-1]}_0.npy", draw.normal(size=(60, DIM)).astype(np.float32))
        self.given = given

    def job(self, out):
        saver = dict(save_to="local", save_latest_to=f"{out}/latest.pth", save_best_to=f"{out}/best.pth", save_every=3)
        config = dict(
            prior=dict(net=dict(dim=16, depth=1, heads=1, dim_head=8, max_text_len=2, num_timesteps=9, ff_dropout=0.1),
                       image_embed_dim=DIM, timesteps=9, cond_drop_prob=0.1, condition_on_text_encodings=False),
            data=dict(image_url=str(self.given / "images"), text_url=str(self.given / "texts"), batch_size=8,
                      splits=dict(train=0.8, val=0.2, test=0), eval_every_seconds=0, max_eval_pairs=8),
            train=dict(epochs=1, ema_beta=0.9, ema_update_after_step=1, ema_update_every=1, eval_timesteps=[2],
                       log_every_steps=1, save_every_seconds=0),
            tracker=dict(data_path=str(out), overwrite_data_path=True, log=dict(log_type="console", auto_resume=True),
                         load=dict(load_from="local", file_path=f"{out}/latest.pth", only_auto_resume=True),
                         save=[saver]),
        )  # fmt: skip
        return functools.partial(train, config)

    def read(self, out):
        for path in out.glob("*.pth"):
            assert torch.load(path, weights_only=True)["step"] > 0
            fastprior.load(path)
        for path in out.glob("*.json"):
            json.loads(path.read_text())

    def result(self, out):
        assert len((out / "metrics.jsonl").read_text()) > 100
        return {
            name: torch.load(out / name, weights_only=True) for name in ("latest.pth", "best.pth", "checkpoint.pth")
        }


class Conversion:
    """Of a prior, to a file of ours or of the peer's."""

    def __init__(self, given, suffix):
        self.source, self.name = given / "source.safetensors", f"prior{suffix}"
        fastprior.save(make_prior(), self.source)

    def job(self, out):
        return functools.partial(convert, self.source, out / self.name)

    def read(self, out):
        if (path := out / self.name).exists():
            fastprior.load(path, config=dict(net=dict(heads=4, dim_head=16), prior=dict(timesteps=20)))

    def result(self, out):
        return (out / self.name).read_bytes()


class Sampling:
    """Of embeddings of texts in a file, to a file."""

    def __init__(self, given):
        prior = make_prior(condition_on_text_encodings=False)
        fastprior.save(prior, given / "prior.safetensors")
        np.save(
            given / "text.npy", np.random.default_rng(0).normal(size=(40, prior.image_embed_dim)).astype(np.float32)
        )
        self.given = given

    def job(self, out):
        options = "--checkpoint", self.given / "prior.safetensors", "--text-embed", self.given / "text.npy"
        return functools.partial(sample, *options, "--steps", 2, "--seed", 0, "--out", out / "embeds.npy")

    def read(self, out):
        if (out / "embeds.npy").exists():
            np.load(out / "embeds.npy")

    def result(self, out):
        return (out / "embeds.npy").read_bytes()


VICTIMS = {
    "training": Training,
    "convert": functools.partial(Conversion, suffix=".safetensors"),
    "convert-peer": functools.partial(Conversion, suffix=".pth"),
    "sample": Sampling,
}


def whole_run(name, folder):
    """A victim, its result where nobody disturbs it, and how many events there are on the way."""
    (folder / "given").mkdir()
    victim, out = VICTIMS[name](folder / "given"), folder / "whole"
    out.mkdir()
    code, events = run_job(victim.job(out), out)
    assert code == 0 and events > 3
    return victim, victim.result(out), events


def kill(victim, folder, moments):
    """Kill runs at these moments, one after the other in one folder, then let one end: how they ended, its result."""
    out, codes = folder / "killed", Counter()
    out.mkdir(exist_ok=True)
    for kind, value in moments:
        codes[run_job(victim.job(out), out, kind, value)[0]] += 1
        victim.read(out)
    assert run_job(victim.job(out), out)[0] == 0
    assert leftovers(out) == []
    return codes


def moments_of(name, events, draw, count):
    """Seeded moments: of files' events, in the middle of writes, and of any time."""
    largest, longest = (60_000, 0.5) if name == "training" else (250_000, 0.05)
    for number in range(count):
        kind = ("event", "byte", "event", "time")[number % 4]
        if kind == "event":
            yield kind, int(draw.integers(1, events))
        else:
            yield (kind, int(draw.integers(1, largest))) if kind == "byte" else (kind, draw.uniform(0, longest))


@pytest.mark.slow
@pytest.mark.parametrize("name", VICTIMS)
def test_killed_at_some_moments(tmp_path, name):
    victim, wanted, events = whole_run(name, tmp_path)
    count = 6 if name == "training" else 3
    codes = kill(victim, tmp_path, moments_of(name, events, np.random.default_rng(0), count))
    assert same(victim.result(tmp_path / "killed"), wanted)
    assert sum(codes[code] for code in KILLED) >= count // 2, codes


@pytest.mark.fuzz
@pytest.mark.parametrize("name", VICTIMS)
def test_killed_at_any_moment(tmp_path, name):
    """As often as KILLS says, in rounds of some each that end bit-equal."""
    victim, wanted, events = whole_run(name, tmp_path)
    draw, codes, rounds = np.random.default_rng(int(os.environ.get("SEED", 0))), Counter(), 0
    while sum(codes[code] for code in KILLED) < int(os.environ.get("KILLS", 10)):
        folder = tmp_path / f"round-{rounds}"
        folder.mkdir()
        codes += kill(victim, folder, moments_of(name, events, draw, 5))
        assert same(victim.result(folder / "killed"), wanted)
        rounds += 1
    print(f"{name}: {rounds} rounds, exit codes {dict(codes)}, {events} events of a whole run")

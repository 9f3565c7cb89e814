"""SIGKILL at any moment of a training, a conversion and a sampling: what is left can be read, and nothing is lost."""

import functools
import os
import signal
from collections import Counter

import numpy as np
import pytest
import torch

import fastprior
from fastprior.cli import command_line
from fastprior.models.prior_transformer.model import PriorTransformer
from helpers.kills import Training, leftovers, run_job, same
from helpers.priors import make_prior
from helpers.pt_cases import CONFIG

KILLED = (-signal.SIGKILL, -signal.SIGXFSZ)


# what is killed: each has what makes a process of it, what it leaves in a folder, and its result


def convert(source, target):
    fastprior.convert(source, target, overwrite=True)


def sample(*argv):
    return command_line.main(["sample", *map(str, argv)])


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


def save_folder(target):
    torch.manual_seed(0)
    PriorTransformer(**CONFIG).save_pretrained(target)


class Folder:
    """A model that is saved as a folder of diffusers."""

    def __init__(self, given):
        pass

    def job(self, out):
        return functools.partial(save_folder, out / "prior")

    def read(self, out):
        if (path := out / "prior").exists():
            PriorTransformer.from_pretrained(path)

    def result(self, out):
        return {path.name: path.read_bytes() for path in (out / "prior").iterdir()}


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
    "folder": Folder,
    "sample": Sampling,
}


def whole_run(name, folder):
    """A victim, its result where nobody disturbs it, and how many events there are on the way."""
    (folder / "given").mkdir()
    victim, out = VICTIMS[name](folder / "given"), folder / "whole"
    out.mkdir()
    ended = run_job(victim.job(out), out)
    assert ended.code == 0 and ended.events > 3, ended.said
    return victim, victim.result(out), ended.events


def kill(victim, folder, moments):
    """Kill runs at these moments, one after the other in one folder, then let one end: how they ended, its result."""
    out, codes = folder / "killed", Counter()
    out.mkdir(exist_ok=True)
    for kind, value in moments:
        ended = run_job(victim.job(out), out, kind, value)
        assert ended.code in (0, *KILLED), ended.said
        codes[ended.code] += 1
        victim.read(out)
    ended = run_job(victim.job(out), out)
    assert ended.code == 0, ended.said
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
    count = 3
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

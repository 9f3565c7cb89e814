"""How trainings end that something outside ends: a signal at the last moment, bad data, output that nobody takes."""

import errno
import functools
import itertools
import os
import resource
import signal
import stat
import sys

import pytest
import torch

from fastprior import train_diffusion_prior
from fastprior.dataloaders import PairStream
from fastprior.dataloaders.files import ShardError
from fastprior.trackers import LocalSaver
from fastprior.train_configs import TrainDiffusionPriorConfig
from fastprior.train_diffusion_prior import TrainingRun
from helpers.kills import Training, run_job, same
from helpers.processes import run_ranks

pytestmark = pytest.mark.slow
SELDOM = dict(save_every_seconds=10**6, eval_every_seconds=10**6)


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    return Training(tmp_path_factory.mktemp("given"))


@pytest.fixture(scope="module")
def wanted(training, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    ended = run_job(training.job(out), out)
    assert ended.code == 0, ended.said
    return training.result(out)


def full():
    for number in (1, 2):
        os.dup2(os.open("/dev/full", os.O_WRONLY), number)


def left():
    receiver, sender = os.pipe()
    os.close(receiver)
    for number in (1, 2):
        os.dup2(sender, number)


def closed():
    os.close(1), os.close(2)
    sys.stdout = sys.stderr = None  # as the interpreter starts then
    plain = TrainingRun.save

    def save(self, **options):
        assert all(stat.S_ISCHR(os.fstat(number).st_mode) for number in (1, 2))  # no file has got their numbers
        return plain(self, **options)

    TrainingRun.save = save


@pytest.mark.parametrize("prepare", [full, left, closed])
def test_output_that_nobody_takes(training, wanted, tmp_path, prepare):
    ended = run_job(training.job(tmp_path, prepare), tmp_path)
    assert (ended.code, ended.said) == (0, "")
    assert same(training.result(tmp_path), wanted)


def end_at_the_end():
    plain = TrainingRun.evaluate

    def evaluate(self, split):
        if self.epoch == self.config.train.epochs:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, split)

    TrainingRun.evaluate = evaluate


def test_a_signal_in_the_last_evaluation(training, wanted, tmp_path):
    ended = run_job(training.job(tmp_path, end_at_the_end, **SELDOM), tmp_path)
    assert ended.code == 128 + signal.SIGTERM and ended.said.splitlines()[-1] == "SIGTERM: saved at step 6"
    assert run_job(training.job(tmp_path), tmp_path).code == 0
    found = training.result(tmp_path)["latest.pth"]
    kept = "step", "model", "ema_model", "ema", "optimizer", "scheduler", "rng"
    assert all(same(found[key], wanted["latest.pth"][key]) for key in kept)


def spoil(batches):
    """Let the data end after so many batches."""
    plain = PairStream.__iter__

    def iterate(self):
        found = plain(self)
        for number in itertools.count():
            if number == batches and self.drop_last:  # that of the training
                raise ShardError("img_emb_0.npy", "ends after 3 rows")
            if (batch := next(found, None)) is None:
                return
            yield batch

    PairStream.__iter__ = iterate


@pytest.mark.parametrize("accumulated, kept", [
    (1, "the checkpoint of step 3 is kept, and the same command goes on from there"),
    (2, "no checkpoint was saved before"),  # half a step is done
])  # fmt: skip
def test_data_that_go_bad(training, tmp_path, accumulated, kept):
    options = dict(gradient_accumulation_steps=accumulated, **SELDOM)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    ended = run_job(training.job(parts, functools.partial(spoil, 3), **options), parts)
    assert ended.code == 2
    assert ended.said.splitlines()[-1] == f"fastprior: error: img_emb_0.npy: ends after 3 rows; {kept}"
    for out in (parts, whole):
        ended = run_job(training.job(out, **options), out)
        assert ended.code == 0, ended.said
    assert same(*(training.result(out)["latest.pth"] for out in (parts, whole)))


def deny(name):
    """Let the disk that one saver saves to be full."""
    plain = LocalSaver.save_file

    def save_file(self, local_path, save_path, **options):
        if name in save_path:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), save_path)
        plain(self, local_path, save_path, **options)

    LocalSaver.save_file = save_file


def test_the_last_checkpoint_must_arrive(training, wanted, tmp_path):
    """What a saver fails at ends no run before its end, and there it does."""
    ended = run_job(training.job(tmp_path, functools.partial(deny, "latest")), tmp_path)
    assert ended.code == 2 and ended.said.count("LocalSaver could not save") > 6
    *_, last = ended.said.splitlines()
    assert last.startswith("fastprior: error: LocalSaver could not save ") and "No space left on device" in last
    assert last.endswith("; no checkpoint was saved before")
    state = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert same(state["model"], wanted["latest.pth"]["model"])


def train_on_a_rank(path):
    """The disk of the first process is full: both end, and neither waits for the other."""
    rank = int(os.environ["RANK"])
    if rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, 9_000))
    with pytest.raises(
        OSError, match=("process 0: " * rank) + r"\S+checkpoint.pth could not be .*File too large; no ch"
    ):
        train_diffusion_prior.train(TrainDiffusionPriorConfig.from_json_path(path), path)


def test_a_full_disk_ends_all_processes(training, tmp_path):
    job = training.job(tmp_path, **SELDOM)
    run_ranks(world=2, function=train_on_a_rank, arguments=job.args[:1], folder=tmp_path)

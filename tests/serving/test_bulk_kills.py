"""Bulk runs that are killed at any moment: no row is missing or double, and the end is that of an unbroken run."""

import functools

import numpy as np
import pytest

from helpers.bulk_cases import SIZES, embed, images, write_npy, write_parquet, write_prior, written
from helpers.kills import leftovers, run_job

OPTIONS = "--steps", 4, "--batch-size", 8, "--solver", "ddim"


class Killed:
    """A run over and over again, killed each time at another moment, and what an unbroken one leaves."""

    def __init__(self, folder, write):
        self.source, self.checkpoint = write(folder / "in"), write_prior(folder / "prior.safetensors")
        ended = run_job(self.job(folder / "whole"), folder / "whole")
        assert ended.code == 0, ended.said
        self.events, self.wanted = ended.events, written(folder / "whole")
        assert len(images(folder / "whole")) == len(SIZES) and self.events > 30

    def job(self, out):
        return functools.partial(embed, self.source, out, self.checkpoint, *OPTIONS)

    def die(self, out, kind, value) -> int:
        """Run and die: the exit code. What is there then is whole."""
        code = run_job(self.job(out), out, kind, value).code
        for name, digest in written(out).items() if out.exists() else ():
            if "tmp" not in name and ".json" not in name:  # a shard's entry is the last of it
                assert digest == self.wanted[name], name
        return code

    def end(self, out):
        """Run to the end: every file is that of the unbroken run, and there is no other."""
        ended = run_job(self.job(out), out)
        assert ended.code == 0, ended.said
        assert written(out) == self.wanted and leftovers(out) == []
        return ended.said


@pytest.fixture(scope="module", params=[write_npy, write_parquet], ids=["npy", "parquet"])
def killed(request, tmp_path_factory):
    return Killed(tmp_path_factory.mktemp("killed"), request.param)


@pytest.mark.slow
def test_killed_three_times(killed, tmp_path):
    out = tmp_path / "out"
    codes = [killed.die(out, "event", killed.events * share // 10) for share in (3, 5, 3)]
    assert codes == [-9] * 3
    assert "3 shards were there" not in killed.end(out)
    assert "wrote" in killed.end(out) and "0 rows of 0 shards; 3 shards were there" in killed.end(out)


@pytest.mark.fuzz
def test_killed_at_any_moment(killed, tmp_path):
    draw, dead = np.random.default_rng(), 0
    for number in range(5):
        out = tmp_path / f"out-{number}"
        for _ in range(4):
            kind = ("event", "time", "byte")[draw.integers(3)]
            most = dict(event=killed.events, time=0.6, byte=4_000)[kind]
            value = draw.uniform(0, most) if kind == "time" else int(draw.integers(1, most))
            print("kill", kind, value)
            dead += killed.die(out, kind, value) < 0
        killed.end(out)
    assert dead > 0

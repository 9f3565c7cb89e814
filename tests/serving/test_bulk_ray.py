"""Bulk runs on a real Ray of this machine: what they write, and actors that are killed in the middle."""

import functools
import os
import signal

import pytest

ray = pytest.importorskip("ray")

import fastprior  # noqa: E402
from fastprior.demos import digits  # noqa: E402
from fastprior.serving.bulk import Embedder, Manifest, Options, find_shards  # noqa: E402
from fastprior.serving.bulk.ray_actors import TRIES, embed_on_ray  # noqa: E402
from helpers import ROOT  # noqa: E402
from helpers.bulk_cases import embed, write_caption_files, write_npy, write_prior, written  # noqa: E402
from helpers.command_line import error_of, run  # noqa: E402
from helpers.priors import make_prior  # noqa: E402

pytestmark = pytest.mark.slow


class Dying(Embedder):
    """It kills its process in the middle of shards of some names, so many times each."""

    def dies_of(self, names, times, folder):
        self.names, self.times, self.folder = names, times, folder
        return self

    def _rows(self, shard, block, saved, bad):
        if shard.digits in self.names and block.start:
            dead = len(list(self.folder.glob(f"dead-{shard.digits}-*")))
            if dead < self.times:
                (self.folder / f"dead-{shard.digits}-{dead}").touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return super()._rows(shard, block, saved, bad)


def make_dying(names, times, folder, seed=0):
    prior = make_prior(condition_on_text_encodings=False, seed=seed)
    return Dying(prior, Options(timesteps=4), batch_size=8).dies_of(names, times, folder)


@pytest.fixture(scope="module")
def cluster():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


@pytest.fixture
def given(tmp_path, cluster):
    """Shards, and a function that makes a manifest for them."""
    shards = find_shards(write_npy(tmp_path / "in"))
    made = make_dying((), 0, tmp_path).run(shards)
    return shards, lambda name: Manifest(tmp_path / name, made)


def test_the_command(given, tmp_path, capsys):
    checkpoint = write_prior(tmp_path / "prior.safetensors")
    assert embed(tmp_path / "in", tmp_path / "plain", checkpoint) == 0
    on_ray = "embed", tmp_path / "in", tmp_path / "ray", "--checkpoint", checkpoint, "--ray", "--actors", 2
    capsys.readouterr()
    assert run(capsys, *on_ray)[:2] == (0, f"wrote {tmp_path / 'ray'}: 110 rows of 3 shards\n")
    assert written(tmp_path / "ray") == written(tmp_path / "plain")
    assert run(capsys, *on_ray)[:2] == (0, f"wrote {tmp_path / 'ray'}: 0 rows of 0 shards; 3 shards were there\n")
    said = error_of(
        capsys, "embed", tmp_path / "in", tmp_path / "x", "--checkpoint", checkpoint, "--ray", "--actors", 9
    )
    assert "actors=9; Ray has 2 cores, and each actor takes at least one" in said


def test_captions_of_a_checkpoint_that_is_named_from_here(cluster, tmp_path, capsys, monkeypatch):
    """Actors run in another folder, and make the CLIP themselves, which must be that of the manifest."""
    monkeypatch.chdir(tmp_path)
    write_caption_files(tmp_path / "in", {1: 5, 2: 3})
    prior = make_prior(dict(dim=digits.DIM, max_text_len=digits.MAX_WORDS), image_channels=1)
    fastprior.save(prior, tmp_path / "prior.safetensors", metadata=dict(text_encoder=digits.NAME))
    given = "--checkpoint", "prior.safetensors", "--steps", 4
    for out, more in (("plain", ()), ("ray", ("--ray", "--actors", 2))):
        status, said, complaints = run(capsys, "embed", "in", out, *given, *more)
        assert (status, said) == (0, f"wrote {out}: 8 rows of 2 shards\n"), complaints
    assert written(tmp_path / "ray") == written(tmp_path / "plain")


def test_killed_actors_are_replaced(given, tmp_path):
    shards, manifest = given
    wanted = embed_on_ray(functools.partial(make_dying, (), 0, tmp_path), shards, manifest("whole"), actors=1)
    assert wanted == (3, 110, 0, 0)
    make, counted = functools.partial(make_dying, ("00", "02"), TRIES - 1, tmp_path), []
    done = embed_on_ray(make, shards, manifest("out"), actors=2, begin=lambda rows: counted.append)
    assert done == wanted and sorted(counted) == [23, 37, 50]
    assert len(list(tmp_path.glob("dead-*"))) == 2 * (TRIES - 1)
    assert [manifest("out").is_done(shard) for shard in shards] == [True] * 3  # which clears what the killed left
    assert written(tmp_path / "out") == written(tmp_path / "whole")


def test_what_kills_every_actor_ends_the_run(given, tmp_path):
    shards, manifest = given
    with pytest.raises(ValueError, match=f"text_emb_02.npy: {TRIES} actors died of it"):
        embed_on_ray(functools.partial(make_dying, ("02",), 99, tmp_path), shards, manifest("out"), actors=1)
    assert len(list(tmp_path.glob("dead-*"))) == TRIES


def test_actors_refuse_other_weights_and_say_what_is_wrong(given, tmp_path):
    shards, manifest = given
    with pytest.raises(ValueError, match="out was made with weights"):
        embed_on_ray(functools.partial(make_dying, (), 0, tmp_path, 1), shards, manifest("out"), actors=1)
    path = tmp_path / "in/text_emb/text_emb_02.npy"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match="text_emb_02.npy: has [0-9]+ bytes, and had"):
        embed_on_ray(functools.partial(make_dying, (), 0, tmp_path), shards, manifest("out"), actors=1)
    with pytest.raises(ValueError, match="actors=1; Ray has 0 GPUs"):
        embed_on_ray(make_dying, shards, manifest("other"), device="cuda")

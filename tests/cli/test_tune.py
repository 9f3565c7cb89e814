"""`fastprior tune`: a table in the checkpoint, which the other commands run; and checkpoints that stay as they were."""

import json

import numpy as np
import pytest
import torch

import fastprior
from fastprior.checkpoints.dalle2 import save_peer
from fastprior.prior import tuning
from helpers.command_line import error_of, run
from helpers.learned import assert_same_tables, with_table
from helpers.priors import make_prior, make_text

NET = dict(dim=16, depth=1, dim_head=8, heads=2, max_text_len=5)
SMALL = dict(STEPS=36, WITH_TIMES=18, JUDGED_EVERY=6, BATCHES=4, BATCH_ROWS=24, JUDGED_ROWS=48, ODE_EVALUATIONS=40)


@pytest.fixture
def files(tmp_path, monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setattr(tuning, name, value)
    prior = make_prior(NET, timesteps=40, predict_v=True)
    fastprior.save(with_table(prior), tmp_path / "prior.safetensors", metadata={"a": 1})
    for name, text in make_text(12, 16).items():
        np.save(tmp_path / f"{name}.npy", text.numpy())
    return tmp_path


def prompts(folder):
    return "--text-embed", folder / "text_embed.npy", "--text-encodings", folder / "text_encodings.npy"


def arguments(folder, command="tune", name="prior.safetensors"):
    return command, "--checkpoint", folder / name, *prompts(folder)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_tune_and_use(capsys, files, monkeypatch):
    monkeypatch.setattr(tuning, "judge", lambda *_: None)  # which has its own tests
    before = fastprior.load(files / "prior.safetensors")
    status, printed, err = run(capsys, *arguments(files), "--evaluations", 3, "--scales", 1, "1.2:1.5")
    assert status == 0 and not err and f"wrote {files / 'prior.safetensors'}" in printed, err
    prior = fastprior.load(files / "prior.safetensors")
    table = prior.learned_tables[3]
    assert table.scales == ((1, 1), (1.2, 1.5)) and sorted(prior.learned_tables) == [3, 5]
    assert_same_tables({5: prior.learned_tables[5]}, before.learned_tables)
    assert prior.load_report.metadata == {"a": 1}
    for one in table.held_out:
        for name, cosines in (("dpm++:logsnr", one.untuned), ("learned", one.learned)):
            assert " ".join([f"{one.cond_scale:g}", name, *(f"{value:.5f}" for value in cosines)]) in " ".join(
                printed.split()
            )
    out = files / "embeds.npy"
    sampling = "--solver", "learned", "--steps", 3, "--cond-scale", 1.4, "--samples-per-prompt", 1, "--seed", 4
    assert run(capsys, *arguments(files, "sample"), *sampling, "--out", out)[0] == 0
    text = {name: torch.from_numpy(np.load(files / f"{name}.npy")) for name in ("text_embed", "text_encodings")}
    draw = torch.Generator().manual_seed(4)
    wanted = prior.sample(
        **text, num_samples_per_batch=1, timesteps=3, cond_scale=1.4, solver="learned", generator=draw
    )
    assert np.array_equal(np.load(out), wanted.numpy())
    figures = files / "figures.json"
    ways = "--solvers", "learned", "dpm++:logsnr"
    measured = "--evaluations", 3, "--scales", 1.2, "--samples", 2, "--out", figures
    status, _, err = run(capsys, *arguments(files, "quality"), *ways, *measured)
    assert status == 0, err
    rows = {row["way"]: row for row in json.loads(figures.read_text())["rows"]}
    assert rows["learned"]["cosine_median"] > rows["dpm++:logsnr"]["cosine_median"]
    timed = "--solver", "learned", "--timesteps", 3, "--batch-size", 1, "--runs", 2, "--eager", "--no-peer"
    status, printed, err = run(capsys, "bench", "--checkpoint", files / "prior.safetensors", *timed)
    assert status == 0 and "3 steps" in printed, err


@pytest.mark.slow
def test_another_file(capsys, files, monkeypatch):
    monkeypatch.setattr(tuning, "judge", lambda *_: None)
    save_peer(fastprior.load(files / "prior.safetensors"), files / "peer.pth")
    config = files / "config.json"
    config.write_text(json.dumps({"net": NET, "prior": dict(predict_v=True, timesteps=40, cond_drop_prob=0.2,
                                                             image_embed_dim=16)}))  # fmt: skip
    before = contents(files)
    status, _, err = run(capsys, *arguments(files, name="peer.pth"), "--evaluations", 3)
    assert status == 2 and "peer.pth does not record how to build its prior: only a file of fastprior.save" in err
    out = files / "out.safetensors"
    status, _, err = run(capsys, *arguments(files, name="peer.pth"), "--evaluations", 3, "--out", out)
    assert status == 0, err
    after = contents(files)
    assert after.pop("out.safetensors") and after == before
    prior = fastprior.load(out)
    assert list(prior.learned_tables) == [3] and prior.sampling_plan(3, solver="learned").table.solver == "learned"


@pytest.mark.parametrize("stop, status, message", [
    (KeyboardInterrupt, 130, "interrupted"), (ValueError("too bad"), 2, "error: too bad"),
])  # fmt: skip
def test_a_fit_that_ends_early_leaves_the_checkpoint(capsys, files, monkeypatch, stop, status, message):
    before, calls, loss = contents(files), [], tuning._Fit._loss

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 9:
            raise stop
        return loss(*args)

    monkeypatch.setattr(tuning._Fit, "_loss", interrupted)
    got, _, err = run(capsys, *arguments(files), "--evaluations", 3)
    assert got == status and message in err and len(calls) == 9 and contents(files) == before


def test_a_table_that_is_no_better_is_not_written(capsys, files, monkeypatch):
    monkeypatch.setattr(tuning, "STEPS", 0)
    before = contents(files)
    error = error_of(capsys, *arguments(files), "--evaluations", 3)
    assert "no table of 3 evaluations was learned that is better than dpm++ at logsnr times" in error
    assert contents(files) == before


@pytest.mark.parametrize("argv, message", [
    (["--evaluations", "1"], "--evaluations 1: it must be at least 2"),
    (["--evaluations", "41"], "evaluations=41; it must be at most 40"),
    (["--evaluations", "3", "--scales", "4:1"], "scales=1.0; it must be a finite number and at least 4.0"),
    (["--evaluations", "3", "--scales", "nan"], "scales=nan"),
    (["--evaluations", "3", "--out", "prior.pth"], "--out prior.pth: it must end in .safetensors"),
    (["--evaluations", "3", "a caption"], "give either captions or --text-embed"),
])  # fmt: skip
def test_errors_are_one_line(capsys, files, argv, message):
    assert message in error_of(capsys, *arguments(files), *argv)


@pytest.mark.parametrize("scales", ["wide", "1:", ":2", "1:2:3"])
def test_scales_that_are_none(capsys, files, scales):
    status, _, err = run(capsys, *arguments(files), "--evaluations", 3, "--scales", scales)
    assert status == 2 and "is no number and no range such as 1:4" in err

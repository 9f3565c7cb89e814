"""`fastprior quality`: its table, its files, and what it refuses."""

import json

import numpy as np
import pytest
import torch

import fastprior
from helpers.command_line import error_of, run
from helpers.priors import make_prior, make_text

NET = dict(dim=16, depth=1, dim_head=8, heads=2, max_text_len=5)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quality")
    fastprior.save(make_prior(NET, timesteps=10), folder / "prior.safetensors")
    text = make_text(4, 16)
    for name in text:
        np.save(folder / f"{name}.npy", text[name].numpy())
    np.save(folder / "images.npy", torch.randn(4, 16).numpy())
    return folder


def arguments(folder):
    prompts = "--text-embed", folder / "text_embed.npy", "--text-encodings", folder / "text_encodings.npy"
    return "quality", "--checkpoint", folder / "prior.safetensors", *prompts


def test_a_table_and_its_figures(capsys, tmp_path, files):
    options = "--solvers", "ddim", "dpm++:logsnr", "--evaluations", 2, 5, "--scales", 1, 2.5, "--samples", 3
    out = tmp_path / "figures.json"
    status, printed, err = run(capsys, *arguments(files), *options, "--image-embed", files / "images.npy", "--out", out)
    assert status == 0 and not err, err
    for scale in ("1", "2.5"):
        assert f"cond_scale {scale}: energy distance to ddpm 10, x1000" in printed
    report = json.loads(out.read_text())
    rows = report["rows"]
    assert [(row["cond_scale"], row["way"], row["evaluations"]) for row in rows] == [
        (scale, way, count)
        for scale in (1, 2.5)
        for way, count in (("ddpm", 10), ("ddim", 2), ("ddim", 5), ("dpm++:logsnr", 2), ("dpm++:logsnr", 5))
    ]
    lines = [line for line in printed.splitlines() if line.startswith(("  d", "* d"))]
    assert len(lines) == len(rows)
    for line, row in zip(lines, rows):
        mark, (way, evaluations, distance, *_) = line[0], line[1:].split()
        assert (mark == "*") == row["is_frontier"] and (way, int(evaluations)) == (row["way"], row["evaluations"])
        assert distance == f"{row['distance']:.3f}" and f"{row['similarity']:.3f}" in line
        assert (f"{row['cosine_median']:.3f}" in line) if way.startswith("dpm++") else row["cosine_median"] is None
    assert report["samples"] == 3 and report["seed"] == 0


@pytest.mark.slow
def test_a_picture(capsys, tmp_path, files):
    image = pytest.importorskip("matplotlib.image")
    out = tmp_path / "picture.png"
    options = "--solvers", "dpm++", "sde-dpm++:karras", "--evaluations", 2, 4, "--samples", 2, "--scales", 1, 3
    status, printed, _ = run(capsys, *arguments(files), *options, "--out", out)
    assert status == 0 and f"wrote {out}" in printed
    pixels = image.imread(out)
    assert pixels.shape[1] > pixels.shape[0] and len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 50


@pytest.mark.parametrize("argv, message", [
    (["--out", "figures.txt"], "--out figures.txt: it must end in .json, .png, .svg or .pdf"),
    (["--solvers", "euler"], "solver='euler'"),
    (["--solvers", "ddim:logsnr"], "spacing='logsnr'"),
    (["--evaluations", "0"], "--evaluations 0: it must be at least 1"),
    (["--evaluations", "10"], "evaluations=10; it must be at most 9"),
    (["--samples", "1"], "--samples 1: it must be at least 2"),
    (["--scales", "nan"], "--cond-scale nan"),
    (["a caption"], "give either captions or --text-embed"),
    (["--image-embed", "nowhere.npy"], "nowhere.npy does not exist"),
])  # fmt: skip
def test_errors_are_one_line(capsys, files, argv, message):
    assert message in error_of(capsys, *arguments(files), *argv)

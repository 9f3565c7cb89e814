"""What fewer evaluations cost a pipeline: what is measured, from ready encodings and from a folder, and what is not."""

import json
import math

import pytest
import torch

import fastprior
from fastprior.diffusion.diffusers_schedules import DiffusersSchedule
from fastprior.pipelines import pipeline_quality as quality
from fastprior.pipelines.prior_pipeline import PriorPipeline
from fastprior.pipelines.text_encoding import TextEncoding
from fastprior.prior.sampling_quality import Way
from helpers.command_line import error_of, run
from helpers.pt_cases import CONFIG

TIMESTEPS = 12


def make_pipeline(kind: str = "UnCLIPScheduler", **config) -> PriorPipeline:
    torch.manual_seed(0)
    prior = fastprior.PriorTransformer(**CONFIG)
    with torch.no_grad():
        for weight in prior.parameters():
            weight.normal_(std=0.2)
    config = dict(num_train_timesteps=TIMESTEPS, prediction_type="sample", clip_sample_range=5.0) | config
    return PriorPipeline(prior.eval(), DiffusersSchedule(kind, **config))


def make_encoding(prompts: int, seed: int = 0) -> TextEncoding:
    draw, dim, length = torch.Generator().manual_seed(seed), CONFIG["embedding_dim"], CONFIG["num_embeddings"]
    embeds, encodings = torch.randn(prompts, dim, generator=draw), torch.randn(prompts, length, dim, generator=draw)
    return TextEncoding(embeds, encodings, torch.ones(prompts, length, dtype=torch.bool))


@pytest.mark.slow
def test_what_is_measured():
    pipeline, text, null = make_pipeline(), make_encoding(5), make_encoding(1, seed=1)
    ways, options = ("scheduler", "dpm++", "sde-dpm++:logsnr"), dict(samples=6, progress=False)
    rows = fastprior.pipeline_quality(
        pipeline, text, null, ways=ways, evaluations=(3, 11), guidance_scales=(1.0, 4.0), **options
    )
    runs = [("ddim_trailing:trailing:eta=1", TIMESTEPS), *((way, count) for way in ways for count in (3, 11))]
    assert [(row.cond_scale, str(row.way), row.evaluations) for row in rows] == [
        (scale, *run) for scale in (1.0, 4.0) for run in runs
    ]
    for row in rows:
        assert math.isfinite(row.distance) and row.error > 0 and row.milliseconds > 0
        assert (row.cosine_median is None) == (str(row.way) != "dpm++")
    assert all(a.distance != b.distance for a, b in zip(rows[: len(runs)], rows[len(runs) :])), "guidance did nothing"
    assert any(row.is_frontier for row in rows[: len(runs)])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["UnCLIPScheduler", "DDPMScheduler"])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_all_steps_of_an_ancestral_scheduler_are_as_the_long_run(kind, scale):
    """And the clamp of the scheduler is that of the long run."""
    pipeline, text, null = make_pipeline(kind, clip_sample_range=1.5), make_encoding(40), make_encoding(1, seed=1)
    ways, options = ("scheduler", "dpm++"), dict(evaluations=(TIMESTEPS,), samples=12, progress=False)
    chance, own, ode = quality.pipeline_quality(pipeline, text, null, ways=ways, guidance_scales=(scale,), **options)
    assert abs(chance.distance) < 4 * chance.error and abs(own.distance) < 4 * own.error
    assert ode.cosine_worst == pytest.approx(1, abs=1e-5)


def test_a_run_is_a_call_of_the_pipeline():
    pipeline, text, null = make_pipeline(), make_encoding(3), make_encoding(1, seed=1)
    runs = quality.PipelineRuns(pipeline, text, null, 2, 4.0, 0)
    for way in map(Way.parse, ("scheduler", "dpm++:logsnr", "ddim_trailing:karras:eta=0.5")):
        got = runs.run(slice(1, 3), 2, way, 5, seed=3)
        solver = dict(solver=way.solver, spacing=way.spacing, eta=way.eta or 0) if way.spacing else {}
        part = TextEncoding(*(t[1:3] for t in text))
        wanted = pipeline(
            part, null, num_images_per_prompt=2, num_inference_steps=5, guidance_scale=4.0,
            generator=torch.Generator().manual_seed(3), zero_embed=torch.zeros(1, CONFIG["embedding_dim"]), **solver,
        )  # fmt: skip
        assert torch.equal(got, wanted.image_embeds)


def test_evaluations_of_a_scheduler_with_two_a_step():
    pipeline = make_pipeline("HeunDiscreteScheduler")
    heun = Way("scheduler")
    assert quality.steps_of(pipeline, heun, 9) == 5 and quality.steps_of(pipeline, Way("dpm++"), 9) == 9
    with pytest.raises(ValueError, match="evaluations=8; with scheduler they must be odd"):
        quality.pipeline_quality(pipeline, make_encoding(2), ways=("scheduler",), evaluations=(8,), progress=False)


@pytest.mark.parametrize("change, message", [
    (dict(samples=1), "samples=1"), (dict(ways=()), "ways=\\[\\]"), (dict(evaluations=(13,)), "evaluations=13"),
    (dict(guidance_scales=(math.nan,)), "cond_scales=nan"), (dict(ways=("ddim",)), "solver='ddim'"),
    (dict(ways=("ddpm",)), "solver='ddpm'"), (dict(ways=("scheduler:logsnr",)), "spacing='logsnr'"),
    (dict(image_embed=torch.zeros(4, 20)), "image_embed has shape \\(4, 20\\); it must be \\(3, 20\\)"),
])  # fmt: skip
def test_arguments_that_do_not_fit_are_refused_before_anything_runs(monkeypatch, change, message):
    pipeline = make_pipeline()
    monkeypatch.setattr(PriorPipeline, "__call__", None)
    options = dict(ways=("dpm++",), evaluations=(2,), progress=False) | change
    with pytest.raises(ValueError, match=message):
        quality.pipeline_quality(pipeline, make_encoding(3), **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    from helpers.pipeline_cases import KARLO, make_parts

    path = tmp_path_factory.mktemp("pipeline")
    parts = make_parts(path / "tokenizer-files")
    parts["scheduler"] = diffusers.UnCLIPScheduler(**KARLO, num_train_timesteps=TIMESTEPS)
    diffusers.KandinskyV22PriorPipeline(**parts).save_pretrained(path / "folder")
    return path / "folder"


@pytest.mark.slow
def test_the_command_takes_a_folder(capsys, tmp_path, folder):
    out = tmp_path / "figures.json"
    options = "--evaluations", 3, "--scales", 1, 4, "--samples", 2, "--out", out
    status, printed, _ = run(capsys, "quality", "--checkpoint", folder, "red fox", "cat", "a dog", *options)
    assert status == 0
    assert "cond_scale 4: energy distance to ddim_trailing:trailing:eta=1 12, x1000" in printed
    ways = ["ddim_trailing:trailing:eta=1", "scheduler", "dpm++:trailing", "dpm++:logsnr", "sde-dpm++:logsnr"]
    assert [row["way"] for row in json.loads(out.read_text())["rows"]] == 2 * ways


def test_embeddings_do_not_go_with_a_folder(capsys, folder):
    message = "--text-embed x.npy: a pipeline's folder holds what encodes captions; it must not be given"
    assert message in error_of(capsys, "quality", "--checkpoint", folder, "--text-embed", "x.npy")

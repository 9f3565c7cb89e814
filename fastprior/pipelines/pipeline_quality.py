"""What fewer evaluations cost a pipeline's prior, as `fastprior.prior.sampling_quality` measures it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from fastprior.checks import check_count
from fastprior.pipelines.parts import listed
from fastprior.pipelines.prior_pipeline import PriorPipeline
from fastprior.pipelines.text_encoding import TextEncoding
from fastprior.prior.sampling_quality import SCHEDULER, Measured, Runs, Way, check, chosen, measure

WAYS = tuple(map(Way.parse, (SCHEDULER, "dpm++:trailing", "dpm++:logsnr", "sde-dpm++:logsnr")))


class PipelineRuns(Runs):
    """Runs of a `PriorPipeline` for encoded texts, guided away from another where there is guidance."""

    long = Way("ddim_trailing", "trailing", 1.0)  # over all the schedule: DDPM, whatever the scheduler

    def __init__(
        self,
        pipeline: PriorPipeline,
        text: TextEncoding,
        null: TextEncoding | None,
        samples: int,
        cond_scale: float,
        seed: int,
    ):
        super().__init__(len(text.embeds), samples, cond_scale, seed)
        self.pipeline, self.text, self.null, self.timesteps = pipeline, text, null, pipeline.schedule.timesteps
        self.zero_embed = torch.zeros(1, pipeline.prior.config["embedding_dim"])  # so that no image is encoded

    def run(self, part: slice, samples: int, way: Way, evaluations: int, seed: int) -> Tensor:
        return self.pipeline(
            TextEncoding(*(t[part] for t in self.text)),
            self.null,
            num_images_per_prompt=samples,
            num_inference_steps=steps_of(self.pipeline, way, evaluations),
            guidance_scale=self.cond_scale,
            generator=torch.Generator(self.pipeline.device).manual_seed(seed),
            zero_embed=self.zero_embed,
            **_options(way),
        ).image_embeds


def _options(way: Way) -> dict:
    return dict(solver=None if way.solver == SCHEDULER else way.solver, spacing=way.spacing, eta=way.eta or 0.0)


def steps_of(pipeline: PriorPipeline, way: Way, evaluations: int) -> int:
    """`num_inference_steps` of so many evaluations. Raises ValueError where no number of steps has as many."""
    twice = way.solver == SCHEDULER and pipeline.schedule.kind == "HeunDiscreteScheduler"
    steps = (evaluations + 1) // 2 if twice else evaluations
    found = len(pipeline.schedule.table(steps, **_options(way)))
    if found != evaluations:
        raise ValueError(f"evaluations={evaluations}; with {way} they must be odd: each step but the last has two")
    return steps


def pipeline_quality(
    pipeline: PriorPipeline,
    prompt: str | list[str] | TextEncoding,
    negative_prompt: str | TextEncoding | None = None,
    *,
    ways: Sequence[Way | str] = WAYS,
    evaluations: Sequence[int] | None = None,
    guidance_scales: Sequence[float] = (1.0,),
    samples: int = 16,
    image_embed: Tensor | None = None,
    seed: int = 0,
    progress: bool = True,
) -> list[Measured]:
    """Measure how near to the distribution of a long run a pipeline samples, by solver and number of evaluations.

    All are held against two ancestral runs over the whole schedule, "ddim_trailing:trailing:eta=1".

    Args:
        prompt: 50 or more, as texts or encoded.
        negative_prompt: what guidance leads away from, instead of the empty text.
        ways: "scheduler", the pipeline's own, and solvers with their spacings; see `Way`.
        evaluations, samples, image_embed, seed, progress: see `sampling_quality`.
        guidance_scales: none at 1 and below; each is a table of its own.
    Returns:
        see `sampling_quality`.
    Raises:
        ValueError, TypeError: naming the argument, its value and the rule.
    """
    total, dim = pipeline.schedule.timesteps, pipeline.prior.config["embedding_dim"]
    ways, evaluations = chosen(ways, evaluations, total)
    prompts = len(prompt.embeds if isinstance(prompt, TextEncoding) else listed("prompt", prompt))
    check(ways, evaluations, guidance_scales, samples, image_embed, (prompts, dim))
    wanted = list(itertools.product(ways, evaluations))
    for way, count in wanted:
        check_count("evaluations", count, most=total)
        steps_of(pipeline, way, count)
    text = prompt if isinstance(prompt, TextEncoding) else pipeline.encode_text(prompt)
    if any(scale > 1 for scale in guidance_scales) and not isinstance(negative_prompt, TextEncoding):
        negative_prompt = pipeline.encode_text(negative_prompt or "")
    return measure(
        lambda scale: PipelineRuns(pipeline, text, negative_prompt if scale > 1 else None, samples, scale, seed),
        wanted, guidance_scales, image_embed, progress,
    )  # fmt: skip

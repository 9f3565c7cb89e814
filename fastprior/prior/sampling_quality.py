"""What fewer evaluations cost: how far samples lie from those of a long run, and how long they take."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from fastprior.batches import map_rows
from fastprior.checks import check_choice, check_count, check_number
from fastprior.diffusion.solvers import LEARNED, SOLVERS, STOCHASTIC
from fastprior.prior.diffusion_prior import DiffusionPrior
from fastprior.prior.evaluate import retrieval_ranks

EVALUATIONS = 4, 6, 8, 12, 16, 25, 64
ROWS = 4096  # embeddings of a run: more would only take memory
SCHEDULER = "scheduler"
TIMED = 5  # runs of one prompt


class Way(NamedTuple):
    """A solver, the spacing of its times, and the noise of DDIM: "dpm++:logsnr", "ddim_trailing:karras:eta=0".

    Of a pipeline "scheduler" is its own.
    """

    solver: str
    spacing: str | None = None
    eta: float | None = None

    @classmethod
    def parse(cls, text: str) -> Way:
        """Read one as it is printed. Raises ValueError for an unknown solver, or a part that is none."""
        solver, *rest = text.split(":")
        check_choice("solver", solver, (*SOLVERS, LEARNED, SCHEDULER))
        etas = [part.removeprefix("eta=") for part in rest if part.startswith("eta=")]
        spacings = [part for part in rest if not part.startswith("eta=")]
        try:
            (eta,), (spacing,) = [*map(float, etas), *[None] * (not etas)], spacings or [None]
        except ValueError:
            raise ValueError(
                f"solver={text!r}; it must be SOLVER, SOLVER:SPACING or SOLVER:SPACING:eta=NUMBER"
            ) from None
        return cls(solver, spacing, eta)

    def __str__(self) -> str:
        return ":".join(
            [self.solver, *filter(None, [self.spacing]), *([] if self.eta is None else [f"eta={self.eta:g}"])]
        )

    def steps(self, evaluations: int) -> int:
        """`timesteps` of a run that evaluates the network so often."""
        return evaluations + (self.solver == "ddim")

    @property
    def is_deterministic(self) -> bool:
        return self.solver in ("dpm++", LEARNED) or (self.solver in STOCHASTIC and self.eta == 0)


EXACT = Way("dpm++", "trailing")  # over all the schedule: the solution of the ODE
WAYS = tuple(map(Way.parse, ("ddim", "dpm++:trailing", "dpm++:logsnr", "sde-dpm++:logsnr")))


@dataclass
class Measured:
    """A way to sample, and what it gives.

    Attributes:
        cond_scale, way, evaluations: the run. With guidance an evaluation is of both branches.
        distance: unbiased energy distance to the long runs, x1000, mean over the prompts; 0 is equal, and a little less
            than 0 may be found. See `energy_distance`.
        error: its standard error, over the prompts.
        milliseconds: of a run for one prompt, in the median.
        cosine_median, cosine_worst: to the solution of the ODE from the same noise; None with noise in the steps.
        similarity: mean cosine to the prompt's image, where images were given.
        median_rank: of that image among all, by similarity with the first sample of the prompt, from 1.
        is_frontier: whether nothing of the same scale was measured that is nearer and faster.
    """

    cond_scale: float
    way: Way
    evaluations: int
    distance: float
    error: float
    milliseconds: float = math.nan
    cosine_median: float | None = None
    cosine_worst: float | None = None
    similarity: float | None = None
    median_rank: float | None = None
    is_frontier: bool = False


def energy_distance(one: Tensor, other: Tensor) -> Tensor:
    """The unbiased energy distance of samples to others, prompt by prompt: 2 E|x - y| - E|x - x'| - E|y - y'|.

    Its expectation is 0 where both are of the same distribution, and greater otherwise (Székely & Rizzo 2013).

    Args:
        one, other: (prompts, n, dim) and (prompts, m, dim), floats; n and m at least 2.
    Returns:
        (prompts,), fp64.
    Raises:
        ValueError: other shapes.
    """
    fits = one.ndim == other.ndim == 3 and one.shape[::2] == other.shape[::2]
    if not fits or one.shape[1] < 2 or other.shape[1] < 2:
        shapes = f"{tuple(one.shape)} and {tuple(other.shape)}"
        raise ValueError(f"one and other have shapes {shapes}; they must be (prompts, n, dim), n at least 2")
    one, other = one.double(), other.double()

    def within(x: Tensor) -> Tensor:
        n = x.shape[1]
        return _distances(x, x).sum(dim=(1, 2)) / (n * (n - 1))

    return 2 * _distances(one, other).mean(dim=(1, 2)) - within(one) - within(other)


def _distances(one: Tensor, other: Tensor) -> Tensor:
    """(prompts, n, m); of a row to itself exactly 0."""
    return torch.cdist(one, other, compute_mode="donot_use_mm_for_euclid_dist")


class Runs(ABC):
    """Runs for the same prompts, `samples` of each, at one scale of guidance; a family of priors says how it runs.

    Attributes:
        long: the way of the runs over all the schedule that others are held against.
        timesteps: of the schedule.
    """

    long: Way
    timesteps: int

    def __init__(self, prompts: int, samples: int, cond_scale: float, seed: int):
        self.prompts, self.samples, self.cond_scale, self.seed = prompts, samples, cond_scale, seed
        self.chunk = max(1, ROWS // samples)

    @abstractmethod
    def run(self, part: slice, samples: int, way: Way, evaluations: int, seed: int) -> Tensor:
        """Embeddings (prompts * samples, dim) for a part of the prompts, those of a prompt together."""

    def sample(self, way: Way, evaluations: int, stream: int = 0) -> Tensor:
        """Embeddings of length 1, (prompts, samples, dim) fp32; another stream has other noise, all ways the same."""
        parts = []
        for start in range(0, self.prompts, self.chunk):
            part, seed = slice(start, start + self.chunk), self.seed_of(stream, start)
            parts.append(self.run(part, self.samples, way, evaluations, seed))
        return F.normalize(torch.cat(parts).float(), dim=-1).view(self.prompts, self.samples, -1)

    def seed_of(self, stream: int, start: int) -> int:
        """The seed of the noise of prompts from `start` on."""
        return int(np.random.SeedSequence((self.seed, stream, start)).generate_state(1, np.uint64)[0] >> 1)

    def time(self, rows: Sequence[Measured]) -> None:
        """Time a run of each for one prompt, prefill included, and mark the frontier.

        The times are medians of runs in turns, after one that is not timed.
        """
        taken: list[list[float]] = [[] for _ in rows]
        for _ in range(1 + TIMED):
            for row, seconds in zip(rows, taken):
                begin = time.perf_counter()
                self.run(slice(1), 1, row.way, row.evaluations, self.seed).cpu()
                seconds.append(time.perf_counter() - begin)
        for row, (_, *seconds) in zip(rows, taken):
            row.milliseconds = 1e3 * statistics.median(seconds)
        for row in rows:
            nearer = (other for other in rows if other.distance <= row.distance and other is not row)
            row.is_frontier = not any(other.milliseconds <= row.milliseconds for other in nearer)


class PriorRuns(Runs):
    """Runs of a `DiffusionPrior`, as `sampling_quality` takes it."""

    long = Way("ddpm")

    def __init__(self, prior: DiffusionPrior, text_cond: dict, samples: int, cond_scale: float, seed: int):
        super().__init__(len(text_cond["text_embed"]), samples, cond_scale, seed)
        self.prior, self.text_cond, self.timesteps = prior, text_cond, prior.noise_scheduler.num_timesteps

    def run(self, part: slice, samples: int, way: Way, evaluations: int, seed: int) -> Tensor:
        text = map_rows(self.text_cond, itemgetter(part))
        shape = len(text["text_embed"]) * samples, self.prior.image_embed_dim
        options = {name: value for name, value in way._asdict().items() if value is not None}
        generator = torch.Generator(self.prior.device).manual_seed(seed)
        options |= dict(timesteps=way.steps(evaluations), generator=generator, progress=False)
        return self.prior.p_sample_loop(shape, text, cond_scale=self.cond_scale, **options)


def measure(
    runs_at: Callable[[float], Runs],
    wanted: Sequence[tuple[Way, int]],
    cond_scales: Sequence[float],
    image_embed: Tensor | None = None,
    progress: bool = True,
) -> list[Measured]:
    """What `sampling_quality` returns, of the runs of a family at each scale: ways, and how often each evaluates."""
    found: list[Measured] = []
    with tqdm(unit="evaluation", disable=not progress) as bar:

        def sample(runs: Runs, way: Way, count: int, stream: int = 0) -> Tensor:
            bar.set_description(f"{way} {count}")
            embeds = runs.sample(way, count, stream)
            bar.update(count)
            return embeds

        for scale in cond_scales:
            runs = runs_at(scale)
            long, total = runs.long, runs.timesteps
            bar.total = len(cond_scales) * (3 * total + sum(count for _, count in wanted))
            one, other = (sample(runs, long, total, stream) for stream in (1, 2))
            both, solution = torch.cat((one, other), dim=1), sample(runs, EXACT, total)
            rows = [_measured(scale, long, total, one, other, None, image_embed)]
            for way, count in wanted:
                near = solution if way.is_deterministic else None
                rows.append(_measured(scale, way, count, sample(runs, way, count), both, near, image_embed))
            runs.time(rows)
            found += rows
    return found


def sampling_quality(
    prior: DiffusionPrior,
    text_cond: dict,
    *,
    ways: Sequence[Way | str] = WAYS,
    evaluations: Sequence[int] | None = None,
    cond_scales: Sequence[float] = (1.0,),
    samples: int = 16,
    image_embed: Tensor | None = None,
    seed: int = 0,
    progress: bool = True,
) -> list[Measured]:
    """Measure how near to DDPM's own distribution a prior samples, by solver and number of evaluations.

    All are held against two long runs, DDPM over the whole schedule; what lies between these two is what chance alone
    gives. Embeddings are compared by direction, as CLIP's are. See `pipeline_quality` for a `PriorPipeline`.

    Args:
        prior: in eval mode.
        text_cond: of prompts that matter, 50 or more: a dict as `DiffusionPrior.p_sample_loop` takes it.
        ways: solvers with their spacings, such as "dpm++:logsnr"; see `Way`.
        evaluations: of the network, up to the schedule's timesteps ("ddim" takes one less than its `timesteps`); by
            default those of EVALUATIONS that are less.
        cond_scales: guidance; each is a table of its own, as each has another distribution.
        samples: of each prompt, at least 2.
        image_embed: (prompts, dim), the images of the prompts, if there are any to be compared with.
        seed: of the noise; the global random generators are not touched.
        progress: show a bar.
    Returns:
        For each scale one long run held against the other, of which `way` is "ddpm", and what was asked for, in order.
    Raises:
        ValueError: naming the argument, its value and the rule.
    """
    total = prior.noise_scheduler.num_timesteps
    ways, evaluations = chosen(ways, evaluations, total)
    if prior.training:
        raise ValueError("prior.training=True; it must be in eval mode: call prior.eval()")
    prompts = len(text_cond["text_embed"])
    check(ways, evaluations, cond_scales, samples, image_embed, (prompts, prior.image_embed_dim))
    prior.check_text_condition((prompts * samples, prior.image_embed_dim), text_cond)
    for way, count, scale in itertools.product(ways, evaluations, cond_scales):
        check_count("evaluations", count, most=total - way.steps(0))
        prior.sampling_plan(way.steps(count), scale, way.solver, way.eta, spacing=way.spacing)
    wanted = list(itertools.product(ways, evaluations))
    return measure(
        lambda scale: PriorRuns(prior, text_cond, samples, scale, seed), wanted, cond_scales, image_embed, progress
    )


def chosen(
    ways: Sequence[Way | str], evaluations: Sequence[int] | None, timesteps: int
) -> tuple[list[Way], Sequence[int]]:
    """Ways as such, and numbers of evaluations, by default those of EVALUATIONS below the schedule's timesteps."""
    ways = [way if isinstance(way, Way) else Way.parse(way) for way in ways]
    return ways, [count for count in EVALUATIONS if count < timesteps] if evaluations is None else evaluations


def check(
    ways: Sequence[Way],
    evaluations: Sequence[int],
    cond_scales: Sequence[float],
    samples: int,
    image_embed: Tensor | None,
    images: tuple[int, int],
) -> None:
    """Raise ValueError for what no family can measure; `images` is the shape of the images of all prompts."""
    check_count("samples", samples, least=2)
    for name, values in (("ways", ways), ("evaluations", evaluations), ("cond_scales", cond_scales)):
        if not len(values):
            raise ValueError(f"{name}={values!r}; it must not be empty")
    for scale in cond_scales:
        check_number("cond_scales", scale)
    if image_embed is not None and image_embed.shape != images:
        raise ValueError(
            f"image_embed has shape {tuple(image_embed.shape)}; it must be {images}, an image of each prompt"
        )


def _measured(
    cond_scale: float,
    way: Way,
    evaluations: int,
    embeds: Tensor,
    teacher: Tensor,
    solution: Tensor | None,
    image_embed: Tensor | None,
) -> Measured:
    distance = 1e3 * energy_distance(embeds, teacher)
    error = (distance.std() / len(distance) ** 0.5).item() if len(distance) > 1 else math.nan
    row = Measured(cond_scale, way, evaluations, distance.mean().item(), error)
    if solution is not None:
        cosine = (embeds * solution).sum(dim=-1)
        row.cosine_median, row.cosine_worst = cosine.median().item(), cosine.min().item()
    if image_embed is not None:
        image = F.normalize(image_embed.to(embeds), dim=-1)
        row.similarity = (embeds * image[:, None]).sum(dim=-1).mean().item()
        row.median_rank = retrieval_ranks(embeds[:, 0], image).median().item()
    return row

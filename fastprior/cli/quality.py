"""`fastprior quality`: what fewer evaluations cost a checkpoint, by solver, and how long they take here."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastprior.cli import common, prompts
from fastprior.utils import atomic
from fastprior.version import __version__

if TYPE_CHECKING:
    import torch

    from fastprior.prior.sampling_quality import Measured

PICTURES = ".png", ".svg", ".pdf"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    summary = "measure what fewer evaluations cost a checkpoint, by solver, and how long they take here"
    parser = common.add_command(subparsers, "quality", run, summary)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="PATH", help="a prior's file, or the folder of a diffusers pipeline")
    prompts.add_options(parser)
    add("--image-embed", metavar="FILE.npy", help="images of the prompts (prompts, dim), to compare samples with")
    add(
        "--solvers", nargs="+", metavar="WAY",
        help="SOLVER, SOLVER:SPACING or SOLVER:SPACING:eta=NUMBER (ddim, or of a pipeline its scheduler, "
        "dpm++:trailing dpm++:logsnr sde-dpm++:logsnr)",
    )  # fmt: skip
    add("--evaluations", type=int, nargs="+", metavar="N", help="of the network (4 6 8 12 16 25 64)")
    add("--scales", type=float, nargs="+", default=[1.0], metavar="S", help="guidance; 1 is none (1)")
    add("--samples", type=int, default=16, metavar="N", help="of each prompt (%(default)s)")
    add("--seed", type=common.seed, default=0, help="of the noise (%(default)s)")
    add("--out", metavar="FILE", help="write the figures (.json), or a picture of them (.png, .svg, .pdf)")
    common.add_clip_options(parser)


def _check(args: argparse.Namespace) -> None:
    for scale in args.scales:
        common.check_cond_scale(scale)
    common.check_least(1, evaluations=args.evaluations)
    common.check_least(2, samples=args.samples)
    prompts.check(args)
    common.check_clip_and_out(args)
    if args.out and Path(args.out).suffix not in (".json", *PICTURES):
        raise ValueError(f"--out {args.out}: it must end in .json, {', '.join(PICTURES[:-1])} or {PICTURES[-1]}")


def run(args: argparse.Namespace) -> int:
    _check(args)
    rows = _of_pipeline(args) if (Path(args.checkpoint) / "prior").is_dir() else _of_prior(args)
    print(table(rows))
    if args.out and Path(args.out).suffix == ".json":
        report = dict(fastprior=__version__, checkpoint=str(args.checkpoint), samples=args.samples, seed=args.seed)
        report["rows"] = [vars(row) | dict(way=str(row.way)) for row in rows]
        with atomic(args.out) as temporary:
            temporary.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    elif args.out:
        draw(rows, args.out)
    if args.out:
        print(f"wrote {args.out}")
    return 0


def _options(args: argparse.Namespace, device: torch.device) -> dict:
    """Arguments that both families take."""
    options = dict(evaluations=args.evaluations, samples=args.samples, seed=args.seed, progress=sys.stderr.isatty())
    if args.solvers is not None:
        options["ways"] = args.solvers
    if args.image_embed:
        options["image_embed"] = prompts.load_array(args.image_embed, "--image-embed", 2, device)
    return options


def _of_prior(args: argparse.Namespace) -> list[Measured]:
    from fastprior.prior.sampling_quality import sampling_quality

    prior = common.load_prior(args)
    given = dict.fromkeys(("text", "text_embed", "text_encodings")) | prompts.load(args, prior)
    return sampling_quality(
        prior, prior.text_condition(**given), cond_scales=args.scales, **_options(args, prior.device)
    )


def _of_pipeline(args: argparse.Namespace) -> list[Measured]:
    """Measure the prior in a diffusers folder, whose encoders take the captions."""
    for name in ("text_embed", "text_encodings", "config", "clip_model"):
        if value := getattr(args, name):
            option = f"--{name.replace('_', '-')} {value}"
            raise ValueError(f"{option}: a pipeline's folder holds what encodes captions; it must not be given")
    from fastprior.pipelines.pipeline_quality import pipeline_quality
    from fastprior.pipelines.prior_pipeline import PriorPipeline

    pipeline = PriorPipeline.from_pretrained(args.checkpoint, device=common.device_of(args))
    return pipeline_quality(pipeline, args.captions, guidance_scales=args.scales, **_options(args, pipeline.device))


def table(rows: Iterable[Measured]) -> str:
    """What was measured, as text: a table for each scale, in which the frontier is marked."""
    lines = []
    for scale, part in itertools.groupby(rows, key=lambda row: row.cond_scale):
        chance, *_ = part = list(part)
        titles = ["solver", "evaluations", "distance", "+-", "ms", "cosine to ODE", "worst"]
        titles += ["similarity", "median rank"] if chance.similarity is not None else []
        cells = [titles, *([_cell(value) for value in _values(row)][: len(titles)] for row in part)]
        widths = [max(map(len, column)) for column in zip(*cells)]
        lines += [f"cond_scale {scale:g}: energy distance to {chance.way} {chance.evaluations}, x1000", ""]
        for mark, (first, *rest) in zip([" ", *("* "[not row.is_frontier] for row in part)], cells):
            right = (f"{text:>{width}}" for text, width in zip(rest, widths[1:]))
            lines.append("  ".join([f"{mark} {first:<{widths[0]}}", *right]).rstrip())
        lines.append("")
    return "\n".join([*lines, "* of what was measured, nothing is nearer and faster; the first row is chance"])


def _values(row: Measured) -> list[str | float | None]:
    values = str(row.way), row.evaluations, row.distance, row.error, row.milliseconds
    return [*values, row.cosine_median, row.cosine_worst, row.similarity, row.median_rank]


def _cell(value: str | float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def draw(rows: Sequence[Measured], path: str | os.PathLike) -> None:
    """Write a picture of distance against time, a panel for each scale; its kind is that of the suffix."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('matplotlib is not installed: pip install "fastprior[quickstart]"') from error
    scales = list(dict.fromkeys(row.cond_scale for row in rows))
    figure = Figure(figsize=(1 + 5 * len(scales), 4.5), layout="constrained")
    for axes, scale in zip(figure.subplots(1, len(scales), squeeze=False)[0], scales):
        chance, *part = [row for row in rows if row.cond_scale == scale]
        least = max(abs(chance.distance), 2 * chance.error, 1e-3)
        axes.axhspan(-least, least, color="0.9", label="chance")
        for way in dict.fromkeys(row.way for row in part):
            line = sorted((row for row in part if row.way == way), key=lambda row: row.evaluations)
            x, y, error = ([getattr(row, name) for row in line] for name in ("milliseconds", "distance", "error"))
            drawn = axes.errorbar(x, y, error, fmt="o-", markersize=4, linewidth=1, label=str(way))
            for row in line:
                point = row.milliseconds, row.distance
                axes.annotate(
                    row.evaluations, point, (3, 3), textcoords="offset points", fontsize=7, color=drawn[0].get_color()
                )
        best = sorted((row.milliseconds, row.distance) for row in part if row.is_frontier)
        axes.plot(*zip(*best), "o", markersize=9, fillstyle="none", color="black", label="nothing nearer and faster")
        axes.set_xscale("log")
        axes.set_yscale("symlog", linthresh=least)
        axes.set(title=f"cond_scale {scale:g}", xlabel="ms for one prompt", ylabel="energy distance, x1000")
        axes.legend(frameon=False, fontsize=8)
    with atomic(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix[1:], dpi=150)

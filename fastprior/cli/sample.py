"""`fastprior sample`: embeddings of captions, or of embeddings in files."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from fastprior.cli import common, prompts
from fastprior.utils import save_array

if TYPE_CHECKING:
    from fastprior import DiffusionPrior

TITLE = 100  # characters of a caption that stand over its picture


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = common.add_command(subparsers, "sample", run, "sample image embeddings for captions or text embeddings")
    add = parser.add_argument
    prompts.add_options(parser)
    add("--checkpoint", required=True, metavar="FILE", help="of a prior; old ones: see convert")
    add("--steps", type=int, default=64, help="sampling steps (%(default)s)")
    add("--cond-scale", type=float, default=1.0, help="guidance; 1 is none (%(default)s)")
    add(
        "--solver",
        help="ddpm, ddim, ddim_trailing, dpm++, sde-dpm++ or learned; by default ddpm over all steps, else ddim",
    )
    add("--spacing", help="of ddim_trailing, dpm++ and sde-dpm++: trailing, logsnr or karras; by default trailing")
    add(
        "--samples-per-prompt", type=int, default=4, metavar="N",
        help="candidates, of which the most similar to the text is kept (%(default)s)",
    )  # fmt: skip
    add("--seed", type=common.seed, help="of the noise; another each time by default")
    add("--out", metavar="FILE.npy", help="write the embeddings (prompts, dim), fp32")
    add(
        "--condition", type=common.named, action="append", default=[], metavar="NAME=VALUE",
        help="an extra condition: a number, or a vector's FILE.npy (prompts, size); any may be left out",
    )  # fmt: skip
    common.add_clip_options(parser)


def _load_conditions(prior: DiffusionPrior, named_values: list[tuple[str, str]], count: int) -> dict:
    """The values of extra conditions: a number for all prompts, or of a vector a file with a row for each."""
    import torch

    from fastprior.models.dalle2.conditions import find

    values = {}
    for name, value in named_values:
        kind = find(prior.net.conditions, name, "--condition").kind
        if kind == "vector":
            values[name] = prompts.load_array(value, f"--condition {name}", 2, prior.device)
            continue
        number, rule = (int, "an integer") if kind == "category" else (float, "a number")
        try:
            values[name] = torch.full((count,), number(value), device=prior.device)
        except ValueError:
            raise ValueError(f"--condition {name}={value}: it must be {rule}") from None
    return values


def _check(args: argparse.Namespace) -> None:
    common.check_cond_scale(args.cond_scale)
    common.check_least(1, steps=args.steps, samples_per_prompt=args.samples_per_prompt)
    prompts.check(args)
    common.check_clip_and_out(args)


def run(args: argparse.Namespace) -> int:
    _check(args)
    import torch

    prior = common.load_prior(args)
    drawn = common.is_of_digits(prior)
    if not drawn and not args.out:
        raise ValueError("give --out FILE.npy: only the quickstart's embeddings can be drawn")
    text = prompts.load(args, prior)
    count = len(args.captions or text["text_embed"])
    embeds = prior.sample(
        conditions=_load_conditions(prior, args.condition, count),
        num_samples_per_batch=args.samples_per_prompt,
        cond_scale=args.cond_scale,
        timesteps=args.steps,
        solver=args.solver,
        spacing=args.spacing,
        generator=None if args.seed is None else torch.Generator(prior.device).manual_seed(args.seed),
        progress=sys.stderr.isatty(),
        **text,
    )
    if drawn:
        from fastprior.demos import digits

        for title, embed in zip(args.captions or [f"row {i}" for i in range(count)], embeds):
            print(f"{common.brief(title, TITLE)}\n\n{digits.terminal_picture(embed[None])}\n")
    if args.out:
        save_array(args.out, embeds.float().cpu().numpy())
        print(f"wrote {args.out}: {embeds.shape[0]} embeddings of {embeds.shape[1]}")
    return 0

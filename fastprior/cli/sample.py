"""`fastprior sample`: embeddings of captions, or of embeddings in files."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from fastprior.cli import common
from fastprior.reading import open_regular
from fastprior.utils import save_array

if TYPE_CHECKING:
    import torch

    from fastprior import DiffusionPrior

TITLE = 100  # characters of a caption that stand over its picture


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = common.add_command(subparsers, "sample", run, "sample image embeddings for captions or text embeddings")
    add = parser.add_argument
    add("captions", nargs="*", metavar="CAPTION")
    add("--checkpoint", required=True, metavar="FILE", help="of a prior; old ones: see convert")
    add("--steps", type=int, default=64, help="sampling steps (%(default)s)")
    add("--cond-scale", type=float, default=1.0, help="guidance; 1 is none (%(default)s)")
    add("--solver", help="ddpm, ddim, ddim_trailing, dpm++ or sde-dpm++; by default ddpm over all steps, else ddim")
    add("--spacing", help="of the last three's steps: trailing, logsnr or karras; by default trailing")
    add(
        "--samples-per-prompt", type=int, default=4, metavar="N",
        help="candidates, of which the most similar to the text is kept (%(default)s)",
    )  # fmt: skip
    add("--seed", type=common.seed, help="of the noise; another each time by default")
    add("--out", metavar="FILE.npy", help="write the embeddings (prompts, dim), fp32")
    add("--text-embed", metavar="FILE.npy", help="text embeddings (prompts, dim) instead of captions")
    add("--text-encodings", metavar="FILE.npy", help="text encodings (prompts, length, dim)")
    add(
        "--condition", type=common.named, action="append", default=[], metavar="NAME=VALUE",
        help="an extra condition: a number, or a vector's FILE.npy (prompts, size); any may be left out",
    )  # fmt: skip
    common.add_clip_options(parser)


def _load_array(path: str, option: str, ndim: int, device: torch.device) -> torch.Tensor:
    """A .npy file as an fp32 tensor."""
    import numpy as np
    import torch

    with open_regular(path) as file:
        try:
            array = np.load(file)  # refuses pickles
        except Exception as error:  # numpy raises whatever its parser does
            raise ValueError(f"{option} {path} is not a .npy file of numbers") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f" or array.ndim != ndim:
        found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "an .npz archive"
        raise ValueError(f"{option} {path} holds {found}; it must hold a {ndim}-dimensional array of floats")
    return torch.from_numpy(array.astype(np.float32)).to(device)


def _load_conditions(prior: DiffusionPrior, named_values: list[tuple[str, str]], prompts: int) -> dict:
    """The values of extra conditions: a number for all prompts, or of a vector a file with a row for each."""
    import torch

    from fastprior.models.dalle2.conditions import find

    values = {}
    for name, value in named_values:
        kind = find(prior.net.conditions, name, "--condition").kind
        if kind == "vector":
            values[name] = _load_array(value, f"--condition {name}", 2, prior.device)
            continue
        number, rule = (int, "an integer") if kind == "category" else (float, "a number")
        try:
            values[name] = torch.full((prompts,), number(value), device=prior.device)
        except ValueError:
            raise ValueError(f"--condition {name}={value}: it must be {rule}") from None
    return values


def _check(args: argparse.Namespace) -> None:
    common.check_cond_scale(args.cond_scale)
    common.check_least(1, steps=args.steps, samples_per_prompt=args.samples_per_prompt)
    if bool(args.captions) == bool(args.text_embed):
        raise ValueError("give either captions or --text-embed")
    if args.text_encodings and not args.text_embed:
        raise ValueError("--text-encodings goes with --text-embed")
    if args.clip_model and args.text_embed:
        raise ValueError("--clip-model encodes captions; it does not go with --text-embed")
    common.check_clip_and_out(args)


def _text(args: argparse.Namespace, prior: DiffusionPrior) -> dict:
    """The prompts, as `DiffusionPrior.sample` takes them."""
    if args.captions:
        if prior.clip is None and common.is_of_digits(prior):
            from fastprior.demos import digits

            strange = sorted({word for c in args.captions for word in digits.words_of(c)} - digits.KNOWN_WORDS)
            if strange:
                common.say("note", f"words that the training never saw: {', '.join(strange)}")
        common.need_clip(prior, args.checkpoint, "--text-embed and --text-encodings")
        return {"text": args.captions}
    text = {"text_embed": _load_array(args.text_embed, "--text-embed", 2, prior.device)}
    if args.text_encodings:
        text["text_encodings"] = _load_array(args.text_encodings, "--text-encodings", 3, prior.device)
    elif prior.condition_on_text_encodings:
        raise ValueError(f"{args.checkpoint} is conditioned on text encodings: give --text-encodings too")
    return text


def run(args: argparse.Namespace) -> int:
    _check(args)
    import torch

    prior = common.load_prior(args)
    drawn = common.is_of_digits(prior)
    if not drawn and not args.out:
        raise ValueError("give --out FILE.npy: only the quickstart's embeddings can be drawn")
    text = _text(args, prior)
    prompts = len(args.captions or text["text_embed"])
    embeds = prior.sample(
        conditions=_load_conditions(prior, args.condition, prompts),
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

        for title, embed in zip(args.captions or [f"row {i}" for i in range(prompts)], embeds):
            print(f"{common.brief(title, TITLE)}\n\n{digits.terminal_picture(embed[None])}\n")
    if args.out:
        save_array(args.out, embeds.float().cpu().numpy())
        print(f"wrote {args.out}: {embeds.shape[0]} embeddings of {embeds.shape[1]}")
    return 0

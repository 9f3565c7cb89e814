"""What several commands share."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import fastprior
from fastprior.program import brief, say, this_program

if TYPE_CHECKING:
    from fastprior import DiffusionPrior

__all__ = ["brief", "say", "this_program"]  # for commands


def add_command(
    subparsers: argparse._SubParsersAction, name: str, run: Callable[[argparse.Namespace], int], summary: str
) -> argparse.ArgumentParser:
    """The parser of a new command, which `run` carries out."""
    parser = subparsers.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    parser.set_defaults(run=run)
    return parser


def seed(text: str) -> int:
    """The type of an option that seeds a generator."""
    number = int(text)
    if not 0 <= number < 2**63:
        raise argparse.ArgumentTypeError(f"{number} is not between 0 and 2**63 - 1")
    return number


def named(text: str) -> tuple[str, str]:
    """The two sides of NAME=VALUE."""
    name, _, value = text.partition("=")
    if not (name and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def add_device_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), help="by default cuda where there is one")


def device_of(args: argparse.Namespace) -> str:
    """The device that `--device` names, or the best there is."""
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device")
    return args.device or ("cuda" if torch.cuda.is_available() else "cpu")


def add_config_option(parser: argparse.ArgumentParser) -> None:
    what = "the config it was trained with, where the file records none and no config.json lies beside it"
    parser.add_argument("--config", metavar="FILE.json", help=what)


def add_clip_options(parser: argparse.ArgumentParser) -> None:
    """Add what `load_prior` reads besides the checkpoint."""
    add_config_option(parser)
    parser.add_argument(
        "--clip-model", metavar="NAME", help="OpenCLIP model to encode captions with; by default that of the training"
    )
    parser.add_argument("--clip-pretrained", metavar="FILE", help="its weights: a file, or a tag of OpenCLIP")
    add_device_option(parser)


def _load_clip(args: argparse.Namespace, device: str):
    try:
        return fastprior.OpenClipAdapter(args.clip_model, args.clip_pretrained, device=device)
    except ImportError:
        raise
    except Exception as error:  # open_clip raises whatever its readers do
        weights = f"CLIP {args.clip_model} with weights {args.clip_pretrained}"
        raise ValueError(f"{weights} cannot be loaded ({error})") from error


def load_prior(args: argparse.Namespace, weights: str = "auto") -> DiffusionPrior:
    """The prior of `--checkpoint` on the device, with the CLIP that the options name, if they do.

    What was assumed of it is printed.
    """
    device = device_of(args)
    clip = _load_clip(args, device) if getattr(args, "clip_model", None) else None
    prior = fastprior.load(args.checkpoint, config=args.config, weights=weights, clip=clip, device=device)
    for assumed in prior.load_report.assumed:
        say("note", f"assumed of {args.checkpoint}: {assumed}")
    return prior


def check_least(least: int, **options: int | list[int] | None) -> None:
    """Raise ValueError for a number, or one of several, below `least`; options by name, None where it is not given."""
    for name, value in options.items():
        for number in value if isinstance(value, list) else [] if value is None else [value]:
            if number < least:
                raise ValueError(f"--{name.replace('_', '-')} {number}: it must be at least {least}")


def check_cond_scale(cond_scale: float | None) -> None:
    """Raise ValueError for NaN and infinity."""
    if cond_scale is not None and not math.isfinite(cond_scale):
        raise ValueError(f"--cond-scale {cond_scale}: it must be finite")


def check_clip(args: argparse.Namespace) -> None:
    """Raise ValueError for half of a CLIP."""
    if bool(args.clip_model) != bool(args.clip_pretrained):
        raise ValueError("--clip-model and --clip-pretrained go together")


def check_clip_and_out(args: argparse.Namespace) -> None:
    """Raise ValueError for half of a CLIP, and OSError for an `--out` that cannot be written."""
    check_clip(args)
    if args.out and not Path(args.out).absolute().parent.is_dir():
        raise FileNotFoundError(f"--out {args.out}: its folder does not exist")
    if args.out and Path(args.out).is_dir():
        raise IsADirectoryError(f"--out {args.out} is a folder; it must be a file")


def is_of_digits(prior: DiffusionPrior) -> bool:
    """Whether a prior was trained by the quickstart."""
    from fastprior.demos import digits

    return prior.load_report.metadata.get("text_encoder") == digits.NAME


def need_clip(prior: DiffusionPrior, checkpoint: str, embeddings: str) -> None:
    """Give a prior the CLIP that it was trained with, where its file says which, and weights can be had.

    Raises ValueError, naming the options for embeddings, where they cannot.
    """
    from fastprior.clip import make_adapter
    from fastprior.demos import digits
    from fastprior.prior.record import MADE_BEFORE

    if prior.clip is not None:
        return
    encoder = digits.NAME if is_of_digits(prior) else prior.text_encoder
    described = dict(encoder) if isinstance(encoder, Mapping) else {}
    options = f"give --clip-model and --clip-pretrained, or embeddings with {embeddings}"
    if encoder == digits.NAME:
        clip = digits.DigitsClip()
    elif described.get("make", "openai") in ("openai", "open_clip") and described:
        say("note", f"captions are encoded by the CLIP of the training, {described.get('model')}")
        clip = make_adapter(**described).to(prior.device)
    elif described == MADE_BEFORE:
        raise ValueError(f"{checkpoint} was trained on text embeddings made before it, of a CLIP not named: {options}")
    elif described:
        make = described["make"]
        raise ValueError(
            f"{checkpoint} was trained with a CLIP of make {make!r}, whose weights it does not hold: {options}"
        )
    else:
        raise ValueError(f"{checkpoint} does not say how to encode captions: {options}")
    if clip.dim_latent != prior.image_embed_dim:
        widths = f"{clip.dim_latent}; embeddings are {prior.image_embed_dim} wide"
        raise ValueError(f"{checkpoint} names a CLIP that embeds in {widths}: {options}")
    prior.clip = clip


def clip_retrieval_folders(folder: str, meta: str | None, text: str | None) -> tuple[str, str | None, str | None]:
    """Where images, captions and text embeddings are: clip-retrieval makes a folder of each in its output folder."""
    import fsspec

    fs, root = fsspec.core.url_to_fs(folder)
    if not fs.isdir(f"{root}/img_emb"):
        return folder, meta, text
    inside = {name: f"{folder.rstrip('/')}/{name}" for name in ("metadata", "text_emb") if fs.isdir(f"{root}/{name}")}
    return f"{folder.rstrip('/')}/img_emb", meta or inside.get("metadata"), text or inside.get("text_emb")


def absolute(url: str) -> str:
    """A path from the root, so that it holds in any working directory; urls as they are."""
    return url if "://" in url else str(Path(url).absolute())

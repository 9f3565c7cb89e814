"""What several commands share."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import fastprior

if TYPE_CHECKING:
    from fastprior import DiffusionPrior


def add_command(
    subparsers: argparse._SubParsersAction, name: str, run: Callable[[argparse.Namespace], int], summary: str
) -> argparse.ArgumentParser:
    """The parser of a new command, which `run` carries out."""
    parser = subparsers.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    parser.set_defaults(run=run)
    return parser


def brief(text: str, width: int = 1000) -> str:
    """A text on one line, of at most so many characters."""
    text = " ".join(text.split())
    return text if len(text) <= width else f"{text[: width - 2]} …"


def say(kind: str, message: object) -> None:
    """Print one line on stderr, whatever the message looks like."""
    if isinstance(message, OSError) and message.strerror and message.filename is not None:
        message = f"{message.filename}: {message.strerror}"  # without a number that means nothing to a user
    print(": ".join(filter(None, ("fastprior", kind, brief(str(message))))), file=sys.stderr)


def this_program() -> str:
    """How a user of this environment starts the command line: for commands that are printed to be copied."""
    script = Path(sys.executable).with_name("fastprior")
    if not script.exists():
        return f"{shlex.quote(sys.executable)} -m fastprior.cli"
    on_path = shutil.which("fastprior")
    if on_path and os.path.samefile(on_path, script):
        return "fastprior"
    return shlex.quote(min((str(script), os.path.relpath(script)), key=len))


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


def add_clip_options(parser: argparse.ArgumentParser) -> None:
    """Add what `load_prior` reads besides the checkpoint."""
    parser.add_argument("--clip-model", metavar="NAME", help="OpenCLIP model to encode captions with")
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
    """The prior of `--checkpoint` on the device, with the CLIP that the options name, if they do."""
    device = device_of(args)
    clip = _load_clip(args, device) if args.clip_model else None
    return fastprior.load(args.checkpoint, weights=weights, clip=clip, device=device)


def check_clip_and_out(args: argparse.Namespace) -> None:
    """Raise ValueError for half of a CLIP, and OSError for an `--out` that cannot be written."""
    if bool(args.clip_model) != bool(args.clip_pretrained):
        raise ValueError("--clip-model and --clip-pretrained go together")
    if args.out and not Path(args.out).absolute().parent.is_dir():
        raise FileNotFoundError(f"--out {args.out}: its folder does not exist")
    if args.out and Path(args.out).is_dir():
        raise IsADirectoryError(f"--out {args.out} is a folder; it must be a file")


def is_of_digits(prior: DiffusionPrior) -> bool:
    """Whether a prior was trained by the quickstart."""
    from fastprior.demos import digits

    return prior.load_report.metadata.get("text_encoder") == digits.NAME


def need_clip(prior: DiffusionPrior, checkpoint: str, embeddings: str) -> None:
    """Give the quickstart's prior its CLIP; ValueError, naming the options for embeddings, where another has none."""
    if prior.clip is None and is_of_digits(prior):
        from fastprior.demos import digits

        prior.clip = digits.DigitsClip()
    if prior.clip is None:
        raise ValueError(
            f"{checkpoint} does not say how to encode captions: give --clip-model and --clip-pretrained, or "
            f"embeddings with {embeddings}"
        )

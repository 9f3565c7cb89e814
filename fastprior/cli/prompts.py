"""Prompts of commands that sample: captions, or embeddings in files."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from fastprior.cli import common
from fastprior.reading import open_regular

if TYPE_CHECKING:
    import torch

    from fastprior import DiffusionPrior


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("captions", nargs="*", metavar="CAPTION")
    add("--text-embed", metavar="FILE.npy", help="text embeddings (prompts, dim) instead of captions")
    add("--text-encodings", metavar="FILE.npy", help="text encodings (prompts, length, dim)")


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for options that do not go together."""
    if bool(args.captions) == bool(args.text_embed):
        raise ValueError("give either captions or --text-embed")
    if args.text_encodings and not args.text_embed:
        raise ValueError("--text-encodings goes with --text-embed")
    if args.clip_model and args.text_embed:
        raise ValueError("--clip-model encodes captions; it does not go with --text-embed")


def load_array(path: str, option: str, ndim: int, device: torch.device) -> torch.Tensor:
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


def load(args: argparse.Namespace, prior: DiffusionPrior) -> dict:
    """The prompts, as `DiffusionPrior.sample` takes them."""
    if args.captions:
        if prior.clip is None and common.is_of_digits(prior):
            from fastprior.demos import digits

            strange = sorted({word for c in args.captions for word in digits.words_of(c)} - digits.KNOWN_WORDS)
            if strange:
                common.say("note", f"words that the training never saw: {', '.join(strange)}")
        common.need_clip(prior, args.checkpoint, "--text-embed and --text-encodings")
        return {"text": args.captions}
    text = {"text_embed": load_array(args.text_embed, "--text-embed", 2, prior.device)}
    if args.text_encodings:
        text["text_encodings"] = load_array(args.text_encodings, "--text-encodings", 3, prior.device)
    elif prior.condition_on_text_encodings:
        raise ValueError(f"{args.checkpoint} is conditioned on text encodings: give --text-encodings too")
    return text

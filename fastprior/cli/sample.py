"""`fastprior sample`: embeddings of captions, or of embeddings in files."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from fastprior.cli.common import _say, load_clip


def _load_array(path: str, option: str, ndim: int, device: str):
    """A .npy file as an fp32 tensor."""
    import numpy as np
    import torch

    try:
        array = np.load(path)  # refuses pickles
    except (EOFError, ValueError) as error:
        raise ValueError(f"{option} {path} is not a .npy file of numbers") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f" or array.ndim != ndim:
        found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "an .npz archive"
        raise ValueError(f"{option} {path} holds {found}; it must hold a {ndim}-dimensional array of floats")
    return torch.from_numpy(array.astype(np.float32)).to(device)


def _load_conditions(prior, given: list[tuple[str, str]], prompts: int, device: str) -> dict:
    """The values of extra conditions: a number for all prompts, or of a vector a file with a row for each."""
    import torch

    from fastprior.models.dalle2.conditions import find

    values = {}
    for name, value in given:
        kind = find(prior.net.conditions, name, "--condition").kind
        if kind == "vector":
            values[name] = _load_array(value, f"--condition {name}", 2, device)
            continue
        number, rule = (int, "an integer") if kind == "category" else (float, "a number")
        try:
            values[name] = torch.full((prompts,), number(value), device=device)
        except ValueError:
            raise ValueError(f"--condition {name}={value}: it must be {rule}") from None
    return values


def _check_sample(args: argparse.Namespace) -> None:
    if not math.isfinite(args.cond_scale):
        raise ValueError(f"--cond-scale {args.cond_scale}: it must be finite")
    if bool(args.captions) == bool(args.text_embed):
        raise ValueError("give either captions or --text-embed")
    if args.text_encodings and not args.text_embed:
        raise ValueError("--text-encodings goes with --text-embed")
    if bool(args.clip_model) != bool(args.clip_pretrained):
        raise ValueError("--clip-model and --clip-pretrained go together")
    if args.clip_model and args.text_embed:
        raise ValueError("--clip-model encodes captions; it does not go with --text-embed")
    if args.out and not Path(args.out).absolute().parent.is_dir():
        raise FileNotFoundError(f"--out {args.out}: its folder does not exist")
    if args.out and Path(args.out).is_dir():
        raise IsADirectoryError(f"--out {args.out} is a folder; it must be a file")


def sample(args: argparse.Namespace) -> int:
    import numpy as np
    import torch

    from fastprior import checkpoints
    from fastprior.demos import digits
    from fastprior.utils import atomic

    _check_sample(args)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    clip = load_clip(args.clip_model, args.clip_pretrained, device) if args.clip_model else None
    prior = checkpoints.load(args.checkpoint, clip=clip, device=device)
    of_digits = prior.load_report.metadata.get("text_encoder") == digits.NAME
    if not of_digits and not args.out:
        raise ValueError("give --out FILE.npy: only the quickstart's embeddings can be drawn")
    text = {}
    if args.captions:
        if of_digits and clip is None:
            prior.clip = digits.DigitsClip()
            strange = sorted({word for c in args.captions for word in digits.words_of(c)} - digits.KNOWN_WORDS)
            if strange:
                _say("note", f"words that the training never saw: {', '.join(strange)}")
        if prior.clip is None:
            raise ValueError(
                f"{args.checkpoint} does not say how to encode captions: give --clip-model and --clip-pretrained, or "
                "embeddings with --text-embed and --text-encodings"
            )
        text["text"] = args.captions
    else:
        text["text_embed"] = _load_array(args.text_embed, "--text-embed", 2, device)
        if args.text_encodings:
            text["text_encodings"] = _load_array(args.text_encodings, "--text-encodings", 3, device)
        elif prior.condition_on_text_encodings:
            raise ValueError(f"{args.checkpoint} is conditioned on text encodings: give --text-encodings too")
    prompts = len(args.captions or text["text_embed"])
    embeds = prior.sample(
        conditions=_load_conditions(prior, args.condition, prompts, device),
        num_samples_per_batch=args.samples_per_prompt,
        cond_scale=args.cond_scale,
        timesteps=args.steps,
        solver=args.solver,
        generator=None if args.seed is None else torch.Generator(device).manual_seed(args.seed),
        progress=sys.stderr.isatty(),
        **text,
    )
    if of_digits:
        for title, embed in zip(args.captions or [f"row {i}" for i in range(len(embeds))], embeds):
            print(f"{title}\n\n{digits.terminal_picture(embed[None])}\n")
    if args.out:
        with atomic(Path(args.out)) as path, open(path, "wb") as file:
            np.save(file, embeds.float().cpu().numpy())
        print(f"wrote {args.out}: {embeds.shape[0]} embeddings of {embeds.shape[1]}")
    return 0

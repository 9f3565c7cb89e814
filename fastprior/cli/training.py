"""The commands of training: `fastprior inspect`, `fastprior train`, `fastprior evaluate`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from fastprior.cli.common import named
from fastprior.cli.inspect import add_inspect_parser
from fastprior.utils import atomic
from fastprior.version import __version__

__all__ = ["add_evaluate_parser", "add_inspect_parser", "add_train_parser", "named"]


def add_train_parser(subparsers) -> None:
    """Add `fastprior train` to the subparsers of a command line."""
    summary = "train a prior from a JSON config, on one process"
    sub = subparsers.add_parser("train", help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    sub.set_defaults(run=train_command)
    sub.add_argument("--config_file", "--config_path", "--config-file", required=True, metavar="FILE.json")


def train_command(args: argparse.Namespace) -> int:
    """`fastprior train`."""
    from fastprior import train_diffusion_prior

    return train_diffusion_prior.main(["--config_file", args.config_file])


def add_evaluate_parser(subparsers) -> None:
    """Add `fastprior evaluate` to the subparsers of a command line."""
    summary = "measure a checkpoint on pairs of image embeddings and texts"
    sub = subparsers.add_parser("evaluate", help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    sub.set_defaults(run=evaluate_command)
    sub.add_argument("--checkpoint", required=True, metavar="FILE", help="of a prior, or of its training")
    sub.add_argument("--weights", choices=("auto", "model", "ema"), default="auto", help="of a training (%(default)s)")
    sub.add_argument("--images", required=True, metavar="DIR", help="folder or url of image embeddings")
    sub.add_argument("--captions", metavar="DIR", help="of their captions, which a CLIP encodes")
    sub.add_argument("--texts", metavar="DIR", help="of their text embeddings, instead (beside, with --condition)")
    sub.add_argument("--encodings", metavar="DIR", help="of their text encodings, with --texts")
    sub.add_argument(
        "--condition", type=named, action="append", default=[], metavar="NAME=SOURCE",
        help="an extra condition: a column of the parquet files of --captions, or a vector's folder",
    )  # fmt: skip
    sub.add_argument("--timesteps", type=int, nargs="+", default=[64], metavar="N", help="sampling steps (64)")
    sub.add_argument("--cond-scale", type=float, default=1.0, help="guidance; 1 is none (%(default)s)")
    sub.add_argument("--max-pairs", type=int, metavar="N", help="use the first N pairs only")
    sub.add_argument("--batch-size", type=int, default=128, help="(%(default)s)")
    sub.add_argument("--seed", type=int, default=0, help="of the noise (%(default)s)")
    sub.add_argument("--clip-model", metavar="NAME", help="OpenCLIP model to encode captions with")
    sub.add_argument("--clip-pretrained", metavar="FILE", help="its weights: a file, or a tag of OpenCLIP")
    sub.add_argument("--device", choices=("cpu", "cuda"), help="by default cuda where there is one")
    sub.add_argument("--out", metavar="FILE.json", help="write the metrics")


def _check(args: argparse.Namespace) -> None:
    import torch

    if bool(args.captions) == bool(args.texts) and not (args.texts and args.condition):
        raise ValueError("give either --captions or --texts")
    if args.encodings and not args.texts:
        raise ValueError("--encodings goes with --texts")
    if bool(args.clip_model) != bool(args.clip_pretrained):
        raise ValueError("--clip-model and --clip-pretrained go together")
    for name, value in (("--batch-size", args.batch_size), ("--max-pairs", args.max_pairs)):
        if value is not None and value < 1:
            raise ValueError(f"{name} {value}: it must be at least 1")
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed}: it must not be negative")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device")
    if args.out and not Path(args.out).absolute().parent.is_dir():
        raise FileNotFoundError(f"--out {args.out}: its folder does not exist")


def evaluate_command(args: argparse.Namespace) -> int:
    """`fastprior evaluate`."""
    import torch
    from tqdm.auto import tqdm

    from fastprior import checkpoints
    from fastprior.cli.common import load_clip
    from fastprior.dataloaders import EmbeddingShards, PairStream
    from fastprior.demos import digits
    from fastprior.models.dalle2.conditions import find
    from fastprior.prior.evaluate import METRICS, evaluate

    _check(args)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    clip = load_clip(args.clip_model, args.clip_pretrained, device) if args.clip_model else None
    prior = checkpoints.load(args.checkpoint, weights=args.weights, clip=clip, device=device)
    if args.captions and not args.texts and prior.clip is None:
        if prior.load_report.metadata.get("text_encoder") != digits.NAME:
            raise ValueError(
                f"{args.checkpoint} does not say how to encode captions: give --clip-model and --clip-pretrained"
            )
        prior.clip = digits.DigitsClip()
    if args.texts and prior.condition_on_text_encodings and not args.encodings:
        raise ValueError(f"{args.checkpoint} is conditioned on text encodings: give --encodings too, or --captions")
    known = prior.net.conditions
    conditions = {name: (find(known, name, "--condition").kind, source) for name, source in args.condition}
    missing = [name for name in known or () if name not in conditions]
    if missing:
        print(f"fastprior: note: no --condition for {', '.join(missing)}: counted as missing", file=sys.stderr)
    urls = args.images, args.captions, args.texts, args.encodings
    shards = EmbeddingShards.open(*urls, conditions=conditions)
    unused = {"text", *conditions} if args.texts else {*conditions}
    pairs = min(shards.pairs, args.max_pairs or shards.pairs)
    batches = PairStream(shards, start=0, stop=pairs, batch_size=args.batch_size, drop_last=False)
    bar = tqdm(batches, desc="evaluating", unit="batch", disable=not sys.stderr.isatty())
    batches = (
        {name: value for name, value in batch.items() if name not in unused}
        | {"conditions": {name: batch[name] for name in conditions}}
        for batch in bar
    )
    metrics = evaluate(prior, batches, cond_scale=args.cond_scale, timesteps=args.timesteps, seed=args.seed)
    print(f"{pairs} pairs, {prior.load_report.weights} weights of {args.checkpoint}\n")
    width = max(map(len, metrics))
    for name, value in metrics.items():
        kind = name.partition(" [")[0]
        print(f"  {name:<{width}}  {value:>8.4f}  {METRICS['loss' if kind.endswith('-loss') else kind]}")
    if args.out:
        report = dict(fastprior=__version__, checkpoint=str(args.checkpoint), weights=prior.load_report.weights)
        report.update(cond_scale=args.cond_scale, seed=args.seed, pairs=pairs, metrics=metrics)
        with atomic(args.out) as temporary:
            temporary.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        print(f"\nwrote {args.out}")
    return 0

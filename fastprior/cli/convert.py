"""`fastprior convert`: checkpoints of one format to another."""

from __future__ import annotations

import argparse

from fastprior.cli.common import add_command


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    summary = "rewrite a checkpoint of any era as one safe file, or for dalle2-pytorch"
    add = add_command(subparsers, "convert", run, summary).add_argument
    add("source", metavar="SRC")
    add(
        "target", metavar="DST",
        help=".safetensors, .pt / .pth for dalle2-pytorch, or a folder for the prior of Kandinsky 2.1 or Karlo",
    )  # fmt: skip
    add("--overwrite", action="store_true", help="replace an existing DST")
    add("--config", metavar="JSON", help="file with what weights do not show")
    add("--weights", choices=("auto", "model", "ema"), default="auto", help="(%(default)s)")
    add("--clip-stats", metavar="FILE", help="of Kandinsky 2.1 and Karlo: ViT-L-14_stats.th")
    add("--trained-with", metavar="RELEASE", help="of dalle2-pytorch, for old files that do not record it")


def run(args: argparse.Namespace) -> int:
    import fastprior

    try:
        report = fastprior.convert(
            args.source, args.target, overwrite=args.overwrite, clip_stats=args.clip_stats, config=args.config,
            weights=args.weights, version=args.trained_with,
        )  # fmt: skip
    except FileExistsError:
        raise FileExistsError(f"{args.target} exists; --overwrite replaces it") from None
    print(report)
    print(f"wrote {args.target}")
    return 0

"""`fastprior evaluate`: a checkpoint's metrics on pairs of image embeddings and texts."""

from __future__ import annotations

import argparse
import json
import sys

from fastprior.cli import common
from fastprior.utils import atomic
from fastprior.version import __version__


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = common.add_command(
        subparsers, "evaluate", run, "measure a checkpoint on pairs of image embeddings and texts"
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="FILE", help="of a prior, or of its training")
    add("--weights", choices=("auto", "model", "ema"), default="auto", help="of a training (%(default)s)")
    add("--images", required=True, metavar="DIR", help="folder or url of image embeddings")
    add("--captions", metavar="DIR", help="of their captions, which a CLIP encodes")
    add("--texts", metavar="DIR", help="of their text embeddings, instead (beside, with --condition)")
    add("--encodings", metavar="DIR", help="of their text encodings, with --texts")
    add(
        "--condition", type=common.named, action="append", default=[], metavar="NAME=SOURCE",
        help="an extra condition: a column of the parquet files of --captions, or a vector's folder",
    )  # fmt: skip
    add("--timesteps", type=int, nargs="+", default=[64], metavar="N", help="sampling steps (64)")
    add("--cond-scale", type=float, default=1.0, help="guidance; 1 is none (%(default)s)")
    add("--skip-pairs", type=int, default=0, metavar="N", help="leave out the first N pairs, as those of a training")
    add("--max-pairs", type=int, metavar="N", help="use the first N pairs of the rest only")
    add("--on-problem", choices=("error", "skip"), default="error", help="with missing or damaged files (%(default)s)")
    add("--on-bad-rows", choices=("error", "skip"), help="about embeddings that are not finite; skip leaves pairs out")
    add("--batch-size", type=int, default=128, help="(%(default)s)")
    add("--seed", type=int, default=0, help="of the noise (%(default)s)")
    common.add_clip_options(parser)
    add("--out", metavar="FILE.json", help="write the metrics")


def _check(args: argparse.Namespace) -> None:
    if bool(args.captions) == bool(args.texts) and not (args.texts and args.condition):
        raise ValueError("give either --captions or --texts")
    if args.encodings and not args.texts:
        raise ValueError("--encodings goes with --texts")
    common.check_cond_scale(args.cond_scale)
    common.check_least(1, batch_size=args.batch_size, max_pairs=args.max_pairs, timesteps=args.timesteps)
    for name, value in (("--seed", args.seed), ("--skip-pairs", args.skip_pairs)):
        if value < 0:
            raise ValueError(f"{name} {value}: it must not be negative")
    common.check_clip_and_out(args)


def run(args: argparse.Namespace) -> int:
    _check(args)
    from tqdm.auto import tqdm

    from fastprior.dataloaders import EmbeddingShards, PairStream
    from fastprior.models.dalle2.conditions import find
    from fastprior.prior.evaluate import METRICS, evaluate

    prior = common.load_prior(args, args.weights)
    if args.captions and not args.texts:
        common.need_clip(prior, args.checkpoint, "--texts and --encodings")
    if args.texts and prior.condition_on_text_encodings and not args.encodings:
        raise ValueError(f"{args.checkpoint} is conditioned on text encodings: give --encodings too, or --captions")
    known = prior.net.conditions
    conditions = {name: (find(known, name, "--condition").kind, source) for name, source in args.condition}
    missing = [name for name in known or () if name not in conditions]
    if missing:
        common.say("note", f"no --condition for {', '.join(missing)}: counted as missing")
    urls = args.images, args.captions, args.texts, args.encodings
    on_fault = dict(on_problem=args.on_problem, on_bad_rows=args.on_bad_rows)
    shards = EmbeddingShards.open(*urls, conditions=conditions, **on_fault)
    if args.skip_pairs >= shards.pairs:
        raise ValueError(
            f"--skip-pairs {args.skip_pairs}: it must be less than the {shards.pairs} pairs that there are"
        )
    unused = {"text", *conditions} if args.texts else {*conditions}
    start = args.skip_pairs
    pairs = min(shards.pairs - start, args.max_pairs or shards.pairs)
    stream = PairStream(shards, start=start, stop=start + pairs, batch_size=args.batch_size, drop_last=False)
    bar = tqdm(stream, desc="evaluating", unit="batch", disable=not sys.stderr.isatty())
    batches = (
        {name: value for name, value in batch.items() if name not in unused}
        | {"conditions": {name: batch[name] for name in conditions}}
        for batch in bar
    )
    metrics = evaluate(prior, batches, cond_scale=args.cond_scale, timesteps=args.timesteps, seed=args.seed)
    replaced = f" ({len(stream.bad_rows)} not finite)" if stream.bad_rows else ""
    print(f"{pairs} pairs{replaced}, {prior.load_report.weights} weights of {args.checkpoint}\n")
    width = max(map(len, metrics))
    for name, value in metrics.items():
        kind = name.partition(" [")[0]
        print(f"  {name:<{width}}  {value:>8.4f}  {METRICS['loss' if kind.endswith('-loss') else kind]}")
    if args.out:
        report = dict(fastprior=__version__, checkpoint=str(args.checkpoint), weights=prior.load_report.weights)
        report.update(cond_scale=args.cond_scale, seed=args.seed, skipped=start, pairs=pairs, metrics=metrics)
        with atomic(args.out) as temporary:
            temporary.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        print(f"\nwrote {args.out}")
    return 0

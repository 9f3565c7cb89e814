"""`fastprior inspect`: what folders of embeddings hold, what is wrong with them, and how many pairs there are."""

from __future__ import annotations

import argparse
import sys

from fastprior.cli.common import add_command, clip_retrieval_folders


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    summary = "say what folders of embeddings and captions hold, what is wrong, and how many pairs"
    add = add_command(subparsers, "inspect", run, summary).add_argument
    add("folder", metavar="DIR", help="image embeddings, or what clip-retrieval wrote; a path or an url")
    add("--meta", metavar="DIR", help="captions, in parquet files")
    add("--text", metavar="DIR", help="text embeddings")
    add("--encodings", metavar="DIR", help="text encodings")
    add("--caption-column", default="caption", metavar="NAME", help="(%(default)s)")
    add(
        "--every-row", action="store_true", help="read all rows, and count those that are not finite, not just a sample"
    )
    add("--format", choices=("npy", "parquet", "parquet_npy", "webdataset"), help="by default as found")


def run(args: argparse.Namespace) -> int:
    """Print the report: 0, or 1 where there is a problem."""
    from fastprior.dataloaders import EmbeddingShards

    image, meta, text = clip_retrieval_folders(args.folder, args.meta, args.text)
    options = dict(file_format=args.format, caption_column=args.caption_column, on_problem="skip", on_bad_rows="skip")
    try:
        shards = EmbeddingShards.open(image, meta, text, args.encodings, **options)
    except ValueError as error:
        print(f"fastprior: {error}", file=sys.stderr)
        return 1
    print(shards.report())
    bad = sum(norms.bad for norms in shards.norms.values())
    if args.every_row:
        counts = shards.count_bad_rows()
        for name, count in counts.items():
            print(f"{'bad rows':<17} {name}: {count} {'pair is' if count == 1 else 'pairs are'} not finite")
        if not counts:
            print(f"{'bad rows':<17} none of all")
        bad = len(counts)
    return 1 if shards.problems or bad else 0

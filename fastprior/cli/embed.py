"""`fastprior embed`: image embeddings of folders of captions or text embeddings, in clip-retrieval's layout."""

from __future__ import annotations

import argparse
import os
from functools import partial
from typing import TYPE_CHECKING

from fastprior.cli import common
from fastprior.utils import first_few

if TYPE_CHECKING:
    from fastprior.serving.bulk import Embedder, InputShard, Manifest

DTYPES = "float32", "bfloat16", "float16"


def part_of(text: str) -> tuple[int, int]:
    """The type of an option that is I/N."""
    numbers = text.split("/")
    if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N, such as 1/4")
    part, parts = map(int, numbers)
    if not 1 <= part <= parts:
        raise argparse.ArgumentTypeError(f"{text!r}: I must be between 1 and N")
    return part, parts


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    summary = "make image embeddings of folders of captions or text embeddings, in clip-retrieval's layout"
    parser = common.add_command(subparsers, "embed", run, summary)
    add = parser.add_argument
    add("source", metavar="IN", help="folder of .npy or parquet shards, or what clip-retrieval wrote; a path or an url")
    add("target", metavar="OUT", help="folder of the embeddings; the same command goes on with one that is unfinished")
    add("--checkpoint", required=True, metavar="FILE", help="of a prior; old ones: see convert")
    texts = parser.add_argument_group("texts")
    add = texts.add_argument
    add("--captions", action="store_true", help="take captions, also where there are text embeddings")
    add("--encodings", metavar="DIR", help="text encodings, .npy (rows, length, dim)")
    add("--meta", metavar="DIR", help="parquet files to carry along; by default those beside the texts")
    add("--caption-column", default="caption", metavar="NAME", help="(%(default)s)")
    add("--embedding-column", default="embedding", metavar="NAME", help="(%(default)s)")
    add("--on-bad", choices=("error", "skip"), default="error",
        help="rows not finite or of norm 0: stop there, or write NaN in their place (%(default)s)")  # fmt: skip
    sampling = parser.add_argument_group("sampling", "what OUT depends on: it is refused with other values")
    add = sampling.add_argument
    add("--steps", type=int, help="by default 16 of sde-dpm++ at logsnr times, or as many as --solver takes")
    add("--solver", help="ddpm, ddim, ddim_trailing, dpm++, sde-dpm++ or learned")
    add("--spacing", help="of ddim_trailing, dpm++ and sde-dpm++: trailing, logsnr or karras")
    add("--cond-scale", type=float, default=1.0, help="guidance; 1 is none (%(default)s)")
    add("--samples-per-prompt", type=int, default=1, metavar="N",
        help="candidates, of which the most similar to the text is kept (%(default)s)")  # fmt: skip
    add("--seed", type=common.seed, default=0, help="of all noise (%(default)s)")
    add("--dtype", choices=DTYPES, help="of the network; by default that of the checkpoint")
    add("--quantise", choices=("int8", "float8"), help="weights of 8 bits that steps read")
    add("--save-dtype", choices=("float16", "float32"), default="float16", help="of the files (%(default)s)")
    work = parser.add_argument_group("work", "what OUT does not depend on")
    add = work.add_argument
    add("--batch-size", type=int, default=64, metavar="N", help="rows that run together (%(default)s)")
    add("--part", type=part_of, default=(1, 1), metavar="I/N", help="do the I-th of N shares of the shards, from 1 on")
    add(
        "--ray", action="store_true", help="on actors of Ray: of the cluster that RAY_ADDRESS names, or of this machine"
    )
    add("--actors", type=int, metavar="N", help="of Ray; by default one for each GPU, or each machine without")
    common.add_clip_options(parser)


def _check(args: argparse.Namespace) -> None:
    common.check_cond_scale(args.cond_scale)
    common.check_least(1, steps=args.steps, samples_per_prompt=args.samples_per_prompt, batch_size=args.batch_size)
    common.check_least(1, actors=args.actors)
    common.check_clip(args)
    if args.actors and not args.ray:
        raise ValueError("--actors goes with --ray")
    if "://" in args.target:
        raise ValueError(f"OUT {args.target} is an url; it must be a folder of this machine")
    if os.path.exists(args.target) and not os.path.isdir(args.target):
        raise NotADirectoryError(f"OUT {args.target} is a file; it must be a folder")
    if args.captions and args.encodings:
        raise ValueError("--encodings goes with text embeddings; it does not go with --captions")
    target = os.path.realpath(args.target)
    for name, folder in (("IN", args.source), ("--encodings", args.encodings), ("--meta", args.meta)):
        if folder and "://" not in folder and (target + os.sep).startswith(os.path.realpath(folder) + os.sep):
            raise ValueError(f"OUT {args.target} is within {name} {folder}; it must be apart from it")


def find(args: argparse.Namespace) -> list[InputShard]:
    """The shards of IN."""
    from fastprior.serving.bulk import find_shards

    columns = dict(caption_column=args.caption_column, embedding_column=args.embedding_column)
    folders = dict(encodings=args.encodings, metadata=args.meta)
    shards = find_shards(args.source, captions=args.captions, **columns, **folders)
    if args.clip_model and "text" not in shards[0].files:
        raise ValueError("--clip-model encodes captions; IN holds text embeddings (see --captions)")
    return shards


def make_embedder(args: argparse.Namespace, captions: bool) -> Embedder:
    """What embeds shards, as the options say."""
    from fastprior.serving.bulk import Embedder, Options

    prior = common.load_prior(args)
    if captions:
        common.need_clip(prior, args.checkpoint, "text_emb/*.npy in IN")
    steps = dict(timesteps=args.steps, solver=args.solver, spacing=args.spacing, cond_scale=args.cond_scale)
    kinds = dict(dtype=args.dtype, quantise=args.quantise, saved=args.save_dtype)
    options = Options(**steps, **kinds, samples_per_prompt=args.samples_per_prompt, seed=args.seed)
    return Embedder(prior, options, batch_size=args.batch_size, on_bad=args.on_bad)


def _embed_on_ray(args: argparse.Namespace, captions: bool, device: str, shards: list, manifest: Manifest, begin):
    """What was done by actors, which may run in other folders."""
    from fastprior.serving.bulk.ray_actors import embed_on_ray

    files = "checkpoint", "config", "clip_pretrained"
    there = {name: common.absolute(path) for name in files if (path := getattr(args, name)) and os.path.exists(path)}
    make = partial(make_embedder, argparse.Namespace(**vars(args) | there | dict(run=None)), captions)
    return embed_on_ray(make, shards, manifest, on_bad=args.on_bad, actors=args.actors, device=device, begin=begin)


def run(args: argparse.Namespace) -> int:
    _check(args)
    from tqdm import tqdm

    from fastprior.serving.bulk import Manifest, embed_shards, share_of

    shards = find(args)
    captions = "text" in shards[0].files
    embedder = make_embedder(args, captions)
    embedder.check(shards)
    manifest = Manifest(args.target, embedder.run(shards))
    if strange := manifest.strangers(shards):
        common.say(
            "warning", f"{args.target} holds embeddings of other shards, which IN does not have: {first_few(strange)}"
        )
    own = share_of(shards, *args.part)
    with tqdm(unit="row", unit_scale=True, disable=None, smoothing=0.1) as bar:

        def begin(rows: int):
            bar.reset(total=rows)
            return bar.update

        if args.ray:
            device = embedder.prior.device.type
            del embedder  # of which each actor has its own
            done = _embed_on_ray(args, captions, device, own, manifest, begin)
        else:
            done = embed_shards(embedder, own, manifest, begin=begin)
    bad = f", {done.bad_rows:,} of them bad, which are NaN" if done.bad_rows else ""
    there = f"; {done.there:,} shards were there" if done.there else ""
    print(f"wrote {args.target}: {done.rows:,} rows of {done.shards:,} shards{bad}{there}")
    return 0

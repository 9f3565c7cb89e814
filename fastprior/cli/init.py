"""`fastprior init`: a training's config for the data that there is."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import shlex
from pathlib import Path
from typing import Any

from fastprior.cli import common
from fastprior.program import this_program

SMALLEST = 20  # pairs: fewer give no training, validation and test that mean anything
STEPS = 500  # that a training of few pairs has; one of many sees each pair once
SIZES = ((50_000, 4), (1_000_000, 6), (math.inf, 12))  # below so many pairs, so many layers
BATCHES_PER_EPOCH, BATCH = 10, 128  # at least, and pairs of a batch at most
# the CLIPs that clip-retrieval uses, or people mostly ask it for, by the width of their embeddings
CLIPS = {512: ("ViT-B-32", "openai"), 768: ("ViT-L-14", "openai"), 1024: ("ViT-H-14", "laion2b_s32b_b79k")}


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    summary = "look at folders of embeddings, and write a config that trains a prior on them"
    add = common.add_command(subparsers, "init", run, summary).add_argument
    add("folder", metavar="DIR", help="of the run: its config, checkpoints and curves")
    add(
        "--images",
        required=True,
        metavar="DIR",
        help="image embeddings, or what clip-retrieval wrote; a path or an url",
    )
    add("--texts", metavar="DIR", help="text embeddings, made before: no CLIP is needed then")
    add("--encodings", metavar="DIR", help="text encodings, with --texts")
    add("--captions", metavar="DIR", help="parquet files of captions, which a CLIP encodes in training")
    add("--clip-model", metavar="NAME", help="OpenCLIP model that made the embeddings; by default by their width")
    add("--clip-pretrained", metavar="TAG", help="its weights: a tag of OpenCLIP, or a file")
    add("--overwrite", action="store_true", help="replace the config that is there")


def run(args: argparse.Namespace) -> int:
    _check(args)
    path = Path(args.folder) / "config.json"
    if path.exists() and not args.overwrite:
        raise FileExistsError(f"{path} exists; --overwrite replaces it")
    from fastprior.dataloaders import EmbeddingShards
    from fastprior.train_configs import TrainDiffusionPriorConfig
    from fastprior.utils import atomic

    images, texts, captions = _sources(args)
    shards = EmbeddingShards.open(images, captions, texts, args.encodings)
    print(shards.report())
    clip = None if texts else _clip(args, shards.dim)
    config = make_config(shards, Path(args.folder), clip)
    network = TrainDiffusionPriorConfig.model_validate(config).prior.net
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    train, data = config["train"], config["data"]
    print(
        f"\nnetwork           {network.depth} layers, {network.dim} wide, {network.heads} heads of {network.dim_head}"
    )
    print(f"training          {train['epochs']} epochs in batches of {data['batch_size']}")
    print(f"\nwrote {path}; train with\n  {this_program()} train --config_file {shlex.quote(str(path))}")
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.texts and args.captions:
        raise ValueError("give either --texts or --captions")
    if bool(args.clip_model) != bool(args.clip_pretrained):
        raise ValueError("--clip-model and --clip-pretrained go together")
    if args.clip_model and args.texts:
        raise ValueError("--clip-model encodes captions; it does not go with --texts")
    if Path(args.folder).exists() and not Path(args.folder).is_dir():
        raise FileExistsError(f"{args.folder} is a file; it must be a folder")


def _sources(args: argparse.Namespace) -> tuple[str, str | None, str | None]:
    """Where images, text embeddings and captions are; those that are not asked for are left out."""
    from fastprior.dataloaders import EmbeddingShards

    images, captions, texts = common.clip_retrieval_folders(args.images, args.captions, args.texts)
    texts = None if args.captions or args.clip_model else texts
    if not (texts or captions):  # parquet files and tars may hold both
        found = EmbeddingShards.open(images).columns
        texts, captions = (images if column in found else None for column in ("text_embed", "text"))
    if not (texts or captions):
        raise ValueError(f"--images {args.images}: no text is with it; give --texts or --captions")
    if args.encodings and not texts:
        raise ValueError("--encodings goes with --texts")
    captions = None if texts else captions
    where = (None if url is None else common.absolute(url) for url in (images, texts, captions))
    args.encodings = args.encodings and common.absolute(args.encodings)
    return tuple(where)


def _clip(args: argparse.Namespace, dim: int) -> dict[str, Any]:
    """The config of the CLIP for captions, whose embeddings must be as wide as those of the images."""
    if args.clip_model is None and dim not in CLIPS:
        raise ValueError(f"no usual CLIP embeds in {dim}: give --clip-model and --clip-pretrained, or --texts")
    model, pretrained = (args.clip_model, args.clip_pretrained) if args.clip_model else CLIPS[dim]
    if importlib.util.find_spec("open_clip") is None:
        raise ImportError(
            'captions need a CLIP: pip install "fastprior[clip]"; or give --texts, embeddings of the text'
        )
    import open_clip

    if args.clip_model is None:
        common.say(
            "note", f"assumed that {model} ({pretrained}) made the images, as they are {dim} wide; see --clip-model"
        )
    known = open_clip.get_model_config(model.replace("/", "-")) or {}
    if known.get("embed_dim", dim) != dim:
        raise ValueError(f"--clip-model {model} embeds in {known['embed_dim']}; the image embeddings are {dim} wide")
    length = known.get("text_cfg", {}).get("context_length", 77)
    return dict(make="open_clip", model=model, base_model_kwargs=dict(pretrained=pretrained), length=length)


def make_config(shards: Any, folder: Path, clip: dict[str, Any] | None) -> dict[str, Any]:
    """The config, in plain values, of a training on these `EmbeddingShards`, which writes to a folder.

    clip: that of the config, and the length of its texts; None where the data has text embeddings.
    Raises ValueError where there are too few pairs.
    """
    import torch

    pairs, dim, files = shards.pairs, shards.dim, shards.shards[0].files
    if pairs < SMALLEST:
        raise ValueError(f"{shards.sources['image_embed']} has {pairs} pairs; a training needs at least {SMALLEST}")
    share = round(min(0.1, 10_000 / pairs), 6)  # of validation and test, each
    trained = int(pairs * (1 - 2 * share))
    batch = 2 ** int(math.log2(max(1, min(BATCH, trained // BATCHES_PER_EPOCH))))
    epochs = max(1, round(STEPS / (trained // batch)))
    steps = epochs * (trained // batch)
    encodings = files.get("text_encodings")
    dim_head = min(64, max(8, dim // 4))
    net = dict(
        dim=dim, depth=next(depth for below, depth in SIZES if pairs < below), dim_head=dim_head,
        heads=max(1, dim // dim_head), num_timesteps=1000, normformer=True,
        max_text_len=clip["length"] if clip else encodings.shape[0] if encodings else 1,
    )  # fmt: skip
    for column, name in (("text_embed", "text_embed_dim"), ("text_encodings", "text_dim")):
        if column in files and files[column].shape[-1] != dim:
            net[name] = files[column].shape[-1]
    prior = dict(
        net=net, image_embed_dim=dim, timesteps=1000, cond_drop_prob=0.1,
        condition_on_text_encodings=clip is not None or encodings is not None,
    )  # fmt: skip
    if clip:
        prior["clip"] = {name: value for name, value in clip.items() if name != "length"}
    norms = shards.norms.get("image_embed")
    if norms and norms.rows and not norms.normalised and norms.mean > 0:
        prior["image_embed_scale"] = round(dim**0.5 / norms.mean, 6)  # features of about unit variance are diffused
    urls = zip(
        ("image_url", "meta_url", "text_url", "encodings_url"), ("image_embed", "text", "text_embed", "text_encodings")
    )
    latest, best = (str(folder.absolute() / f"{kind}.pth") for kind in ("latest", "best"))
    saver = dict(save_to="local", save_type="checkpoint", save_latest_to=latest, save_best_to=best)
    return dict(
        prior=prior,
        data={name: shards.sources[column] for name, column in urls if column in shards.sources}
        | dict(batch_size=batch, splits=dict(train=round(1 - 2 * share, 6), val=share, test=share)),
        train=dict(
            epochs=epochs, lr=float(f"{min(3e-3, 1 / (dim * net['depth'])):.2g}"), warmup_steps=steps // 10,
            cosine_decay_max_steps=steps, ema_beta=round(1 - min(0.02, max(1e-4, 20 / steps)), 6),
            ema_update_after_step=steps // 10, ema_update_every=1, amp=torch.cuda.is_available(),
        ),
        tracker=dict(
            data_path=str(folder.absolute()), overwrite_data_path=True, log=dict(log_type="console", auto_resume=True),
            load=dict(load_from="local", file_path=latest, only_auto_resume=True), save=[saver],
        ),
    )  # fmt: skip

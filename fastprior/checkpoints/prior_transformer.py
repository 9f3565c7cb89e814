"""Priors of Kandinsky 2.1 and Karlo: from their original files to a PriorTransformer, and to its folder."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastprior.checkpoints.contents import (
    MOST_PRIORS,
    LoadReport,
    choose_root,
    flatten,
    one_error,
    renamed,
    widened,
)
from fastprior.checkpoints.limits import check_counts
from fastprior.kernels.reference import is_finite
from fastprior.models.prior_transformer.model import PriorTransformer
from fastprior.reading import quoted, read_json
from fastprior.utils import first_few
from fastprior.weight_files import diffusers_folder
from fastprior.weight_files.diffusers_folder import CONFIG
from fastprior.weight_files.model_files import MODEL_NAMES, ModelFile, read_model
from fastprior.weight_files.safe import HEADER, read_any_file
from fastprior.weight_files.weights import check_dense

# The one map of renames, applied in order to the keys of a prior; None drops the key.
RENAMES = (
    (r"^(causal_mask|cf_token|cf_mask)$", None),  # constants of some files
    (r"^model\.", ""),
    (r"^time_embed\.0\.", "time_embedding.linear_1."),
    (r"^time_embed\.2\.", "time_embedding.linear_2."),
    (r"^clip_img_proj\.", "proj_in."),
    (r"^text_emb_proj\.", "embedding_proj."),
    (r"^text_enc_proj\.", "encoder_hidden_states_proj."),
    (r"^prd_emb$", "prd_embedding"),
    (r"^final_ln\.", "norm_out."),
    (r"^out_proj\.", "proj_to_clip_embeddings."),
    (r"^transformer\.resblocks\.", "transformer_blocks."),
    (r"\.attn\.c_([qkv])\.", r".attn1.to_\1."),
    (r"\.attn\.c_proj\.", ".attn1.to_out.0."),
    (r"\.ln_1\.", ".norm1."),
    (r"\.ln_2\.", ".norm3."),
    (r"\.mlp\.c_fc\.", ".ff.net.0.proj."),
    (r"\.mlp\.c_proj\.", ".ff.net.2."),
)
_ROOT = re.compile(r"(?:(?<=\.)|^)(?:model\.prd_emb|proj_to_clip_embeddings\.weight)$")
EXTRA_TOKENS = 4  # text embedding, time, image embedding and query
DIM_HEAD = 64  # of both originals; the shapes do not show it


def _split_qkv(state: Mapping[str, Tensor], heads: int) -> Iterator[tuple[str, Tensor]]:
    """Take apart queries, keys and values, one projection in the originals with rows (heads, 3, dim_head)."""
    for key, value in state.items():
        if ".attn.c_qkv." not in key:
            yield key, value
            continue
        for name, part in zip("qkv", value.unflatten(0, (heads, 3, -1)).unbind(1)):
            yield key.replace(".c_qkv.", f".c_{name}."), part.flatten(0, 1)


def _rename(state: Mapping[str, Tensor], heads: int) -> dict[str, Tensor]:
    """The state dict of a PriorTransformer of an original one, which begins with `model.`."""
    pairs = ((renamed(key, RENAMES), value) for key, value in _split_qkv(state, heads))
    return {key: value for key, value in pairs if key is not None}


def _infer(state: Mapping[str, Tensor], path: str) -> dict:
    """The constructor's arguments that an original state dict shows, and the width of a head that it does not."""
    try:
        width, dim = state["model.clip_img_proj.weight"].shape
        layers = {key.split(".")[3] for key in state if key.startswith("model.transformer.resblocks.")}
        return dict(
            num_attention_heads=width // DIM_HEAD, attention_head_dim=DIM_HEAD, num_layers=len(layers),
            embedding_dim=dim, num_embeddings=state["model.positional_embedding"].shape[1] - EXTRA_TOKENS,
            embedding_proj_dim=state["model.text_emb_proj.weight"].shape[1],
            clip_embed_dim=len(state["model.out_proj.weight"]),
        )  # fmt: skip
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise ValueError(f"{path} is no whole prior: {error} is missing, or has another shape") from error


def _read_stats(path: Path) -> dict[str, Tensor]:
    """clip_mean and clip_std, (1, dim) each, of a file with both, such as ViT-L-14_stats.th."""
    stats = read_any_file(path).payload
    is_pair = isinstance(stats, (Tensor, list, tuple)) and len(stats) == 2
    if not is_pair or not all(
        torch.is_tensor(t) and t.ndim == 1 and t.is_floating_point() and is_finite(t) for t in stats
    ):
        raise ValueError(f"clip_stats={quoted(str(path))}; it must hold the mean and the deviation of image embeddings")
    return {"clip_mean": stats[0][None], "clip_std": stats[1][None]}


def _read_config(config: Mapping | str | os.PathLike | None) -> dict:
    if config is None:
        return {}
    if not isinstance(config, Mapping):
        config = read_json(config, where=f"config={quoted(os.fspath(config))}")
    config = _trained_config(config) or {key: value for key, value in config.items() if not key.startswith("_")}
    diffusers_folder.check_config(config, inspect.signature(PriorTransformer).parameters)
    return config


def _trained_config(said: Any) -> dict | None:
    """The constructor's arguments in the record or the config of a training here; None in anything else."""
    said = said if isinstance(said, Mapping) else {}
    training = said.get("prior") if isinstance(said.get("prior"), Mapping) else {}
    net = training.get("net", said.get("net"))
    if not isinstance(net, Mapping) or net.get("make") != "prior_transformer":
        return None
    return {name: value for name, value in net.items() if name not in ("make", "pretrained", "subfolder", "variant")}


def _read_file(path: Path, weights: str, config: dict, report: LoadReport) -> tuple[dict, dict[str, Tensor]]:
    """The constructor's arguments and the tensors, under diffusers' names, of a file or a folder of either make."""
    with read_model(path) as model:
        return _from_model(model, path, weights, config, report)


def _from_model(
    model: ModelFile, path: Path, weights: str, config: dict, report: LoadReport
) -> tuple[dict, dict[str, Tensor]]:
    flat = dict(flatten(model.payload, str(path)))
    report.notes += model.notes
    roots = {key[: match.start()] for key in flat if (match := _ROOT.search(key))}
    if not roots:
        found = first_few(flat) or "nothing"
        raise ValueError(
            f"{path} holds no PriorTransformer of diffusers, Kandinsky 2.1 or Karlo: found {found}. "
            "For a prior of dalle2-pytorch the target must end in .safetensors, .pt or .pth"
        )
    if len(roots) > MOST_PRIORS:
        raise ValueError(f"{path} holds {len(roots)} priors; it must hold at most {MOST_PRIORS}")
    state = choose_root(flat, roots, weights, report)[1]
    check_dense(state, str(path))
    model.fill(state.values())
    state = widened(state, report)
    if "model.prd_emb" not in state:
        beside = model.file.with_name(CONFIG)
        report.kind, report.era = "state dict", "diffusers"
        if (recorded := _trained_config(model.payload.get(HEADER))) is not None:
            return recorded | config, state
        if not config and not beside.is_file():
            raise ValueError(f"config=None; {path} has no {CONFIG} beside it, so it must be given")
        return _read_config(None if config else beside), state
    report.kind, report.era = "original prior", "Kandinsky 2.1 and Karlo"
    arguments = _infer(state, str(path)) | config
    heads, dim_head = arguments["num_attention_heads"], arguments["attention_head_dim"]
    if heads * dim_head != (width := len(state["model.clip_img_proj.weight"])):
        rule = f"with heads of {dim_head} they must make up the width, {width}: give both in config"
        raise ValueError(f"num_attention_heads={heads}; {rule}")
    report.notes.append(f"{heads} heads of {dim_head}")
    return arguments, _rename(state, heads)


def load(
    source: str | os.PathLike,
    *,
    clip_stats: str | os.PathLike | None = None,
    config: Mapping | str | os.PathLike | None = None,
    weights: str = "auto",
) -> tuple[PriorTransformer, LoadReport]:
    """Load a PriorTransformer, in eval mode and in the file's dtype, and say what the file was.

    Args:
        source: Karlo's or Kandinsky 2.1's original checkpoint, alone or in a trainer's; or a folder of diffusers, of
            a prior or of its pipeline; or a state dict of diffusers, whose config.json lies beside it or is given.
            Files and folders as `fastprior.load` takes them.
        clip_stats: the file with the mean and the deviation of image embeddings, which originals have apart.
        config: constructor's arguments in place of the inferred ones, as a dict or a JSON file. Heads are 64 wide by
            default, as in both originals.
        weights: see `fastprior.load`.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, unsafe, or no such prior; tensors are missing, not finite, or do not fit.
    """
    with one_error(str(source)):
        return _load(Path(source), clip_stats, config, weights)


def _load(path: Path, clip_stats, config, weights: str) -> tuple[PriorTransformer, LoadReport]:
    report, overrides = LoadReport(str(path)), _read_config(config)
    stats = {} if clip_stats is None else _read_stats(Path(clip_stats))
    if path.is_dir() and not any((path / name).is_file() for name in MODEL_NAMES):
        report.kind, report.era = "folder", "diffusers"
        arguments, state = diffusers_folder.read(path, "prior" if (path / "prior").is_dir() else None, None)
    else:
        arguments, state = _read_file(path, weights, overrides, report)
    if report.era != "diffusers" and not stats and "clip_mean" not in state:
        raise ValueError(f"clip_stats=None; {path} has no clip_mean and clip_std, so their file must be given")
    report.architecture = "given" if overrides else "recorded" if report.era == "diffusers" else "inferred"
    check_counts(arguments | overrides, {}, state, str(path))
    for key, value in state.items():
        if not value.is_floating_point() or not is_finite(value):
            raise ValueError(f"{path}: {key} must hold finite floating point numbers")
    dtype = next(iter(state.values())).dtype
    prior = diffusers_folder.build(PriorTransformer, arguments | overrides, state | stats, dtype, str(path))
    for name, value in stats.items():
        setattr(prior, name, nn.Parameter(value))  # not rounded with the weights
    return prior.eval(), report

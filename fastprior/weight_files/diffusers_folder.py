"""Folders of diffusers models, `config.json` and `diffusion_pytorch_model…`, without diffusers."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastprior.reading import quoted, read_json
from fastprior.utils import atomic, first_few, nearest, remove_leftovers, sync_names, temporary_folder
from fastprior.weight_files.model_files import read_index
from fastprior.weight_files.safe import read_file
from fastprior.weight_files.weights import check_weights

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model"
SUFFIXES = ".safetensors", ".bin"
OPTIONAL = "clip_mean", "clip_std"  # None in models that were saved without
LAYERS = "transformer_blocks"  # by number
DERIVED = "causal_attention_mask"  # a constant that some files hold

Model = TypeVar("Model", bound=nn.Module)


def _file_names(variant: str | None) -> list[str]:
    """Where weights may be, in the order of preference: an index names the shards of one model."""
    name, inner = (WEIGHTS, "") if variant is None else (f"{WEIGHTS}.{variant}", f".{variant}")
    return [file for suffix in SUFFIXES for file in (name + suffix, f"{WEIGHTS}{suffix}.index{inner}.json")]


def _folder(path: str | os.PathLike, subfolder: str | None, variant: str | None, hub: dict) -> Path:
    """The local folder, after a download where `path` is the id of a repository."""
    folder = Path(path)
    if not folder.is_dir():
        try:
            from huggingface_hub import snapshot_download
        except ImportError as error:
            raise ImportError(
                f"{path} is no folder, so it is taken as a repository's id, which needs pip install huggingface_hub"
            ) from error
        inner = "" if variant is None else f".{variant}"
        start = f"{subfolder}/" if subfolder else ""
        for suffix in SUFFIXES:  # one after the other: many repositories hold the weights in both formats
            weights = (f"{inner}{suffix}", f"{inner}-*{suffix}", f"{suffix}.index{inner}.json")
            wanted = [start + CONFIG, *(start + WEIGHTS + end for end in weights)]
            folder = Path(snapshot_download(os.fspath(path), allow_patterns=wanted, **hub))
            if any(folder.glob(f"{start}{WEIGHTS}*{suffix}")):
                break
    return folder / subfolder if subfolder else folder


def read(path: str | os.PathLike, subfolder: str | None, variant: str | None, **hub) -> tuple[dict, dict[str, Tensor]]:
    """The config, without diffusers' own entries, and the tensors: see `PriorTransformer.from_pretrained`.

    Raises FileNotFoundError where a file is missing, and ValueError where one cannot be read, or holds weights that are
    not finite floating point numbers.
    """
    folder = _folder(path, subfolder, variant, hub)
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG}; it must be a folder that a diffusers model was saved to")
    config = read_json(folder / CONFIG)
    config = {name: value for name, value in config.items() if not name.startswith("_")}
    names = _file_names(variant)
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    if file is None:
        raise FileNotFoundError(
            f"{folder} has no weights of variant={variant!r}; one must be there of {', '.join(names)}"
        )
    state = read_index(file) if file.suffix == ".json" else dict(read_file(file).payload)
    state.pop(DERIVED, None)
    check_weights(state, os.fspath(file))
    return config, state


def check_config(config: Mapping, known: Iterable[str]) -> None:
    for name in config:
        if name not in known:
            raise ValueError(f"the config has the unknown key {quoted(name)}; {nearest(str(name)[:100], known)}")


def build(model_class: type[Model], config: Mapping, state: dict[str, Tensor], dtype: torch.dtype, where: str) -> Model:
    """A model of a config, with the tensors of its files. Raises ValueError, after `where`, unless they fit.

    No more layers are built than the files have, whatever the config says.
    """
    parameters = inspect.signature(model_class).parameters
    layers = len({name.split(".")[1] for name in state if name.startswith(f"{LAYERS}.")})
    try:
        check_config(config, parameters)
        wanted = config.get("num_layers", parameters["num_layers"].default)
        if wanted != layers:
            raise ValueError(f"num_layers={quoted(wanted)}; the weights have {layers} layers")
        with torch.device("meta"):
            model = model_class(**config)
        fill(model, state, dtype)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    except RuntimeError as error:  # sizes whose product is no number of bytes
        raise ValueError(f"{where}: there is no model of this config ({quoted(str(error))})") from error
    return model


def fill(model: nn.Module, state: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Give a model on the meta device its tensors, cast to `dtype`."""
    for name in OPTIONAL:
        if name not in state:
            setattr(model, name, None)
    state = {name: t for name, t in state.items() if name != DERIVED}
    wanted = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in state.items()}
    wrong = [name for name in wanted if name in found and wanted[name] != found[name]]
    faults = {
        "missing": first_few(sorted(wanted.keys() - found.keys())),
        "unexpected": first_few(sorted(found.keys() - wanted.keys())),
        "of another shape": first_few(f"{name} {found[name]}, which must be {wanted[name]}" for name in wrong),
    }
    if faults := [f"{kind}: {names:.300}" for kind, names in faults.items() if names]:
        raise ValueError(f"the weights do not fit the config; {'; '.join(faults)}")
    model.load_state_dict({name: t.to(dtype) for name, t in state.items()}, assign=True)
    model.requires_grad_()


def write(
    folder: str | os.PathLike, config: Mapping, state: Mapping[str, Tensor], variant: str | None, safe: bool
) -> None:
    """Write a folder: a new one appears whole, or files of one that exists are replaced when all are written."""
    folder = Path(folder)
    if folder.is_file():
        raise ValueError(f"save_directory={os.fspath(folder)!r} is a file; it must be a folder, or a new one")
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    exists = folder.exists()
    remove_leftovers(folder)  # of the writer that made it, too
    state = {name: t.detach().cpu().contiguous() for name, t in state.items()}
    weights = _file_names(variant)[0 if safe else 2]
    try:
        with temporary_folder(folder / CONFIG if exists else folder) as temporary:
            new = temporary / folder.name
            new.mkdir()
            with atomic(new / weights) as file:
                if safe:
                    save_file(state, file, metadata={"format": "pt"})
                else:
                    torch.save(state, file)
            with atomic(new / CONFIG) as file:
                file.write_text(json.dumps({"_class_name": "PriorTransformer", **config}, indent=2) + "\n")
            for name in (weights, CONFIG) if exists else ():
                os.replace(new / name, folder / name)
            if not exists:
                os.replace(new, folder)
            sync_names(folder if exists else folder.parent)
    except OSError as error:
        raise OSError(f"{folder} could not be written: {getattr(error, 'why', None) or error}") from error

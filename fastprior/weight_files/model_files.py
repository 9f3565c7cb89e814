"""A model's tensors, wherever they lie: in one file, in several that an index names, or in the folder of a training."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple

from torch import Tensor

from fastprior.reading import quoted, read_json
from fastprior.utils import first_few
from fastprior.weight_files.safe import FileContents, SharedOnce, read_file

# what accelerate's save_state and save_model and transformers' Trainer write, the first that is there
MODEL_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)$")
_OTHER_FOLDERS = {  # what a folder holds, and what it is then
    "zero_to_fp32.py": "DeepSpeed's, and zero_to_fp32.py in it makes one file of it",
    "pytorch_model_fsdp_0/.metadata": "FSDP's, of whose shards `accelerate merge-weights` makes one file",
    ".metadata": "torch.distributed's, of whose shards dcp_to_torch_save makes one file",
    "diffusion_pytorch_model.safetensors": "a diffusers model's, which PriorTransformer.from_pretrained reads",
    "diffusion_pytorch_model.bin": "a diffusers model's, which PriorTransformer.from_pretrained reads",
    "model_index.json": "a diffusers pipeline's, which PriorPipeline.from_pretrained reads",
}


def _read_names(index: Path) -> dict[str, list[str]]:
    """The files that an index names, each with its tensors; they lie in the folder of the index."""
    content = read_json(index)
    weight_map = content.get("weight_map")
    pairs = weight_map.items() if isinstance(weight_map, dict) else [(None, None)]
    named: dict[str, list[str]] = {}
    for key, name in pairs:
        if not isinstance(name, str):
            raise ValueError(f"{index} has no weight_map, tensors' names to names of files: {quoted(weight_map)}")
        named.setdefault(PurePosixPath(name).as_posix(), []).append(key)
    for name in named:
        for path in (PurePosixPath(name), PureWindowsPath(name)):
            if path.is_absolute() or path.drive or ".." in path.parts or not path.name:
                raise ValueError(f"{index} names the file {quoted(name)}; it must lie in the folder of the index")
    return named


def _read_parts(index: Path) -> list[FileContents]:
    """The files that an index names, whose tensors are not read yet."""
    named = _read_names(index)
    missing = [name for name in named if not os.path.isfile(index.parent / name)]
    if missing:
        rule = f"{len(missing)} of its {len(named)} files are missing"
        raise FileNotFoundError(f"{index} names {first_few(missing[:1])}; {rule}")
    parts: list[FileContents] = []
    try:
        for name, keys in named.items():
            parts.append(read_file(index.parent / name, later=True))
            if lacking := [key for key in keys if key not in parts[-1].payload]:
                raise ValueError(f"{index} says that {first_few(lacking[:1])} is in {first_few([name])}; it is not")
    except BaseException:
        _close(parts)
        raise
    return parts


def _close(parts: Iterable[FileContents]) -> None:
    for part in parts:
        part.close()


def _joined(parts: list[FileContents]) -> dict:
    all_safe = all(isinstance(part.payload, SharedOnce) for part in parts)
    tensors = ((key, value) for part in parts for key, value in part.payload.items())
    return SharedOnce(tensors) if all_safe else dict(tensors)


def read_index(index: Path) -> dict:
    """The tensors of the files that an index names, and of no others: FileNotFoundError where one is missing.

    The files lie in the index's folder or in folders within it, or are links there. Raises ValueError for an index that
    is none, names files elsewhere, or names tensors that are not there.
    """
    parts = _read_parts(index)
    try:
        for part in parts:
            part.fill()
        return _joined(parts)
    finally:
        _close(parts)


def _model_in(folder: Path) -> Path:
    """The file or index of the model that a folder holds."""
    for name in MODEL_NAMES:
        if (folder / name).is_file():
            return folder / name
    kind = next((f"It is {kind}. " for name, kind in _OTHER_FOLDERS.items() if (folder / name).exists()), "")
    found = first_few(sorted(path.name for path in folder.iterdir())) or "nothing"
    rule = f"it must be a checkpoint file, or hold one of {', '.join(MODEL_NAMES)}"
    raise ValueError(f"{folder} is a directory; {rule}. {kind}Found: {found}")


class ModelFile(NamedTuple):
    """What a path leads to, until the end of a `with` block in which `fill` reads the numbers of tensors.

    Attributes:
        payload: tensors and plain values.
        header: our header where there is one.
        file: the file or the index.
        notes: what was read in the path's place, and what the files say of themselves.
        parts: the files.
    """

    payload: Mapping
    header: dict | None
    file: Path
    notes: list[str]
    parts: list[FileContents]

    def __enter__(self) -> ModelFile:
        return self

    def __exit__(self, *_) -> None:
        _close(self.parts)

    def fill(self, tensors: Iterable[Tensor]) -> None:
        """Read the numbers of these tensors, and check them; raises ValueError for a damaged file."""
        tensors = list(tensors)
        for part in self.parts:
            part.fill(tensors)


def read_model(path: Path) -> ModelFile:
    """Find a file, an index, or what a folder holds, and read it but for the numbers of its tensors.

    Raises FileNotFoundError and ValueError as `safe.read_file` does, and for a part of a model without its index.
    """
    notes = []
    if path.is_dir():
        folder, path = path, _model_in(path)
        others = sorted(other.name for end in ("safetensors", "bin") for other in folder.glob(f"*model_[0-9]*.{end}"))
        notes.append(f"{path.name} of the folder was read" + (f", and not {first_few(others)}" if others else ""))
    if path.is_file() and (part := _PART.match(path.name)) and int(part[3]) > 1:
        index = path.with_name(f"{part[1]}{part[4]}.index.json")
        if not index.is_file():
            rule = f"its index, {index.name}, must lie beside it with the others"
            raise ValueError(f"{path} is part {int(part[2])} of the {int(part[3])} of a model; {rule}")
        notes.append(f"{path.name} is a part of a model: all that {index.name} names were read")
        path = index
    if path.is_file() and path.name.endswith(".index.json"):
        parts = _read_parts(path)
        return ModelFile(_joined(parts), None, path, [*notes, *_notes(parts)], parts)
    contents = read_file(path, later=True)
    return ModelFile(contents.payload, contents.header, path, [*notes, *_notes([contents])], [contents])


def _notes(parts: list[FileContents]) -> list[str]:
    return list(dict.fromkeys(note for part in parts for note in part.notes))

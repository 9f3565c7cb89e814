"""A CLIP's weights in a local file: OpenAI's TorchScript archive, a checkpoint of OpenCLIP's training, a state dict."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import FunctionType, ModuleType

from torch import Tensor, nn

from fastprior.reading import open_regular
from fastprior.weight_files.safe import read_file
from fastprior.weight_files.torchscript import is_torchscript, read_torchscript
from fastprior.weight_files.weights import check_weights

_SCALARS = "input_resolution", "context_length", "vocab_size"  # of OpenAI's archives, which no model has


def read_clip(path: str | os.PathLike) -> dict[str, Tensor]:
    """The state dict of a file; nothing in it is run. Raises FileNotFoundError, and ValueError for what is none."""
    if is_torchscript(path):
        state = {name: tensor for name, tensor in read_torchscript(path).items() if name not in _SCALARS}
    else:
        state = read_file(Path(path)).payload
        state = state.get("state_dict", state)
    if not isinstance(state, Mapping) or not state or not all(isinstance(name, str) for name in state):
        raise ValueError(f"{os.fspath(path)} holds no state dict of a CLIP, alone or as 'state_dict'")
    check_weights(state, os.fspath(path), integers=True)
    wrapped = next(iter(state)).startswith("module.")  # by DistributedDataParallel
    return {name.removeprefix("module.") if wrapped else name: tensor for name, tensor in state.items()}


def fill_clip(open_clip: ModuleType, model: nn.Module, name: str, path: str) -> None:
    """Load a file by OpenCLIP's function, which converts and resizes, with `read_clip` in the place of its reader.

    .npz and .npy files of big_vision are left to NumPy, which unpickles nothing. Raises ValueError for a file that does
    not fit the model of that name, and as `read_clip`.
    """
    load, of_big_vision = open_clip.load_checkpoint, path.endswith((".npz", ".npy"))
    if of_big_vision:
        open_regular(path).close()  # or raises
        arguments = model, path
    else:
        state = read_clip(path)
        for key, own in model.state_dict().items():
            if key in state and own.is_floating_point() != state[key].is_floating_point():
                raise ValueError(f"{path}: {key} has dtype {state[key].dtype}; for {name} it must be like {own.dtype}")
        names = {**load.__globals__, "load_state_dict": lambda *args, **kwargs: state}
        load = FunctionType(load.__code__, names, None, load.__defaults__, load.__closure__)
        arguments = model, "no file is read"
    try:
        load(*arguments)
    except Exception as error:  # packages raise whatever their conversions do
        raise ValueError(f"{path} does not fit {name}: {' '.join(str(error).split())[:500]}") from error
    if of_big_vision:
        check_weights(dict(model.named_parameters()), path)

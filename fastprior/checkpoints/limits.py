"""What may be built of a file: no more than the tensors in it can fill, whatever its configuration says."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from fastprior.reading import quoted
from fastprior.utils import first_few

MOST_LAYERS, SPARE_LAYERS = 1000, 64
MOST_TIMESTEPS = 10**5  # where no table in the file is as long
SPARE_BYTES = 2**26
_LAYER = re.compile(r"(?:^|\.)(?:layers|transformer_blocks|resblocks)\.(\d{1,9})\.")


def is_plain(value: Any, most: int = 10**5) -> bool:
    """Whether a value is of JSON's kinds, with at most so many entries, nested at most 32 deep."""
    stack, left = [(value, 0)], most
    while stack:
        value, depth = stack.pop()
        left -= 1
        if left < 0 or depth > 32:
            return False
        if type(value) is list:
            stack += ((item, depth + 1) for item in value[: left + 1])
        elif isinstance(value, Mapping):
            if len(value) > left or not all(type(key) is str for key in value):
                return False
            stack += ((item, depth + 1) for item in value.values())
        elif not isinstance(value, (str, int, float, type(None))):
            return False
    return True


def check_counts(net: Mapping, prior: Mapping, state: Mapping[str, Tensor], path: str) -> None:
    """Raise ValueError for more layers, conditions or times than a file can be meant to have, before any is made."""
    layers = {int(match[1]) for key in state if (match := _LAYER.search(key))}
    counts = {name: net.get(name) for name in ("depth", "num_layers")}
    for name, value in counts.items():
        if isinstance(value, (int, float)) and value > min(MOST_LAYERS, len(layers) + SPARE_LAYERS):
            raise ValueError(f"{path}: {name}={quoted(value)}; the file has {len(layers)} layers")
    conditions = {key.split(".")[2] for key in state if key.startswith("net.conditions.")}
    if isinstance(given := net.get("conditions"), Mapping) and len(given) > len(conditions) + SPARE_LAYERS:
        raise ValueError(f"{path}: conditions has {len(given)} entries; the file has {len(conditions)} of them")
    tables = [len(value) for key, value in state.items() if key.startswith("noise_scheduler.") and value.ndim == 1]
    timesteps, most = prior.get("timesteps"), max([MOST_TIMESTEPS, *tables])
    if isinstance(timesteps, (int, float)) and timesteps > most:
        raise ValueError(f"{path}: timesteps={quoted(timesteps)}; the file has no such table, and it must be <= {most}")


def check_memory(net: nn.Module, missing: Iterable[str], state: Mapping[str, Tensor], path: str) -> None:
    """Raise ValueError where a network, on the meta device, needs far more memory than the file's tensors fill."""
    missing = set(missing)
    wanted = net.state_dict(keep_vars=True)
    own = [tensor for name, tensor in wanted.items() if f"net.{name}" in missing]
    own += [tensor for name, tensor in net.named_buffers() if name not in wanted]
    needed, held = sum(tensor.nbytes for tensor in own), sum(tensor.nbytes for tensor in state.values())
    if needed > 4 * held + SPARE_BYTES:
        raise ValueError(
            f"{path}: its architecture needs {needed:,} bytes that are not in the file, whose tensors have {held:,}. "
            f"Missing: {first_few(sorted(missing)) or 'none'}"
        )

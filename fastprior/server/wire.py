"""Tensors as bytes: JSON's lists, base64 of fp32, and safetensors."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson
import safetensors.torch
import torch
from torch import Tensor

from fastprior.server.errors import ApiError

SAFETENSORS = "application/vnd.safetensors"
BINARY = SAFETENSORS, "application/octet-stream", "application/x-safetensors"
HALF, SINGLE = np.dtype("<f2"), np.dtype("<f4")


def embeddings(embeds: Tensor, as_base64: bool) -> list[dict[str, Any]]:
    """Entries of an answer, of embeddings (n, dim): lists that orjson writes, or base64 of little-endian fp32."""
    rows = np.ascontiguousarray(embeds.numpy(), dtype=SINGLE)
    values: Sequence = [base64.b64encode(row.data).decode() for row in rows] if as_base64 else list(rows)
    return [{"object": "embedding", "index": index, "embedding": value} for index, value in enumerate(values)]


def dumps(value: Any) -> bytes:
    """JSON of an answer, in which arrays of NumPy may stand."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def tensor_of(value: Any, name: str, width: int, ndim: int) -> Tensor:
    """A tensor (…, width) of lists of numbers, or of base64 of fp32 or fp16. Raises ApiError, naming the field."""
    if isinstance(value, str):
        try:
            data = base64.b64decode(value, validate=True)
        except ValueError:
            raise ApiError(400, f"{name} is no base64; it must be that of little-endian fp32 or fp16", name) from None
        return _of_bytes(data, name, width, ndim)
    lists = value if ndim == 2 and isinstance(value, list) else [value]
    if not all(isinstance(one, list) for one in lists) or {len(one) for one in lists} - {width} or not lists:
        shape = f"({width},)" if ndim == 1 else f"(length, {width})"
        raise ApiError(400, f"{name} has shape {_shape(value)}; it must be {shape}", name)
    if not all(set(map(type, one)) <= {int, float} for one in lists):
        raise ApiError(400, f"{name} is no array of numbers; each of its items must be one", name)
    try:
        with np.errstate(over="ignore"):  # what is too large for fp32 becomes infinite, which is refused
            array = np.asarray(value, dtype=np.float32)
    except OverflowError:
        raise ApiError(400, f"{name} holds an integer beyond fp32; all its numbers must be finite", name) from None
    return _checked(torch.from_numpy(array), name, width, ndim)


def _shape(value: Any) -> str:
    """What a message says of lists that were given."""
    if not isinstance(value, list):
        return f"of a {type(value).__name__}"
    inner = {len(one) if isinstance(one, list) else -1 for one in value}
    if inner <= {-1}:
        return f"({len(value)},)"
    lengths = sorted(inner)
    return f"({len(value)}, {lengths[0]})" if len(lengths) == 1 else f"({len(value)}, …) with lists of {lengths[:4]}"


def _of_bytes(data: bytes, name: str, width: int, ndim: int) -> Tensor:
    """Rows of fp32, or of fp16: of an embedding the number of bytes says which; of more rows it must be fp32."""
    half = ndim == 1 and len(data) == 2 * width
    dtype = HALF if half else SINGLE
    if not data or len(data) % (width * dtype.itemsize) or (ndim == 1 and len(data) != width * dtype.itemsize):
        rule = f"{4 * width} or {2 * width} bytes" if ndim == 1 else f"a multiple of {4 * width} bytes, of fp32"
        raise ApiError(400, f"{name} has {len(data)} bytes; it must have {rule}", name)
    array = np.frombuffer(data, dtype).astype(np.float32)
    return _checked(torch.from_numpy(array if ndim == 1 else array.reshape(-1, width)), name, width, ndim)


def _checked(t: Tensor, name: str, width: int, ndim: int) -> Tensor:
    if t.ndim != ndim or t.shape[-1] != width or not t.numel():
        rule = f"({width},)" if ndim == 1 else f"(length, {width})"
        raise ApiError(400, f"{name} has shape {tuple(t.shape)}; it must be {rule}", name)
    if not t.isfinite().all():
        raise ApiError(400, f"{name} holds NaN or infinity; all its numbers must be finite", name)
    return t


def load_safetensors(body: bytes) -> dict[str, Tensor]:
    """Floats by name, as fp32. Raises ApiError for anything else."""
    try:
        found = safetensors.torch.load(body)
    except Exception as error:  # whatever its parser raises
        raise ApiError(400, f"the body is no safetensors file: {error}", "body") from None
    for name, t in found.items():
        if not t.is_floating_point():
            raise ApiError(400, f"{name} has dtype {t.dtype}; it must be a floating point tensor", name)
    return {name: t.float() for name, t in found.items()}


def save_safetensors(embeds: Tensor, about: dict[str, Any]) -> bytes:
    """`image_embeds` (n, dim) fp32, with what is said of them as metadata."""
    metadata = {name: value if isinstance(value, str) else json.dumps(value) for name, value in about.items()}
    return safetensors.torch.save({"image_embeds": embeds.contiguous()}, metadata)

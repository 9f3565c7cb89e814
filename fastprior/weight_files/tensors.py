"""Tensors as pickles of torch describe them: views of what a file holds, checked before they are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastprior.reading import quoted

SMALL_VIEW = 2**20  # bytes that a tensor may seem to have and a file does not: expanded scalars, small tables
DIMENSIONS = 32


@dataclass(eq=False)
class Storage:
    """The bytes of a file that tensors are views of, and the type of their elements where the pickle says it."""

    data: torch.UntypedStorage
    dtype: torch.dtype | None


class Unreadable:
    """Stands in for a tensor that is none with numbers of its own; `kind` says what it is."""

    shape = None

    def __init__(self, kind: str) -> None:
        self.kind = kind


class _StorageType:
    """Stands in for a class of storages: its type of elements, None where there is none of ours."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype


class _TensorType:
    """Stands in for torch.Tensor, which is named and not called."""


def _unreadable(kind: str):
    def make(*_) -> Unreadable:
        return Unreadable(kind)

    return make


def _are_counts(values: Any) -> bool:
    return isinstance(values, Sequence) and all(type(value) is int and 0 <= value < 2**62 for value in values)


def view(storage: Storage, dtype: torch.dtype | None, offset: int, size: Sequence[int], stride: Sequence[int]):
    """A tensor of a storage's elements, or an Unreadable one. Raises ValueError for one that leaves the storage."""
    if not isinstance(storage, Storage):
        raise ValueError("a tensor of something else than stored numbers")
    if dtype is None:
        return Unreadable("a quantized tensor")
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"a tensor of dtype {quoted(dtype)}")
    if not (_are_counts([offset]) and _are_counts(size) and _are_counts(stride) and len(size) == len(stride)):
        raise ValueError(f"a tensor of shape {quoted(size)} and strides {quoted(stride)}")
    if len(size) > DIMENSIONS:
        raise ValueError(f"a tensor of {len(size)} dimensions")
    count, last = 1, offset
    for length, step in zip(size, stride):
        count, last = count * length, last + (length - 1) * step
    held = storage.data.nbytes()
    if count and (last + 1) * dtype.itemsize > held:
        raise ValueError(f"a tensor of shape {quoted(size)} that reaches beyond its {held:,} bytes")
    if not count and max(*size, offset, *stride) * dtype.itemsize > 2**62:
        raise ValueError(f"an empty tensor of shape {quoted(size)}")
    if count * dtype.itemsize > max(held, SMALL_VIEW):
        return Unreadable(f"a view of {held:,} bytes that claims {count * dtype.itemsize:,}")
    return torch.empty(0, dtype=dtype, device="cpu").set_(storage.data, offset, tuple(size), tuple(stride))


def rebuild_tensor(storage: Storage, offset: int, size, stride, *_) -> Tensor | Unreadable:
    return view(storage, getattr(storage, "dtype", None), offset, size, stride)


def rebuild_tensor_v2(
    storage: Storage, offset: int, size, stride, requires_grad, hooks, metadata=None
) -> Tensor | Unreadable:
    if metadata:
        return Unreadable("a lazily conjugated or negated tensor")
    return rebuild_tensor(storage, offset, size, stride)


def rebuild_tensor_v3(
    storage: Storage, offset: int, size, stride, requires_grad, hooks, dtype, metadata=None
) -> Tensor | Unreadable:
    if metadata or dtype is None:
        return Unreadable("a lazily conjugated or negated tensor")
    return view(storage, dtype, offset, size, stride)


def rebuild_parameter(data, *_) -> Tensor | Unreadable:
    """The tensor of a parameter: whether it is trained says no file."""
    if not isinstance(data, (Tensor, Unreadable)):
        raise ValueError("a parameter that is no tensor")
    return data


def rebuild_of_type(make, kind, arguments, state=None) -> Tensor | Unreadable:
    """A tensor with attributes, or of a subclass, without either."""
    if make not in _MAKERS or type(arguments) is not tuple:
        raise ValueError("a tensor made by something else")
    return make(*arguments)


def rebuild_moved(data, dtype, *_) -> Tensor | Unreadable:
    """A tensor of a device that keeps its own in another form."""
    if not isinstance(data, Tensor) or not isinstance(dtype, torch.dtype):
        return Unreadable("a tensor of another device")
    return data.to(dtype)


def _size(values=()) -> torch.Size:
    return torch.Size(values)


def _layout(name: str) -> str:
    return name


_MAKERS = rebuild_tensor, rebuild_tensor_v2, rebuild_tensor_v3, rebuild_parameter
_STORAGES = dict(
    Double=torch.float64, Float=torch.float32, Half=torch.float16, BFloat16=torch.bfloat16, Long=torch.int64,
    Int=torch.int32, Short=torch.int16, Char=torch.int8, Byte=torch.uint8, Bool=torch.bool, Untyped=torch.uint8,
    ComplexDouble=torch.complex128, ComplexFloat=torch.complex64, QUInt8=None, QInt8=None, QInt32=None, QUInt4x2=None,
    QUInt2x4=None,
)  # fmt: skip
NAMES = {  # by the names under which pickles have them
    "torch._utils._rebuild_tensor": rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": rebuild_tensor_v2,
    "torch._utils._rebuild_tensor_v3": rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": rebuild_parameter,
    "torch._tensor._rebuild_from_type_v2": rebuild_of_type,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": rebuild_moved,
    "torch._utils._rebuild_device_tensor_from_numpy": _unreadable("an array of numpy"),
    "torch._utils._rebuild_qtensor": _unreadable("a quantized tensor"),
    "torch._utils._rebuild_sparse_tensor": _unreadable("a sparse tensor"),
    "torch._utils._rebuild_nested_tensor": _unreadable("a nested tensor"),
    "torch._utils._rebuild_meta_tensor_no_storage": _unreadable("a tensor without numbers, of the meta device"),
    "torch._utils._rebuild_wrapper_subclass": _unreadable("a tensor of a subclass"),
    "torch.serialization._get_layout": _layout,
    "torch.Size": _size,
    "torch.device": torch.device,
    "torch.Tensor": _TensorType,
    "torch._tensor.Tensor": _TensorType,
    "torch.nn.parameter.Parameter": _TensorType,
} | {
    f"{module}.{name}Storage": _StorageType(dtype)
    for name, dtype in _STORAGES.items()
    for module in ("torch", "torch.storage", "torch.cuda")
}

"""Batches of tensors in dicts: split into chunks, changed row by row, repeated."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor


def _is_batch(value: Any) -> bool:
    return isinstance(value, (list, tuple)) or (torch.is_tensor(value) and value.ndim > 0)


def _sizes(values: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, int]]:
    for name, value in values:
        if isinstance(value, dict):
            yield from _sizes(value.items())
        elif _is_batch(value):
            yield name, len(value)


def split_args_and_kwargs(
    *args, split_size: int | None = None, **kwargs
) -> Iterator[tuple[float, tuple[tuple, dict[str, Any]]]]:
    """Cut the tensors, lists and tuples among the arguments, and in their dicts, along the batch; repeat the others.

    Args:
        split_size: largest size of a chunk; None leaves the batch whole.
    Yields:
        A chunk's share of the batch, in 0..1, and its (args, kwargs).
    Raises:
        ValueError: nothing among the arguments has a batch, or they differ in its size.
    """
    if split_size is None:
        yield 1.0, (args, kwargs)
        return
    if split_size < 1:
        raise ValueError(f"max_batch_size={split_size}; it must be at least 1")
    sizes = dict(_sizes([*enumerate(args), *kwargs.items()]))
    if len(set(sizes.values())) != 1:
        raise ValueError(f"arguments of the sizes {sizes or 'none'}; all must have one batch in common to be split")
    (batch,) = set(sizes.values())
    for start in range(0, batch, split_size):
        end = min(start + split_size, batch)

        def part(value, chunk=slice(start, end)):
            if isinstance(value, dict):
                return {name: part(item, chunk) for name, item in value.items()}
            return value[chunk] if _is_batch(value) else value

        yield (end - start) / batch, (tuple(map(part, args)), {key: part(value) for key, value in kwargs.items()})


def _cat(parts: list) -> Any:
    """Chunks of a tensor, of None, or of a named tuple of these, as one."""
    if isinstance(parts[0], tuple):
        return type(parts[0])(*map(_cat, zip(*parts)))
    return None if parts[0] is None else torch.cat(parts)


def prior_sample_in_chunks(method: Callable) -> Callable:
    """Let a method take `max_batch_size`: it is called for chunks of at most that many, and the results are joined."""

    @functools.wraps(method)
    def inner(self, *args, max_batch_size: int | None = None, **kwargs):
        chunks = split_args_and_kwargs(*args, split_size=max_batch_size, **kwargs)
        parts = [method(self, *args, **kwargs) for _, (args, kwargs) in chunks]
        return parts[0] if len(parts) == 1 else _cat(parts)

    return inner


def map_rows(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Change the tensors of a text condition, those of its extra conditions too; what else it holds stays."""
    if isinstance(value, dict):
        return {name: map_rows(item, change) for name, item in value.items()}
    return change(value) if torch.is_tensor(value) else value


def repeat_rows(text_cond: dict, rows: int) -> dict:
    """Repeat every prompt of a text condition so that there are `rows` of them, the copies of one prompt together."""
    if "text_embed" not in text_cond:
        return text_cond  # a foreign network's own condition
    repeats = rows // len(text_cond["text_embed"])
    if repeats == 1:
        return text_cond
    return map_rows(text_cond, lambda t: t.repeat_interleave(repeats, dim=0))

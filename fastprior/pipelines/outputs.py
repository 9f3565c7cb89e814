"""What a pipeline gives."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class ImageEmbeddings(NamedTuple):
    """image_embeds (rows, dim), and negative_image_embeds of the same shape, None where nothing says what they are.

    Read as diffusers' outputs are: by attribute, by name, or as a tuple.
    """

    image_embeds: Tensor | np.ndarray
    negative_image_embeds: Tensor | np.ndarray | None

    def __getitem__(self, name: str | int | slice) -> Any:
        return getattr(self, name) if isinstance(name, str) else tuple.__getitem__(self, name)

    def to_tuple(self) -> tuple:
        return tuple(self)


def arrays(tensors: Iterable[Tensor | None]) -> list[np.ndarray | None]:
    """NumPy's arrays; fp32 for bf16, which NumPy has not."""
    tensors = (t.float() if t is not None and t.dtype == torch.bfloat16 else t for t in tensors)
    return [None if t is None else t.cpu().numpy() for t in tensors]

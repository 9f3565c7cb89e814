"""Texts as CLIP encodes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    pass


Generators = torch.Generator | Sequence[torch.Generator] | None


class TextEncoding(NamedTuple):
    """What a prior is conditioned on, as CLIP gives it.

    Attributes:
        embeds: (prompts, embedding_proj_dim), the projected text embeddings.
        encodings: (prompts, num_embeddings, embedding_dim), the last hidden states.
        mask: (prompts, num_embeddings) bool, False where a token is padding.
    """

    embeds: Tensor
    encodings: Tensor
    mask: Tensor

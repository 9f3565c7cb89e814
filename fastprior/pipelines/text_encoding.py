"""Texts as CLIP encodes them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


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

"""Several samples of a prompt in one row of a step, which runs once what they share: the time tokens.

A time token sees the prompt and the tokens before it, not the noisy image, so it is the same for all samples.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MAX_TOKENS = 16  # of a row that holds several samples: what the kernel for GPUs takes


class RowLayout(NamedTuple):
    """The tokens of a row: those that its samples share, then the others of each sample but the last, then the last.

    Attributes:
        samples: how many.
        tokens: (n,) int64, where each token stands in the suffix of one sample.
        hidden: (n, n) bool, which tokens each must not see: those that stand behind it, or belong to another sample.
    """

    samples: int
    tokens: Tensor
    hidden: Tensor


def row_layout(samples: int, suffix: int, shared: int, device: torch.device) -> RowLayout | None:
    """Rows of as many of the `samples` of a prompt as divide them and fit; None where that is one.

    Args:
        samples: of each prompt.
        suffix: tokens of one sample.
        shared: how many of these, the first, are the same for all samples of a prompt.
    """
    own = suffix - shared
    samples = max(n for n in range(1, samples + 1) if samples % n == 0 and (n == 1 or shared + n * own <= MAX_TOKENS))
    if samples == 1:
        return None
    first, last = (torch.arange(n, device=device) for n in (samples * (own - 1), samples))
    parts = torch.arange(shared, device=device), shared + first % max(own - 1, 1), torch.full_like(last, suffix - 1)
    tokens = torch.cat(parts)
    sample = torch.cat((torch.full_like(parts[0], -1), first // max(own - 1, 1), last))
    other = (sample >= 0) & (sample != sample[:, None])
    return RowLayout(samples, tokens, other | (tokens > tokens[:, None]))

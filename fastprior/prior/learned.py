"""Learned step tables of a prior: which one a run takes, and whether it belongs to the weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from fastprior.checks import is_integer
from fastprior.diffusion.learned_tables import DTYPES, LearnedTable
from fastprior.diffusion.solvers import LEARNED, StepTable
from fastprior.models import snapshot
from fastprior.reading import quoted

NO_TABLES: Mapping[int, LearnedTable] = MappingProxyType({})


def digests(prior: nn.Module, dtypes: Iterable[str] = DTYPES) -> dict[str, str]:
    """SHA-256 of what a prior predicts with, for its weights in each of the dtypes that they may be cast to.

    So a table that was learned for weights of fp32 is known to belong to their casts, and to nothing else: neither to
    weights that training changed, however little, nor to a schedule, clamp or kind of prediction of another meaning.
    """
    state = prior.net.state_dict()
    return {name: _digest(prior, state, getattr(torch, name)) for name in dtypes}


@torch.no_grad()
def _digest(prior: nn.Module, state: Mapping[str, Tensor], dtype: torch.dtype) -> str:
    digest = hashlib.sha256(json.dumps(_meaning(prior)).encode())
    tensors = {key.replace("_orig_mod.", ""): value for key, value in state.items()}  # as torch.compile names them
    tensors[""] = prior.noise_scheduler.alphas_cumprod.double()
    for key in sorted(tensors):
        value = tensors[key].detach().cpu()
        if key and value.is_floating_point():
            value = value.to(dtype)
        if key.endswith(".rotary_emb.freqs"):  # which a load makes exact again
            value = value.bfloat16()
        digest.update(json.dumps([key, list(value.shape)]).encode())
        digest.update(memoryview(value.contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def _meaning(prior: nn.Module) -> tuple:
    return prior.prediction, *prior.sampling_clamp(), bool(prior.init_image_embed_l2norm)


def check_weights(prior: nn.Module, table: StepTable, state: Mapping[str, Tensor] | None = None) -> None:
    """Raise ValueError where a learned table belongs to other weights than the prior's, or those of a state dict.

    What is found of the prior's own is remembered for as long as they stay.
    """
    if not isinstance(table, LearnedTable):
        return
    dtype = next(prior.net.parameters()).dtype
    wanted = (table.digests or {}).get(str(dtype).removeprefix("torch."))
    if state is None:
        alphas = prior.noise_scheduler.alphas_cumprod
        key = "digest", *_meaning(prior), alphas.data_ptr(), 0 if alphas.is_inference() else alphas._version
        found = snapshot.of_numbers(prior.net, key, lambda: _digest(prior, prior.net.state_dict(), dtype))
    else:
        found = _digest(prior, state, dtype)
    if found != wanted:
        raise ValueError(
            f"solver={LEARNED!r}: the table of {len(table)} evaluations was learned for other weights than these; tune "
            "the prior again (`fastprior tune`), or choose another solver"
        )


def find_table(
    prior: nn.Module, steps: int | None, eta: float | None, spacing: str | None, cond_scale: float
) -> LearnedTable:
    """The table of a run of `solver="learned"`.

    Raises:
        ValueError: `eta` or `spacing` is given; there is no learned table of so many evaluations, or it was learned for
            other weights or guidance scales.
    """
    for name, value in (("eta", eta), ("spacing", spacing)):
        if value is not None:
            raise ValueError(f"{name}={quoted(value)}; a learned table has times and no noise, so it must be None")
    steps = prior.noise_scheduler.num_timesteps if steps is None else steps
    table = prior.learned_tables.get(int(steps)) if is_integer(steps) else None
    if table is None:
        have = ", ".join(map(str, sorted(prior.learned_tables))) or "none, which `fastprior tune` makes"
        raise ValueError(f"timesteps={quoted(steps)}; learned tables of this prior have these evaluations: {have}")
    table.check_scale(cond_scale)
    check_weights(prior, table)
    return table


def scales_of(prior: nn.Module, solver: str | None, steps: int | None) -> tuple[float, ...]:
    """Guidance scales to try a sampler with: none and a usual one, or the ends of what a table was learned for."""
    table = prior.learned_tables.get(steps) if solver == LEARNED and is_integer(steps) else None
    return (1.0, 3.0) if table is None else tuple(dict.fromkeys(end for pair in table.scales for end in pair))

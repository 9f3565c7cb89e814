"""What tells one prior, CLIP or step table from another: hashes, by which a run is known to be that of a manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fastprior.diffusion.learned_tables import LearnedTable
from fastprior.diffusion.solvers import StepTable
from fastprior.prior.diffusion_prior import DiffusionPrior
from fastprior.prior.learned import digests

WHERE_FROM = "pretrained", "cache_dir"  # where weights of a CLIP come from, which says nothing that they do not


def _sha256(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def of_prior(prior: DiffusionPrior) -> str:
    """SHA-256 of all that a prior predicts with: weights, schedule, and how the network is built."""
    return _sha256(digests(prior, ["float32"])["float32"], prior.net.config)


def of_table(table: StepTable) -> str | None:
    """SHA-256 of a learned table's times and numbers; None for others, which their names and times say."""
    return _sha256(table.times, table.rows.tolist()) if isinstance(table, LearnedTable) else None


def of_clip(clip: nn.Module) -> dict[str, Any]:
    """What a CLIP is, wherever its weights came from: model and options as it describes itself, and their SHA-256."""
    description = getattr(clip, "description", None)
    said = dict(description) if isinstance(description, Mapping) else {"model": type(clip).__name__}
    options = {
        name: value for name, value in dict(said.get("base_model_kwargs") or {}).items() if name not in WHERE_FROM
    }
    return {
        "model": str(said.get("model")),
        "options": json.loads(json.dumps(options, default=str)),
        "weights": _state(clip),
    }


@torch.no_grad()
def _state(module: nn.Module) -> str:
    """SHA-256 of the tensors of a module by name, dtype and shape."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if torch.is_tensor(tensor):
            digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
            digest.update(memoryview(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()

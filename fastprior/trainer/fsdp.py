"""Weights in shards, a part of each parameter on every process (FSDP), and what must see them whole."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from fastprior.prior.diffusion_prior import DiffusionPrior


def wants_shards(accelerator: Accelerator) -> bool:
    """Whether FSDP was asked for. On CPUs accelerate does not say so itself, but for the variable of its launcher."""
    if accelerator.distributed_type == "MULTI_CPU":
        return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return accelerator.distributed_type == "FSDP"


def equalize(prior: nn.Module) -> None:
    """Give every process the first one's weights and buffers."""
    for value in prior.state_dict().values():
        torch.distributed.broadcast(value, src=0)


def shard(prior: DiffusionPrior, accelerator: Accelerator) -> None:
    """Keep this process's part of every parameter but those of the CLIP; the whole prior is gathered as one.

    One unit, because the prefix cache calls methods of the layers, and FSDP gathers where a module is called.
    """
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    kept = set() if prior.clip is None else set(prior.clip.parameters())
    fully_shard(prior, mesh=mesh, reshard_after_forward=False, ignored_params=kept)


def shard_like(module: nn.Module, model: nn.Module) -> None:
    """Divide the parameters of a module, whose values all processes share, as those of `model` are."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            owner, _, leaf = name.rpartition(".")
            owner = module.get_submodule(owner)
            part = part_like(getattr(owner, leaf).detach(), parameter)
            setattr(owner, leaf, nn.Parameter(part, requires_grad=False))


def part_like(value: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, divided as `like` is; the tensor itself where that is not divided."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def whole(value: Tensor) -> Tensor:
    """The tensor of which each process holds a part; every process must call."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def collected(tree: Any, keep: bool) -> Any:
    """The tensors of nested dicts that are in shards, whole and on the CPU; every process must call.

    keep: whether this process wants them; the others keep their parts.
    """

    def collect(part: DTensor) -> Tensor:
        value = part.full_tensor()
        return value.cpu() if keep else part

    return tree_map_only(DTensor, collect, tree)


def local(value: Tensor) -> Tensor:
    """What lies on this process."""
    return value.to_local() if isinstance(value, DTensor) else value


def without_clip(state: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a prior's state dict, or of its named parameters, that are not its CLIP's."""
    return {key: value for key, value in state.items() if not key.startswith("clip.")}


class Frame:
    """A prior without weights, which takes those of a sharded one for as long as they are needed whole."""

    def __init__(self, prior: DiffusionPrior):
        clip = prior.clip
        own = without_clip(dict(prior.named_parameters())).values()
        memo = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in own}
        self.prior = copy.deepcopy(prior, {**memo, id(clip): clip}).eval()
        self._empty = without_clip(self.prior.state_dict())

    @contextmanager
    def filled(self, source: nn.Module) -> Iterator[DiffusionPrior]:
        """The prior with the weights of `source`, in eval mode; every process must enter."""
        weights = {key: whole(value) for key, value in without_clip(source.state_dict()).items()}
        self.prior.load_state_dict(weights, strict=False, assign=True)
        try:
            yield self.prior
        finally:
            self.prior.load_state_dict(self._empty, strict=False, assign=True)

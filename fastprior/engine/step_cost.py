"""What a denoising step costs: the bytes that it reads, the kernels that it launches, and how long both should take."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastprior.kernels import ops
from fastprior.models.dalle2.network import Conditioning, DiffusionPriorNetwork

if TYPE_CHECKING:
    from fastprior.models.prior_transformer import forward

LAUNCH_SECONDS = 1.7e-6
NO_KERNEL = "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"


class StepReads(NamedTuple):
    """Bytes that a step reads.

    Attributes:
        weights: of the transformer's matrices.
        prefix: of keys and values of the prefix.
        tables: of the transformer's vectors, bias and rotary tables, and a row each of the tables of the run.
    """

    weights: int
    prefix: int
    tables: int


def step_reads(net: DiffusionPriorNetwork, cond: Conditioning, null_preds: Tensor, rows: Tensor) -> StepReads:
    """For a network, and what `sampler.denoise_step` takes besides."""
    cache, (matrices, vectors) = cond.cache, _weights(net.causal_transformer)
    tables = *vectors, cache.bias, *(cache.rotary or ()), cond.time_tokens[:1], null_preds[:1], rows[:1]
    return StepReads(*(sum(t.nbytes for t in read) for read in (matrices, (cache.k, cache.v), tables)))


def transformer_reads(prior: nn.Module, cond: forward.Conditioning, rows: Tensor) -> StepReads:
    """The same for a `PriorTransformer`, or what is like one: its blocks, and what its suffix tokens pass besides."""
    modules = prior.transformer_blocks, prior.proj_in, prior.norm_in, prior.norm_out, prior.proj_to_clip_embeddings
    matrices, vectors = _weights(*(module for module in modules if module is not None))
    suffix = 2 + (prior.prd_embedding is not None)
    embeddings = prior.positional_embedding[:, -suffix:], prior.prd_embedding, cond.time_tokens[:1]
    tables = *vectors, *(t for t in embeddings if t is not None), rows[:1]
    return StepReads(*(sum(t.nbytes for t in read) for read in (matrices, cond.prefix[:2], tables)))


def _weights(*modules: nn.Module) -> Iterable[list[Tensor]]:
    """Matrices and vectors."""
    weights = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    return ([t for t in weights if t.ndim == dims] for dims in (2, 1))


def step_seconds(read_bytes: int, bandwidth: float, launches: int) -> float:
    """`read_bytes / bandwidth + launches * 1.7e-6`: how long a step of few rows should take on a GPU.

    Reading comes at full bandwidth, and each kernel waits for the one before. That takes 1.7 µs a phase in the fastest
    decoder known to us: one kernel that reads Llama-1B in about 120 phases at 78 % of the bandwidth of an H100
    (Spector et al. 2025, Look Ma, No Bubbles!). Arithmetic is left out: up to about 60 rows of 16 bits it is hidden.

    Args:
        read_bytes: see `StepReads`.
        bandwidth: bytes per second.
        launches: kernels, one after the other; 0 on the CPU.
    """
    return read_bytes / bandwidth + launches * LAUNCH_SECONDS


class CountLaunches(TorchDispatchMode):
    """Counts the kernels that a GPU runs for what runs within it, in this thread: every node of a graph of it.

    Ours are those that their launchers choose; the launchers run, and nothing is launched. Each operation of PyTorch is
    one, but for those that give a view, or memory with nothing in it. torch.compile would fuse some of them.

    Attributes:
        count: of all of them.
        names: of each, in order.
    """

    def __init__(self):
        super().__init__()
        self.names: list[str] = []
        self._workspace = ops.Workspace()

    @property
    def count(self) -> int:
        return len(self.names)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        launcher = ops.launcher(func.name()) if func.namespace == "fastprior" else None
        if launcher is None:
            out = func(*args, **(kwargs or {}))
            if _is_kernel(func, out):
                self.names.append(func.name())
            return out
        from fastprior.kernels.gpu import launch

        with launch.instead(self._note), ops.sharing(self._workspace), self:
            return launcher(*args, **(kwargs or {}))

    def _note(self, kernel, *_) -> None:
        self.names.append(kernel.__name__)


def _is_kernel(func, out) -> bool:
    tensors = [t for t in tree_leaves(out) if torch.is_tensor(t)]
    views = all(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
    return any(t.numel() for t in tensors) and not views and func.overloadpacket.__name__ not in NO_KERNEL

"""Which way a run goes, and what of a prior or its network stands against the fast one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from fastprior.diffusion.schedule import NoiseScheduler
from fastprior.diffusion.solvers import StepTable
from fastprior.models.dalle2.layers import Attention, FeedForward
from fastprior.models.dalle2.network import DiffusionPriorNetwork
from fastprior.models.dalle2.transformer import CausalTransformer

if TYPE_CHECKING:
    from fastprior.prior.diffusion_prior import DiffusionPrior


NETWORK_METHODS = ("forward", "forward_with_cond_scale", "prefill", "step", "null_table")


PRIOR_METHODS = ("p_mean_variance", "p_sample", "l2norm_clamp_embed")


SCHEDULE_METHODS = ("q_posterior", "predict_start_from_v", "predict_start_from_noise", "predict_noise_from_start")


HOOKS = ("_forward_hooks", "_forward_pre_hooks")


@dataclass(frozen=True)
class SamplingPlan:
    """Which way a run will go, and why.

    Attributes:
        path: "cached" (one prefill, then `suffix_tokens` tokens a step; fewer for several samples of a prompt, see
            `DiffusionPriorNetwork.share`) or "plain" (the whole network each step).
        reasons: why not "cached"; empty when it is.
        guidance: "none", "null table" (free: no second pass), "second branch" (both in one batch) or "two passes".
        table: the solver's coefficients.
        clamp, radius: how a predicted x0 is clamped, see `kernels.reference.clamp_x0`.
        prefix_tokens, suffix_tokens: None on the plain path.
        graphs: whether the steps are replayed as CUDA graphs, see `DiffusionPrior`.
        graph_reasons: why not; empty where they are.
    """

    path: str
    reasons: tuple[str, ...]
    guidance: str
    table: StepTable
    clamp: str | None
    radius: float
    prefix_tokens: int | None
    suffix_tokens: int | None
    graph_reasons: tuple[str, ...] = ()

    @property
    def graphs(self) -> bool:
        return not self.graph_reasons

    def __str__(self) -> str:
        lines = [f"{self.path} path, {self.table.solver}, {len(self.table)} evaluations, guidance: {self.guidance}"]
        if self.path == "cached":
            lines.append(f"prefix of {self.prefix_tokens} tokens once per prompt, {self.suffix_tokens} tokens per step")
        lines += [f"not cached: {reason}" for reason in self.reasons]
        if self.graphs:
            lines.append("replayed as CUDA graphs")
        return "\n".join([*lines, *(f"no CUDA graphs: {reason}" for reason in self.graph_reasons)])


def is_overridden(instance: object, name: str, base: type) -> bool:
    """Whether a subclass, or an assignment on the instance, replaced a method of `base`."""
    return name in vars(instance) or getattr(type(instance), name) is not getattr(base, name)


def _overrides(instance: object, names: tuple[str, ...], base: type) -> list[str]:
    return [f"{type(instance).__name__}.{name} is overridden" for name in names if is_overridden(instance, name, base)]


def network_obstacles(net: nn.Module, dropout: bool = False) -> list[str]:
    """Why the network cannot run as prefill and steps; empty when it can. `dropout` may be active where it says so."""
    if hasattr(net, "obstacles"):  # a network that knows
        return net.obstacles(dropout)
    if not isinstance(net, DiffusionPriorNetwork):
        return [f"net is a {type(net).__name__}, not a fastprior.DiffusionPriorNetwork"]
    found = _overrides(net, NETWORK_METHODS, DiffusionPriorNetwork)
    transformer = net.causal_transformer
    if type(transformer) is not CausalTransformer:
        return [*found, f"net.causal_transformer is a {type(transformer).__name__}"]
    blocks = [net, transformer, *(block for layer in transformer.layers for block in layer)]
    for block in blocks[2:]:
        if type(block) not in (Attention, FeedForward):
            found.append(f"a {type(block).__name__} stands in the transformer's layers")
    for block in blocks:
        if any(getattr(block, hooks) for hooks in HOOKS):
            found.append(f"{type(block).__name__} has a forward hook, which the cached path would not call")
        if block is not net and "forward" in vars(block):
            found.append(f"the forward of a {type(block).__name__} was replaced")
    if not dropout and net.training and any(isinstance(m, nn.Dropout) and m.p > 0 for m in net.modules()):
        found.append("dropout is active (the network is in training mode)")
    return found


def method_overrides(prior: DiffusionPrior) -> list[str]:
    """The step methods of the prior, or of its schedule, that a user replaced; each must be called at every step."""
    from fastprior.prior.diffusion_prior import DiffusionPrior

    schedule = prior.noise_scheduler
    return [
        *_overrides(prior, PRIOR_METHODS, DiffusionPrior),
        *_overrides(schedule, SCHEDULE_METHODS, NoiseScheduler),
    ]


def obstacles(prior: DiffusionPrior) -> list[str]:
    """Why a run of this prior must call methods one by one; empty when the cached path gives the same result."""
    return [*method_overrides(prior), *network_obstacles(prior.net)]

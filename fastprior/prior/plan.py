"""Which way a run goes, and what of a prior or its network stands against the fast one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from fastprior.diffusion.solvers import StepTable
from fastprior.models.dalle2.layers import Attention, FeedForward
from fastprior.models.dalle2.network import DiffusionPriorNetwork
from fastprior.models.dalle2.transformer import CausalTransformer

NETWORK_METHODS = "forward", "forward_with_cond_scale", "prefill", "step", "null_table"
HOOKS = "_forward_hooks", "_forward_pre_hooks"


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
        overrides: names of the step methods of the prior, or of its schedule, that a user replaced: each is called at
            every step.
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
    overrides: tuple[str, ...] = ()

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


def overridden(instance: object, names: tuple[str, ...], base: type) -> tuple[str, ...]:
    """Find which of some methods of `base` were replaced."""
    return tuple(name for name in names if is_overridden(instance, name, base))


def network_obstacles(net: nn.Module, dropout: bool = False) -> list[str]:
    """Why the network cannot run as prefill and steps; empty when it can. `dropout` may be active where it says so."""
    if hasattr(net, "obstacles"):  # a network that knows
        return net.obstacles(dropout)
    if not isinstance(net, DiffusionPriorNetwork):
        return [f"net is a {type(net).__name__}, not a fastprior.DiffusionPriorNetwork"]
    replaced = overridden(net, NETWORK_METHODS, DiffusionPriorNetwork)
    found = [f"{type(net).__name__}.{name} is overridden" for name in replaced]
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


def make_plan(
    net: nn.Module,
    owners: Sequence[tuple[object, tuple[str, ...], type]],
    table: StepTable,
    cond_scale: float,
    clamp: str | None,
    radius: float,
) -> SamplingPlan:
    """The plan of a run, without graphs; `owners` of step methods come with the arguments of `overridden`."""
    replaced = [(type(owner).__name__, name) for owner, *known in owners for name in overridden(owner, *known)]
    reasons = *(f"{cls}.{name} is overridden" for cls, name in replaced), *network_obstacles(net)
    guidance, path, tokens = "none", "plain" if reasons else "cached", (None, None)
    if cond_scale != 1 and reasons:
        guidance = "two passes"
    elif cond_scale != 1:
        guidance = "second branch" if net.null_sees_image else "null table"
    if not reasons:
        tokens = net.prefix_tokens, net.suffix_tokens
    overrides = tuple(name for _, name in replaced)
    return SamplingPlan(path, reasons, guidance, table, clamp, radius, *tokens, overrides=overrides)

"""Which way a run goes, and what of a prior or its network stands against the fast one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fastprior.diffusion.schedule import NoiseScheduler
from fastprior.diffusion.solvers import StepTable
from fastprior.models import patches, snapshot
from fastprior.models.dalle2.network import DiffusionPriorNetwork
from fastprior.models.dalle2.transformer import CausalTransformer

STEP_METHODS = "p_mean_variance", "p_sample", "l2norm_clamp_embed"
SCHEDULE_METHODS = "q_posterior", "predict_start_from_v", "predict_start_from_noise", "predict_noise_from_start"
NETWORK_METHODS = "forward", "forward_with_cond_scale", "prefill", "step", "null_table"

_ORIGINALS: dict[tuple[type, str], object] = {}  # methods of classes, before anybody patches them


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
        patched: what was patched of PyTorch or of this package, besides the `reasons`: modules are called one by one
            for it, where else one kernel computes several.
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
    patched: tuple[str, ...] = ()

    @property
    def graphs(self) -> bool:
        return not self.graph_reasons

    def __str__(self) -> str:
        solver = self.table.solver + (f" at {self.table.spacing} times" if self.table.spacing else "")
        lines = [f"{self.path} path, {solver}, {len(self.table)} evaluations, guidance: {self.guidance}"]
        if self.path == "cached":
            lines.append(f"prefix of {self.prefix_tokens} tokens once per prompt, {self.suffix_tokens} tokens per step")
        lines += [f"not cached: {reason}" for reason in self.reasons]
        lines += [f"modules are called one by one: {reason}" for reason in self.patched]
        if self.graphs:
            lines.append("replayed as CUDA graphs")
        return "\n".join([*lines, *(f"no CUDA graphs: {reason}" for reason in self.graph_reasons)])


def remember(cls: type) -> type:
    """Keep the methods of a class as they are: a patch of the class is found then as an override is."""
    _ORIGINALS.update({(cls, name): method for name, method in vars(cls).items()})
    return cls


remember(DiffusionPriorNetwork)
remember(NoiseScheduler)


def is_overridden(instance: object, name: str) -> bool:
    """Whether a subclass, an assignment on the instance, or a patch of the class replaced one of our methods."""
    kept = [_ORIGINALS[cls, name] for cls in type(instance).__mro__ if (cls, name) in _ORIGINALS]
    return name in vars(instance) or getattr(type(instance), name) is not (kept[0] if kept else None)


def overridden(instance: object, names: tuple[str, ...]) -> tuple[str, ...]:
    """Find which of some methods of ours were replaced."""
    return tuple(name for name in names if is_overridden(instance, name))


def network_obstacles(net: nn.Module, dropout: bool = False) -> list[str]:
    """Why the network cannot run as prefill and steps; empty when it can. `dropout` may be active where it says so."""
    if hasattr(net, "obstacles"):  # a network that knows
        return net.obstacles(dropout)
    if not isinstance(net, DiffusionPriorNetwork):
        return [f"net is a {type(net).__name__}, not a fastprior.DiffusionPriorNetwork"]
    replaced = overridden(net, NETWORK_METHODS)
    found = [f"{type(net).__name__}.{name} is overridden" for name in replaced]
    if patches.has_hook(net):
        found.append(f"{type(net).__name__} has a forward hook, which the cached path would not call")
    transformer = snapshot.held(net).causal_transformer
    if type(transformer) is not CausalTransformer:
        return [*found, f"net.causal_transformer is a {type(transformer).__name__}"]
    obstacles, drops_out = snapshot.once(
        transformer, "obstacles", lambda: (transformer.obstacles(), transformer.drops_out())
    )
    found += obstacles
    dropping = net.training and any(isinstance(m, nn.Dropout) and m.training and m.p > 0 for m in net.modules())
    if not dropout and (dropping or drops_out):
        found.append("dropout is active")
    return found


def make_plan(prior: nn.Module, table: StepTable, cond_scale: float, clamp: str | None, radius: float) -> SamplingPlan:
    """The plan of a run of a `DiffusionPrior`, without graphs."""
    net, owners = prior.net, ((prior, STEP_METHODS), (prior.noise_scheduler, SCHEDULE_METHODS))
    replaced = [(type(owner).__name__, name) for owner, names in owners for name in overridden(owner, names)]
    reasons = *(f"{cls}.{name} is overridden" for cls, name in replaced), *network_obstacles(net)
    guidance, path, tokens = "none", "plain" if reasons else "cached", (None, None)
    if cond_scale != 1 and reasons:
        guidance = "two passes"
    elif cond_scale != 1:
        guidance = "second branch" if net.null_sees_image else "null table"
    if not reasons:
        tokens = net.prefix_tokens, net.suffix_tokens
    overrides = tuple(name for _, name in replaced)
    patched = patches.found().called
    return SamplingPlan(path, reasons, guidance, table, clamp, radius, *tokens, overrides=overrides, patched=patched)

"""Steps of priors as the nodes that a graph of them has: launches with their grids and arguments, PyTorch's operations.

Nothing runs, and weights take no memory.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

sys.path.append(str(Path(__file__).resolve().parents[1]))
import priors
from meta_runs import meta_run

import fastprior
from fastprior.diffusion.diffusers_schedules import DiffusersSchedule
from fastprior.engine.step_cost import CountLaunches
from fastprior.engine.steps import StepInputs
from fastprior.kernels import ops
from fastprior.kernels.gpu import launch
from fastprior.models.prior_transformer.model import PriorTransformer
from fastprior.pipelines.runs import PromptRun
from fastprior.pipelines.text_encoding import TextEncoding
from fastprior.prior.loop import CachedSteps

MODELS = "D2-small", "D2-large", "PT-1B"
DTYPE = torch.bfloat16


@dataclass(frozen=True, eq=False)
class Operation:
    """An operation of PyTorch, one kernel: the bytes of all that it takes and gives, and what it gives."""

    name: str
    nbytes: int
    made: tuple[Tensor, ...] = field(repr=False)


@dataclass(frozen=True, eq=False)
class Launch:
    """A launch of one of our kernels.

    Attributes:
        variant: what is compiled.
        programs: of its grid.
        tensors: arguments, by name.
        integers: the same.
    """

    variant: launch.Variant
    programs: int
    tensors: dict[str, Tensor] = field(repr=False)
    integers: dict[str, int]

    @property
    def pointers(self) -> list[str | None]:
        """The names of the arguments that it is launched with, in order; None for those that are no pointers."""
        return [name if kind.startswith("*") else None for name, kind in self.variant.signature if kind != "constexpr"]

    @property
    def dependent(self) -> bool:
        return dict(self.variant.flags).get("launch_pdl", False)

    @property
    def alike(self) -> tuple:
        """Equal for launches that do the same on a device, with other addresses."""
        return self.variant, self.programs, tuple(self.integers.items()), tuple(t.shape for t in self.tensors.values())


class _Trace(CountLaunches):
    """Keeps what `CountLaunches` counts, in order."""

    def __init__(self):
        super().__init__()
        self.nodes: list[Launch | Operation] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = self.count
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func.namespace != "fastprior" and self.count > before:
            given, made = ([t for t in tree_leaves(tree) if torch.is_tensor(t)] for tree in ((args, kwargs), out))
            nbytes = sum(t.numel() * t.itemsize for t in given + made)
            self.nodes.append(Operation(func.name(), nbytes, tuple(made)))
        return out

    def _note(self, kernel, grid, args, options, constants) -> None:
        super()._note(kernel)
        self.nodes.append(launched(kernel, grid, args, options, constants))


def launched(kernel, grid, args, options, constants) -> Launch:
    """A launch of what `launch.instead` hands over."""
    flags = dict(
        cooperative=options.get("launch_cooperative_grid", False), dependent=options.get("launch_pdl", False),
        num_warps=options["num_warps"], num_stages=options["num_stages"],
        registers=options.get("maxnreg"),
    )  # fmt: skip
    with launch.recording() as recorded:
        launch.launch(kernel, grid, *args, **flags, **constants)
    named = dict(zip(kernel.arg_names, args))
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    integers = {name: int(value) for name, value in named.items() if isinstance(value, int)}
    return Launch(recorded[0], math.prod(grid), tensors, integers)


def trace(step: Callable[[], object]) -> list[Launch | Operation]:
    """The nodes of anything that launches by `launch.launch` or runs PyTorch's operations, once it is warm."""
    traced = _Trace()
    with launch.instead(traced._note), traced:
        for _ in range(2):  # what the first clears is cleared
            traced.nodes.clear()
            step()
    return traced.nodes


def storage(t: Tensor) -> int:
    """What tensors have in common that share memory."""
    return t.untyped_storage()._cdata


def launched_one_by_one(model: str) -> tuple[Callable[[], object], int]:
    """A step as the engine captures it: each operation of the model is a launch, and PyTorch does what lies between.

    Without torch.compile, which would fuse some of the operations of PyTorch. See `STEPS`.
    """
    plan = None
    if model != "PT-1B":
        shallow = fastprior.DiffusionPriorNetwork(**priors.D2[model] | dict(depth=1))
        options = dict(image_embed_dim=shallow.dim, timesteps=1000, cond_drop_prob=0.1)
        plan = fastprior.DiffusionPrior(shallow, **options).eval().sampling_plan(64, 1.0)
    with torch.device("meta"):
        if plan is None:
            net = PriorTransformer(**priors.PT_1B)
        else:
            net = fastprior.DiffusionPriorNetwork(**priors.D2[model])
    net = net.eval().to(DTYPE).to_empty(device="cpu")  # of memory that is never touched
    schedule = DiffusersSchedule("UnCLIPScheduler", **priors.UNCLIP)
    table = schedule.table(25)
    within = _faked()
    with within():
        if plan is not None:
            steps, width, length = CachedSteps(net, plan), net.dim, priors.D2_SMALL["max_text_len"]
            text = dict(text_embed=torch.empty(1, width), text_encodings=torch.empty(1, length, width))
            step, inputs = steps.step, steps.prefill(text, 1)
        else:
            width, length = priors.PT_1B["embedding_dim"], priors.PT_1B["num_embeddings"]
            embeds, encodings = torch.empty(2, width, dtype=DTYPE), torch.empty(2, length, width, dtype=DTYPE)
            text = TextEncoding(embeds, encodings, torch.ones(2, length, dtype=torch.bool))
            run = PromptRun(net, schedule, table, text, [0, 1], 1, 1, True, 4.0)
            cond = net.share(net.padded_prefill(*text, torch.tensor(table.times), None), 1)
            step, inputs = run.step(net), StepInputs(cond, table.rows.float())
        state, scale, index = torch.empty(3, 1, width), torch.ones(()), torch.zeros((), dtype=torch.int64)
        workspace = ops.Workspace()

    def one() -> object:
        with within(), ops.sharing(workspace):
            return step(inputs, scale, *state, index)

    return one, 1


def _faked() -> Callable[[], contextlib.AbstractContextManager]:
    """What makes every tensor one of shape alone, and takes the launchers, within its blocks."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)

    @contextlib.contextmanager
    def within():
        with ops.using("triton"), mode, torch.no_grad():
            yield

    return within


def dependent_launches(model: str) -> tuple[Callable[[], object], int]:
    """Steps of a run of kernels alone, as a graph of several has them: each launch but the first is dependent."""
    run, steps = meta_run(model, DTYPE), 4
    return functools.partial(run.advance, steps), steps


# name -> model -> what launches steps at batch 1, in bf16, of PT-1B with guidance, and how many
STEPS: dict[str, Callable[[str], tuple[Callable[[], object], int]]] = {
    "launched one by one": launched_one_by_one,
    "dependent launches": dependent_launches,
}


def written(nodes: Sequence[Launch | Operation], by_kernel: Callable[[Launch], set[str]]) -> frozenset[int]:
    """The storages that some node writes.

    Args:
        by_kernel: gives the names of the arguments that a launch writes.
    """
    found: set[int] = set()
    for node in nodes:
        made = node.made if isinstance(node, Operation) else [node.tensors[name] for name in by_kernel(node)]
        found |= set(map(storage, made))
    return frozenset(found)

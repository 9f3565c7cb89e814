"""Runs of launches alone: the models' own steps, with no operation of PyTorch between them."""

import copy
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastprior import PriorSampler
from fastprior.diffusion.diffusers_schedules import DiffusersSchedule
from fastprior.engine.runs import DeviceRun
from fastprior.engine.steps import Noise, StepInputs, bind, run_table
from fastprior.kernels import ops
from fastprior.kernels.gpu import attend_project, launch, skinny_linear
from fastprior.models.prior_transformer.model import PriorTransformer
from fastprior.models.quantise import quantised
from fastprior.pipelines.runs import PromptRun
from fastprior.pipelines.text_encoding import TextEncoding
from fastprior.prior import loop
from helpers.kernel_checks import DEVICE, check
from helpers.priors import make_prior, make_text

FP16, STEPS = torch.float16, 3
NET = dict(dim=64, depth=2, dim_head=16, heads=3, num_timesteps=20)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter runs one after the other."""
    for module in skinny_linear, attend_project:
        monkeypatch.setattr(module, "MULTIPROCESSORS", 2)


@dataclass
class Dalle2:
    """Runs of a `DiffusionPrior` with guidance, in fp16 or fp64 of the same weights."""

    net: dict
    prompts: int = 1
    samples: int = 1
    kind: str | None = None
    solver: str = "ddpm"
    clamp: str | None = None
    scale: float = 2.0

    def __post_init__(self):
        self.prior = make_prior(NET | self.net, timesteps=20, clamp=self.clamp).to(DEVICE)
        randomise(self.prior.net)
        steps = dict(timesteps=20) if self.solver == "ddpm" else dict(timesteps=4)
        self.plan = self.prior.sampling_plan(cond_scale=self.scale, solver=self.solver, **steps)
        text = make_text(self.prompts, NET["dim"])
        self.text = {name: t.to(DEVICE, FP16) for name, t in text.items()}

    def begin(self, dtype: torch.dtype = FP16):
        """What `run_table` asks for, by the backend that is on; the rows of x; and the table."""
        net, wide = copy.deepcopy(self.prior.net).to(dtype), torch.promote_types(dtype, torch.float32)
        twin = None if self.kind is None else quantised(net, self.kind)
        steps, rows = loop.CachedSteps(net, self.plan, twin), self.prompts * self.samples
        inputs = steps.prefill({name: t.to(dtype) for name, t in self.text.items()}, self.samples)
        inputs = inputs._replace(rows=inputs.rows.to(wide), null_table=inputs.null_table.to(wide))
        run = steps.run(inputs, self.scale, rows)
        bound = bind(steps.step, inputs, torch.tensor(self.scale, dtype=wide, device=DEVICE)) if run is None else run
        return bound, (rows, NET["dim"]), self.plan.table


@dataclass
class Transformer:
    """Runs of a `PriorTransformer` for texts of several lengths, a table of the schedule's and, with guidance, both."""

    prompts: int = 1
    samples: int = 1
    guidance: bool = True
    kind: str | None = None
    schedule: str = "UnCLIPScheduler"
    lengths: tuple[int, ...] = (7, 3, 5)

    def __post_init__(self):
        torch.manual_seed(0)
        sizes = dict(num_attention_heads=2, attention_head_dim=32, num_layers=2, embedding_dim=48, num_embeddings=7)
        self.prior = PriorTransformer(**sizes, additional_embeddings=4).eval().to(DEVICE, FP16)
        randomise(self.prior)
        groups = self.prompts * (1 + self.guidance)
        mask = torch.arange(7) < torch.tensor(self.lengths)[torch.arange(groups) % len(self.lengths), None]
        self.text = TextEncoding(torch.randn(groups, 48), torch.randn(groups, 7, 48), mask)
        self.rules = DiffusersSchedule(self.schedule, prediction_type="sample")

    def begin(self, dtype: torch.dtype = FP16):
        prior, wide = copy.deepcopy(self.prior).to(dtype), torch.promote_types(dtype, torch.float32)
        twin = prior if self.kind is None else quantised(prior, self.kind)
        text = TextEncoding(*(t.to(DEVICE, FP16 if t.is_floating_point() else None) for t in self.text))
        prefixes, table = [*range(len(text.mask))], self.rules.table(STEPS)
        run = PromptRun(prior, self.rules, table, text, prefixes, self.prompts, self.samples, self.guidance, 3.0)
        x = torch.empty(run.rows, 48, dtype=wide, device=DEVICE)
        return run.begin(twin, run.step(twin), x)[0], tuple(x.shape), table


def randomise(net: torch.nn.Module) -> None:
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in net.parameters():
            noise = torch.randn(p.shape, generator=draw).to(p)
            p.copy_(noise * 0.2 + (p.ndim == 1)) if p.ndim < 2 or not p.any() else p.add_(noise * 0.02)


@torch.no_grad()
def result(case, backend: str, dtype: torch.dtype = FP16) -> torch.Tensor:
    """x behind the first few steps of a case."""
    with ops.using(backend):
        bound, shape, table = case.begin(dtype)
        assert isinstance(bound, DeviceRun) == (backend == "triton")
        table = first_steps(table)
        noise = map(lambda t: t.to(torch.promote_types(dtype, torch.float32)), drawn(shape))
        return run_table(table, bound, next(noise), noise).clone()


def first_steps(table):
    rows = {name: getattr(table, name)[:STEPS] for name in ("times", "draws_noise")}
    return type(table)(**{**vars(table), **rows})


def drawn(shape):
    return Noise(shape, torch.device(DEVICE), torch.Generator(DEVICE).manual_seed(3))


def check_case(case) -> None:
    got = result(case, "triton")
    check(got, result(case, "reference", torch.float64), result(case, "reference"))


@pytest.mark.slow
@pytest.mark.parametrize("case", [
    dict(net={}), dict(net=dict(normformer=True)), dict(net=dict(normformer=True), prompts=2),
    dict(net={}, samples=2), dict(net=dict(normformer=True, num_time_embeds=2), prompts=2, samples=2),
    dict(net=dict(normformer=True), kind="int8"), dict(net={}, kind="int8", prompts=2),
    dict(net=dict(cosine_sim=False, rotary_emb=False), solver="dpm++"), dict(net={}, clamp="l2", solver="dpm++"),
    dict(net={}, scale=1.0),
], ids=str)  # fmt: skip
def test_dalle2(case):
    check_case(Dalle2(**case))


@pytest.mark.slow
@pytest.mark.parametrize("case", [
    dict(), dict(guidance=False), dict(prompts=2), dict(prompts=2, samples=2), dict(kind="int8"),
    dict(lengths=(7,)), dict(schedule="DDIMScheduler"),
], ids=str)  # fmt: skip
def test_transformer(case):
    check_case(Transformer(**case))


@pytest.mark.slow
@pytest.mark.parametrize("case", [
    Dalle2(dict(normformer=True)), Dalle2(dict(normformer=True), prompts=2), Transformer(prompts=2)
], ids=["one row", "two rows", "transformer"])  # fmt: skip
def test_norms_of_rows_that_are_not_held(case, monkeypatch):
    monkeypatch.setattr(skinny_linear, "holds", lambda rows, dim: False)
    with ops.using("triton"):
        names = launches(case.begin()[0])
    assert names.count("layer_norm") == (2 * 4 + 1 if isinstance(case, Dalle2) else 2 * 2 + 1)
    check_case(case)


def launches(run) -> list[str]:
    """The kernels of a step, within which no operation of PyTorch runs."""
    names, operations = [], []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if not all(r.alias_info is not None for r in func._schema.returns):  # views compute nothing
                operations.append(func)
            return func(*args, **kwargs or {})

    def note(kernel, *_):
        names.append(kernel.__name__.strip("_").removesuffix("_fwd_kernel"))

    with launch.instead(note), Watch():
        run.advance(1)
    assert not operations and run.launches == len(names)
    return names


@pytest.mark.parametrize("case, wanted", [
    (Dalle2({}), ["skinny_linear", "attend_project", "skinny_linear", "skinny_linear"]),
    (Dalle2({}, samples=2), ["skinny_linear", "attend_project", "skinny_linear", "skinny_linear"]),
    (Dalle2({}, prompts=2), ["skinny_linear", "decode_attention", *["skinny_linear"] * 3]),
    (Transformer(), ["skinny_linear", "decode_attention", *["skinny_linear"] * 3]),
], ids=["one row", "two samples", "two rows", "transformer"])  # fmt: skip
def test_launches_of_a_step(case, wanted):
    with ops.using("triton"), torch.no_grad():
        names = launches(case.begin()[0])
    entry = ["skinny_linear"] * isinstance(case, Transformer)
    assert names == [*entry, *wanted * 2, "skinny_linear", "advance"]


def test_what_it_is_prepared_with_is_read_where_it_lies():
    """Graphs write other prompts and tables there."""
    for case in Dalle2({}), Transformer(guidance=False):
        given = []
        with ops.using("triton"), torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            plain = ops.prepare_launches
            patch.setattr(
                ops,
                "prepare_launches",
                lambda *args, **options: given.append((args, options)) or plain(*args, **options),
            )
            run, *_ = case.begin()
            seen = []
            with launch.instead(
                lambda kernel, grid, args, *_: seen.extend(
                    a.untyped_storage().data_ptr() for a in args if torch.is_tensor(a)
                )
            ):
                run.advance(1)
        (_, _, k, v), options = given[0]
        names = "bias", "mask", "time_tokens", "query", "coefficients", "null_table", "entry_position"
        tensors = [k, v, *(options.get("rotary") or ()), *(options[n] for n in names if options.get(n) is not None)]
        assert len(tensors) >= 7 and k.dtype == FP16
        assert all(t.untyped_storage().data_ptr() in seen for t in tensors)


@pytest.mark.parametrize("net", [
    dict(self_cond=True), dict(num_image_embeds=2), dict(norm_in=True), dict(norm_out=False), dict(final_proj=False),
    dict(dim_head=8), dict(num_time_embeds=15), dict(normformer=True, ff_mult=72, depth=1),
], ids=str)  # fmt: skip
def test_networks_that_it_does_not_take(net):
    with ops.using("triton"), torch.no_grad():
        assert not isinstance(Dalle2(net).begin()[0], DeviceRun)

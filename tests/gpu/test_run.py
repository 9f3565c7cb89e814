"""Runs of launches alone: the models' own steps, with no operation of PyTorch between them."""

import contextlib
import copy
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastprior import PriorSampler
from fastprior.diffusion.diffusers_schedules import DiffusersSchedule
from fastprior.engine import graphs
from fastprior.engine.runs import DeviceRun, ReplayedRun
from fastprior.engine.steps import Noise, bind, run_table
from fastprior.kernels import ops
from fastprior.kernels.gpu import attend_project, launch, skinny_linear
from fastprior.models.prior_transformer.model import PriorTransformer
from fastprior.models.quantise import quantised
from fastprior.models.quantised_linear import QuantisedLinear
from fastprior.pipelines.runs import PromptRun
from fastprior.pipelines.text_encoding import TextEncoding
from fastprior.prior import loop
from fastprior.prior.graphs import graphs_of
from helpers import captures
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
    clamp: str | float | None = None
    scale: float = 2.0

    def __post_init__(self):
        self.prior = make_prior(NET | self.net, timesteps=20, clamp=self.clamp, image_embed_scale=5.0).to(DEVICE)
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
        self.prior.norm_out.eps = 0.1  # the head's own
        for block in self.prior.transformer_blocks:  # so that what is hidden would count
            block.attn1.to_v.weight.data *= 8
        groups = self.prompts * (1 + self.guidance)
        mask = torch.arange(7) < torch.tensor(self.lengths)[torch.arange(groups) % len(self.lengths), None]
        self.text = TextEncoding(torch.randn(groups, 48), torch.randn(groups, 7, 48), mask)
        # x0 is hardly clamped, or is not the prediction, which that scheduler uses
        of_x0 = dict(prediction_type="sample", clip_sample_range=5.0)
        rules = dict(prediction_type="epsilon") if self.schedule == "DDIMScheduler" else of_x0
        self.rules = DiffusersSchedule(self.schedule, **rules)

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


def prepared(case):
    with ops.using("triton"), torch.no_grad():
        return case.begin()[0]


def first_steps(table):
    return replace(table, times=table.times[:STEPS], draws_noise=table.draws_noise[:STEPS])


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
    dict(net=dict(cosine_sim=False, rotary_emb=False), solver="dpm++"), dict(net={}, clamp=0.7, solver="dpm++"),
    dict(net={}, clamp="l2", scale=1.0),
], ids=str)  # fmt: skip
def test_dalle2(case):
    check_case(Dalle2(**case))


@pytest.mark.slow
@pytest.mark.parametrize("case", [
    dict(), dict(guidance=False), dict(prompts=2), dict(samples=2), dict(guidance=False, prompts=2, samples=2),
    dict(kind="int8"), dict(lengths=(7,)), dict(schedule="DDIMScheduler"),
], ids=str)  # fmt: skip
def test_transformer(case):
    check_case(Transformer(**case))


@pytest.mark.slow
def test_the_comparison_sees_other_numbers():
    case = Transformer(guidance=False)
    got, exact, plain = (result(case, *how) for how in (("triton",), ("reference", torch.float64), ("reference",)))
    for wrong in (-got, torch.zeros_like(got), got * 1.05):
        with pytest.raises(AssertionError):
            check(wrong, exact, plain)


LONG = {  # whose norms are launches of their own: the case, and how many of these there are
    "one row": (dict(net=dict(normformer=True)), 9), "two rows": (dict(net=dict(normformer=True), prompts=2), 9),
    "transformer": (dict(prompts=2), 5),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_norms_of_rows_that_are_not_held(name, monkeypatch):
    monkeypatch.setattr(skinny_linear, "holds", lambda rows, dim: False)
    options, count = LONG[name]
    case = Dalle2(**options) if "net" in options else Transformer(**options)
    assert launches(prepared(case)).count("layer_norm") == count
    check_case(case)


def launches(run) -> list[str]:
    """The kernels of a step, within which no operation of PyTorch computes anything."""
    names, operations = [], []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if any(r.alias_info is None for r in func._schema.returns):
                operations.append(func)
            return func(*args, **kwargs or {})

    def note(kernel, *_):
        names.append(kernel.__name__.strip("_").removesuffix("_fwd_kernel"))

    with launch.instead(note), Watch():
        run.advance(1)
    assert not operations and run.launches == len(names)
    return names


BY_ONE = ["skinny_linear", "attend_project", "skinny_linear", "skinny_linear"]
BY_TWO = ["skinny_linear", "decode_attention", *["skinny_linear"] * 3]


@pytest.mark.slow
def test_launches_of_a_step():
    plain = dict(net={}, scale=1.0)
    for case, layer in (
        (Dalle2(**plain), BY_ONE), (Dalle2(**plain, samples=2), BY_ONE), (Dalle2(**plain, prompts=2), BY_TWO),
        (Transformer(), BY_TWO),
    ):  # fmt: skip
        entry = ["skinny_linear"] * isinstance(case, Transformer)
        assert launches(prepared(case)) == [*entry, *layer * 2, "skinny_linear", "advance"]


@contextlib.contextmanager
def asking():
    """What `ops.prepare_launches` is asked for, and what it gives."""
    asked, plain = [], ops.prepare_launches

    def noted(*args, **options):
        asked.append((args, options, plain(*args, **options)))
        return asked[-1][-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "prepare_launches", noted)
        yield asked


@pytest.mark.slow
@pytest.mark.parametrize("case", [Dalle2(dict(), scale=1.0), Transformer(guidance=False, samples=2)], ids=["d2", "pt"])
def test_what_it_is_prepared_with_is_read_where_it_lies(case):
    """Graphs write other prompts and tables there."""
    seen = set()
    with asking() as asked:
        run = prepared(case)
    ((_, _, k, v), options, _), *_ = asked
    with launch.instead(lambda kernel, grid, args, *_: seen.update(map(address, args))):
        run.advance(1)
    names = "bias", "mask", "time_tokens", "query", "coefficients", "null_table", "entry_position", "query_position"
    tensors = [k, v, *(options.get("rotary") or ()), *map(options.get, names)]
    assert len([t for t in tensors if t is not None]) >= 7 and k.dtype == v.dtype == FP16
    assert all(address(t) in seen for t in tensors)


def address(t) -> int:
    return t.untyped_storage().data_ptr() if torch.is_tensor(t) else 0


@pytest.mark.slow
def test_samples_at_different_steps():
    """Each goes on from its own, to the bits that it has where all are there."""
    run = prepared(Dalle2({}, prompts=2, scale=1.0))
    run.noise.normal_(generator=torch.Generator(DEVICE).manual_seed(1))
    x = torch.randn(2, NET["dim"], generator=torch.Generator().manual_seed(2)).to(DEVICE)

    def after(*index):
        run.start(x)
        run.index.copy_(torch.tensor(index))
        run._begin()  # the tokens of those steps
        run.advance(2)
        return run.x.clone(), run.index.tolist()

    (first, at_first), (later, at_later), (both, at_both) = after(0, 0), after(18, 18), after(0, 18)
    assert (at_first, at_later, at_both) == ([2, 2], [0, 0], [2, 0])
    assert torch.equal(both[0], first[0]) and torch.equal(both[1], later[1]) and not torch.equal(first, later)


@pytest.mark.slow
def test_noise():
    """That of several steps at once, and of those that draw some."""
    run = prepared(Transformer(guidance=False))
    drawn = torch.randn(3, *run.x.shape, device=DEVICE)
    run.draw(0, [*drawn])
    assert torch.equal(run.noise, drawn)
    run.draw(1, [None, drawn[0]])
    assert torch.equal(run.noise, drawn[[0, 1, 0]])
    for first, count in ((-1, 1), (2, 2), (3, 1)):
        with pytest.raises(IndexError, match=f"steps {first} to {first + count - 1}; there are 3"):
            run.draw(first, [None] * count)
    with pytest.raises(ValueError, match=r"x has shape \(2, 48\); it must be \(1, 48\)"):
        run.start(torch.zeros(2, 48, device=DEVICE))


def is_taken(case, change=lambda model: None) -> bool:
    change(case.prior)
    return isinstance(prepared(case), DeviceRun)


@pytest.mark.slow
@pytest.mark.parametrize("net", [
    dict(self_cond=True), dict(num_image_embeds=2), dict(norm_in=True), dict(norm_out=False), dict(final_proj=False),
    dict(num_time_embeds=14, samples=2), dict(prompts=6), dict(normformer=True, ff_mult=66, depth=1),
], ids=str)  # fmt: skip
def test_networks_that_it_does_not_take(net):
    sizes = {name: net[name] for name in ("prompts", "samples") if name in net}
    net = {name: value for name, value in net.items() if name not in sizes}
    assert not is_taken(Dalle2(dict(depth=1) | net, scale=1.0, **sizes))


def hook(module):
    module.register_forward_hook(lambda module, inputs, output: output)


@pytest.mark.slow
def test_modules_of_dalle2_that_it_does_not_take():
    """What is called, and weights whose products are of other dtypes; it takes the same network without."""

    case, of = partial(Dalle2, dict(depth=1), scale=1.0), lambda prior: prior.net.causal_transformer
    for change in (
        lambda prior: hook(of(prior).layers[0][1][1]), lambda prior: hook(of(prior).norm),
        lambda prior: hook(of(prior).project_out), lambda prior: hook(prior.net.to_image_embeds),
        lambda prior: hook(of(prior).layers[0][0].to_out), lambda prior: setattr(of(prior).norm, "eps", 1e-3),
    ):  # fmt: skip
        assert not is_taken(case(), change)
    assert is_taken(case()) and is_taken(case(kind="int8"))
    with pytest.MonkeyPatch.context() as patch:
        plain = QuantisedLinear.__init__

        def of_some(self, linear, dtype):
            plain(self, linear, dtype)
            self.product_dtype = torch.bfloat16 if len(linear.weight) == NET["dim"] else self.product_dtype

        patch.setattr(QuantisedLinear, "__init__", of_some)
        assert not is_taken(case(kind="int8")), "products of several dtypes"


@pytest.mark.slow
def test_modules_of_a_transformer_that_it_does_not_take():
    prior = Transformer(guidance=False).prior

    @torch.no_grad()
    def run(change=lambda prior: None):
        own, text = copy.deepcopy(prior), (torch.ones(1, 48), torch.ones(1, 7, 48), torch.ones(1, 7))
        with ops.using("triton"):
            cond = own.prefill(*(t.to(DEVICE) for t in text), torch.arange(STEPS, device=DEVICE))
            change(own)
            table = torch.ones(STEPS, 6, device=DEVICE)
            solver = dict(coefficients=table, cond_scale=1.0, clamp=None, radius=1.0, uses_prediction=False)
            return own.prepare_run(cond, 1, 0, **solver)

    def replace_norm(prior):
        prior.norm_out = torch.nn.LayerNorm(64, elementwise_affine=False, device=DEVICE)

    for change in (
        lambda prior: hook(prior.proj_in), lambda prior: hook(prior.norm_out), replace_norm,
        lambda prior: hook(prior.proj_to_clip_embeddings), lambda prior: setattr(prior, "prd_embedding", None),
        lambda prior: setattr(prior, "norm_in", prior.norm_out), lambda prior: prior.proj_in.float(),
        lambda prior: setattr(prior.transformer_blocks[0].norm1, "eps", 1e-3),
        lambda prior: hook(prior.transformer_blocks[1].attn1.to_v),
    ):  # fmt: skip
        assert run(change) is None
    assert isinstance(run(), DeviceRun)


def test_what_is_asked_of_it():
    """No steps, gradients, weights of another dtype or memory order, autocast, and modes that follow operations."""
    with asking() as asked:
        prepared(Transformer(guidance=False))
    (blocks, head, k, v), options, run = asked[0]

    def ask(backend="triton", blocks=blocks, **changes):
        with ops.using(backend), torch.no_grad():
            return ops.prepare_launches(blocks, head, k, v, **options | changes)

    assert isinstance(run, DeviceRun) and isinstance(ask(), DeviceRun)
    empty = options["time_tokens"][:0], options["coefficients"][:0]
    for changes in (
        dict(backend="reference"), dict(dtype=torch.float32), dict(rows=16), dict(rows=0),
        dict(time_tokens=empty[0], coefficients=empty[1]), dict(entry=None),
        dict(entry=options["entry"]._replace(q=options["entry"].q.float())),
        dict(blocks=[block._replace(expand=block.expand.float()) for block in blocks]),
        dict(blocks=[block._replace(q_bias=block.out_bias, k_bias=None) for block in blocks]),
        dict(blocks=[block._replace(expand=block.expand.t().contiguous().t()) for block in blocks]),
    ):  # fmt: skip
        assert ask(**changes) is None, changes
    with ops.using("triton"), torch.enable_grad():
        assert ops.prepare_launches(blocks, head, k, v, **options) is None
    with torch.autocast(DEVICE, torch.bfloat16):
        assert ask() is None
    with TorchDispatchMode():
        assert ask() is None


@pytest.mark.slow
def test_priors_take_it():
    """By `sample` and by a sampler, with and without graphs: near the reference."""
    prior, text = Dalle2(dict(depth=1)).prior.to(FP16), make_text(1, NET["dim"])
    text = {name: t.to(DEVICE, FP16) for name, t in text.items()}
    sampler = PriorSampler(prior, batch_sizes=(1,), timesteps=3, compile=False)

    def results():
        draw = torch.Generator(DEVICE).manual_seed(1)
        options = dict(cond_scale=2.0, timesteps=3, num_samples_per_batch=1, progress=False, generator=draw)
        yield prior.sample(**text, **options)
        yield sampler(**text, cond_scale=2.0, generator=torch.Generator(DEVICE).manual_seed(1))

    with ops.using("reference"):
        wanted = [*results()]
    with ops.using("triton"), asking() as asked:
        for got, exact in zip(results(), wanted):
            assert torch.cosine_similarity(got.float(), exact.float()).min() > 0.9999
            assert isinstance(asked[-1][-1], DeviceRun)
    assert len(asked) == 2


@pytest.mark.slow
def test_graphs_of_it(monkeypatch):
    """Their prefill writes other texts to where the run reads them: the bits of runs without."""

    def capture(run, *args):
        """Operations are recorded, and launches, which come by a partial, made again."""
        return (run, None, 0) if isinstance(run, partial) else captures.capture(run, *args)

    monkeypatch.setattr(graphs, "capture", capture)
    prior = Dalle2(dict(depth=1)).prior.to(FP16)
    ours = copy.deepcopy(prior)
    ours.graphs, prior.graphs = True, False
    with ops.using("triton"):
        for seed, scale in enumerate((2.0, 3.0)):
            text = {name: t.to(FP16) for name, t in make_text(1, NET["dim"], seed=seed).items()}
            options = dict(cond_scale=scale, timesteps=5, num_samples_per_batch=1, progress=False, **text)
            got, wanted = (
                one.sample(**options, generator=torch.Generator().manual_seed(seed)) for one in (ours, prior)
            )
            assert torch.equal(got, wanted)
    kept = graphs_of(ours).cache.kept
    assert len(kept) == 1 and all(isinstance(graph._run, ReplayedRun) for graph in kept.values())

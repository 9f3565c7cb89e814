"""Try other launch configurations of every kernel: `python benchmarks/sweep.py --device cuda --record FILE`.

For the shapes of the models' steps and training at batch 1, 8 and 64, each configuration around the one that the plain
function of the shape chooses is first checked against the reference in fp64, then timed inside a CUDA graph over
several sets of inputs. The best is recorded beside the choice, so that a human changes the function where it pays. On
the CPU two configurations of tiny shapes run in Triton's interpreter: that shows that this file works, and no more.
"""

import argparse
import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from types import ModuleType

import priors
import recording
import torch
from timing import input_sets, interleaved, median, op_seconds
from torch import Tensor

from fastprior.kernels import ops
from fastprior.kernels.gpu import attention, decode, launch, linear, norm, step
from fastprior.kernels.gpu.launch import ceil_div

SUFFIX = 3
BATCHES = 1, 8, 64
HOT = {  # the linears that most of a step's time goes to
    ("D2-small", "q, k and v"), ("D2-small", "expand"), ("D2-small", "contract"),
    ("PT-1B", "expand"), ("PT-1B", "contract"),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A kernel at one shape.

    Attributes:
        kernel: what is recorded; of attention also which of its kernels `attention_config` is asked for.
        module, function: where its configuration is made.
        make: inputs of a seed.
        run: an operation of `ops` on them, and its gradients where some require them.
        grid: configurations around the one that was chosen.
        shape: for the record.
    """

    kernel: str
    module: ModuleType
    function: str
    make: Callable[[int], dict]
    run: Callable[[dict], Tensor]
    grid: Callable[[object], list]
    shape: dict

    def outputs(self, given: dict) -> list[Tensor]:
        out = self.run(given)
        leaves = [t for t in given.values() if isinstance(t, Tensor) and t.requires_grad]
        return [out, *(torch.autograd.grad(out, leaves, given["cotangent"].to(out)) if leaves else ())]


@contextlib.contextmanager
def configured(case: Case, config: object = None) -> Iterator[list]:
    """Launch with this configuration, or without one as ever; gives the configurations that were chosen."""
    plain, chosen = getattr(case.module, case.function), []

    def choose(*args, **kwargs):
        found = plain(*args, **kwargs)
        if case.module is attention and args[0] != case.kernel.removeprefix("attention "):
            return found
        chosen.append(found)
        return found if config is None else config

    setattr(case.module, case.function, choose)
    try:
        yield chosen
    finally:
        setattr(case.module, case.function, plain)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory for results holds NaN, so that what a kernel leaves out is not what the one before wrote."""
    plain = launch.empty
    launch.empty = lambda *args, **kwargs: plain(*args, **kwargs).fill_(float("nan"))
    try:
        yield
    finally:
        launch.empty = plain


def is_right(got: Tensor, exact: Tensor, plain: Tensor, factor: float) -> bool:
    """Whether the error is at most `factor` times that of plain PyTorch, plus 4 units in the last place."""
    scale = exact.square().mean().sqrt().clamp(min=1e-30)
    ours, theirs = (((t.double() - exact).square().mean().sqrt() / scale).item() for t in (got, plain))
    return ours <= factor * theirs + 4 * torch.finfo(got.dtype).eps  # not so for NaN


def sweep(case: Case, device: torch.device, only: int | None = None) -> dict:
    """Try the configurations, `only` so many where given: figures of the record."""
    given = case.make(0)
    with ops.using("reference"):
        plain = case.outputs(given)
        exact = case.outputs({name: _double(t) for name, t in given.items()})
    with ops.using("triton"), ops.sharing():
        with configured(case) as chosen:
            case.outputs(given)
        choice = chosen[0]
        inputs = input_sets(case.make, sum(t.nbytes for t in given.values() if isinstance(t, Tensor)), device)
        times, wrong, refused = {}, [], []
        for config in list(dict.fromkeys((choice, *case.grid(choice))))[:only]:
            with configured(case, config):
                try:
                    with poisoned():
                        got = case.outputs(given)
                except Exception as error:  # that of the compiler, or of a chip that it does not fit
                    refused.append(f"{config}: {type(error).__name__}")
                    continue
                factors = itertools.chain([2.0], itertools.repeat(3.0))  # of the result, and of gradients
                if all(map(is_right, got, exact, plain, factors)):
                    times[config] = median(op_seconds(case.outputs, inputs, device))
                else:
                    wrong.append(str(config))
        if choice not in times:
            raise RuntimeError(f"{case.kernel} {case.shape}: the chosen {choice} is wrong, or does not run")
        best = min(times, key=times.get)
        runs = {"chosen": _with(case, choice), "best": _with(case, best)}
        samples = interleaved(runs, inputs, device)  # again and in turns: the least of many is partly luck
    gain = median(samples["chosen"]) / median(samples["best"])
    return dict(
        samples=samples, config=dict(chosen=asdict(choice), best=asdict(best)), gain=gain, tried=len(times),
        wrong=wrong, refused=refused,
    )  # fmt: skip


def try_all(case: Case) -> None:
    """Run every configuration, and judge none."""
    given = case.make(0)
    with ops.using("triton"):
        with configured(case) as chosen:
            case.outputs(given)
        for config in dict.fromkeys(case.grid(chosen[0])):
            with configured(case, config):
                case.outputs(given)


def _double(t: object) -> object:
    if not isinstance(t, Tensor) or not t.is_floating_point():
        return t
    return t.detach().double().requires_grad_(t.requires_grad)


def _with(case: Case, config: object) -> Callable[[dict], object]:
    def run(given):
        with configured(case, config):
            return case.outputs(given)

    return run


def around(number: int, least: int) -> list[int]:
    return sorted({max(number // 2, least), number, number * 2})


def product(config, **values: list) -> list:
    return [replace(config, **dict(zip(values, chosen))) for chosen in itertools.product(*values.values())]


def norm_grid(config: norm.NormConfig) -> list[norm.NormConfig]:
    return product(config, rows=around(config.rows, 1), num_warps=[2, 4, 8, 16])


def step_grid(config: step.StepConfig) -> list[step.StepConfig]:
    warps = [n for n in (1, 2, 4, 8, 16) if n <= max(config.block // 128, 1)]  # see `diffusion_step_config`
    return product(config, num_warps=warps)


def attention_grid(config: attention.AttentionConfig) -> list[attention.AttentionConfig]:
    tiles = dict(block_m=around(config.block_m, 16), block_n=around(config.block_n, 16))
    return product(config, **tiles, num_warps=[4, 8], num_stages=[1, 2])


def linear_grid(config: linear.LinearConfig) -> list[linear.LinearConfig]:
    splits = sorted({1, *around(config.splits, 1)})
    tiles = product(config, block_n=[16, 32, 64], block_k=around(config.block_k, 16), splits=splits)
    return tiles + product(config, num_stages=[2, 3, 4, 6, 8], num_warps=[2, 4, 8])


def decode_grid(config: decode.DecodeConfig, prefix: int) -> list[decode.DecodeConfig]:
    found = []
    for block_n, splits, num_warps in itertools.product((16, 32, 64, 128), (1, 2, 4, 8), (2, 4, 8)):
        span = ceil_div(ceil_div(prefix, splits), block_n) * block_n
        tile = dict(block_n=block_n, span=span, splits=ceil_div(prefix, span), num_warps=num_warps)
        found.append(replace(config, **tile))
    return found


def sizes(model: str) -> dict:
    """dim, heads, kv_heads, dim_head and prefix of a model."""
    if model == "PT-1B":
        heads, dim_head = priors.PT_1B["num_attention_heads"], priors.PT_1B["attention_head_dim"]
        given = dict(dim=heads * dim_head, heads=heads, kv_heads=heads, dim_head=dim_head)
        return given | dict(prefix=priors.PT_1B["num_embeddings"] + 1)
    given = priors.D2[model]
    found = {name: given[name] for name in ("dim", "heads", "dim_head")}
    return found | dict(kv_heads=1, prefix=given["max_text_len"] + 1)


def cases(model: str, batch: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    dim, heads, dim_head, kv_heads, prefix = (
        sizes(model)[name] for name in ("dim", "heads", "dim_head", "kv_heads", "prefix")
    )
    shape = dict(model=model, batch=batch, dtype=str(dtype)[6:])

    def drawn(seed: int, grad: tuple[str, ...] = (), fp32: tuple[str, ...] = (), **shapes: tuple[int, ...]) -> dict:
        draw = torch.Generator(device).manual_seed(seed)
        found = {}
        for name, extents in shapes.items():
            own = torch.float32 if name in fp32 else dtype
            found[name] = torch.randn(extents, generator=draw, device=device).to(own).requires_grad_(name in grad)
        return found

    def normed(given):
        return ops.layer_norm(given["x"], given["gain"])

    for kernel, rows, grad in (
        ("norm forward", batch * SUFFIX, ()),
        ("norm backward", batch * (prefix + SUFFIX), ("x", "gain")),
    ):

        def make(seed, rows=rows, grad=grad):
            return drawn(seed, grad, ("gain",), x=(rows, dim), gain=(dim,), cotangent=(rows, dim))

        yield Case(kernel, norm, "layer_norm_config", make, normed, norm_grid, shape | dict(rows=rows, dim=dim))

    yield from linear_cases(model, batch * SUFFIX, shape, drawn)

    def make_decode(seed):
        own, cached = (batch, SUFFIX, kv_heads, dim_head), (batch, prefix, kv_heads, dim_head)
        return drawn(seed, q=(batch, SUFFIX, heads, dim_head), k=own, v=own, prefix_k=cached, prefix_v=cached)

    def decoded(given):
        return ops.decode_attention(**given, scale=dim_head**-0.5)

    grid = lambda config: decode_grid(config, prefix)  # noqa: E731
    whole = shape | dict(heads=heads, kv_heads=kv_heads, prefix=prefix)
    yield Case("decode", decode, "decode_attention_config", make_decode, decoded, grid, whole)
    yield from attention_cases(model, shape | dict(batch=batch), drawn)

    width = priors.D2_SMALL["dim"]

    def make_step(seed):
        given = drawn(seed, (), ("x", "x0", "noise", "table"), x=(batch, width), pred=(batch, width), x0=(batch, width),
                      noise=(batch, width), table=(64, 6))  # fmt: skip
        return given | dict(scale=torch.tensor(2.0, device=device), index=torch.tensor([5], device=device))

    def stepped(given):
        x, pred, x0, noise, table = (given[name] for name in ("x", "pred", "x0", "noise", "table"))
        return ops.diffusion_step(x, pred, None, given["scale"], x0, noise, table, given["index"], "l2", 27.7)[0]

    yield Case("step", step, "diffusion_step_config", make_step, stepped, step_grid, shape | dict(dim=width))


def linear_cases(model: str, rows: int, shape: dict, drawn: Callable[..., dict]) -> Iterator[Case]:
    """Linears of a step of up to 64 rows; PyTorch computes more."""
    if rows > linear.MAX_ROWS:
        return
    dim, heads, dim_head, kv_heads = (sizes(model)[name] for name in ("dim", "heads", "dim_head", "kv_heads"))
    inner, hidden = heads * dim_head, 4 * dim
    normed = dict(norm_gain=(dim,)) if rows <= linear.MAX_NORM_ROWS else {}
    if model == "PT-1B":
        layers = {
            "q": dict(weight=(inner, dim), bias=(inner,)),
            "expand": dict(weight=(hidden, dim), bias=(hidden,)),
            "contract": dict(weight=(dim, hidden), bias=(dim,), residual=(rows, dim)),
        }
    else:
        layers = {
            "q, k and v": dict(weight=(inner, dim), beside=(2 * kv_heads * dim_head, dim), **normed),
            "out": dict(weight=(dim, inner)),
            "expand": dict(weight=(2 * hidden, dim), **normed),
            "contract": dict(weight=(dim, hidden), residual=(rows, dim)),
        }
    for layer, tensors in layers.items():
        activation = ("gelu" if model == "PT-1B" else "swiglu") if layer == "expand" else None

        def make(seed, tensors=tensors):
            return drawn(seed, x=(rows, tensors["weight"][1]), **tensors)

        def run(given, activation=activation):
            return ops.linear(**given, activation=activation)

        k, n = tensors["weight"][1], tensors["weight"][0] + tensors.get("beside", (0,))[0]
        details = shape | dict(layer=layer, rows=rows, k=k, n=n)
        yield Case("linear", linear, "linear_config", make, run, linear_grid, details)


def attention_cases(model: str, shape: dict, drawn: Callable[..., dict]) -> Iterator[Case]:
    """Of whole sequences, as in training; the forward one runs in the prefill too."""
    batch, own = shape["batch"], sizes(model)
    heads, kv_heads, dim_head, seq = own["heads"], own["kv_heads"], own["dim_head"], own["prefix"] + SUFFIX
    d2 = model != "PT-1B"

    def make(seed, grad):
        keys, width = (batch, seq, kv_heads, dim_head), min(32, dim_head)
        extra = (
            dict(cos=(seq, width), sin=(seq, width), null_kv=(2, kv_heads, dim_head), bias=(32, heads)) if d2 else {}
        )
        leaves = ("q", "k", "v", "null_kv", "bias") if grad else ()
        shapes = dict(q=(batch, seq, heads, dim_head), k=keys, v=keys, cotangent=(batch, seq, heads * dim_head))
        given = drawn(seed, leaves, ("cos", "sin"), **shapes, **extra)
        return given | (dict(buckets=torch.arange(seq, device=given["q"].device).clamp(max=31)) if d2 else {})

    def run(given):
        options = dict(scale=dim_head**-0.5, causal=True)
        if d2:
            options |= dict(scale=16.0, rotary=(given["cos"], given["sin"]), cosine=True)
            options |= {name: given[name] for name in ("null_kv", "bias", "buckets")}
        return ops.attention(given["q"], given["k"], given["v"], **options)

    for kernel in ("fwd", "dq", "dkv", "dbias")[: 4 if d2 else 3]:

        def made(seed, grad=kernel != "fwd"):
            return make(seed, grad)

        details = shape | dict(heads=heads, kv_heads=kv_heads, seq=seq)
        yield Case(f"attention {kernel}", attention, "attention_config", made, run, attention_grid, details)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--record", metavar="FILE", help="append the results to this file, as JSON lines")
    parser.add_argument("--only", default="", metavar="NAME", help="kernels with this in their name")
    parser.add_argument("--hot", action="store_true", help="only the linears of `HOT`, at batch 1")
    options = parser.parse_args(arguments)
    filling = "PROOF_FILL" in os.environ  # see benchmarks/proof/kernel_cache.py
    on_gpu = options.device == "cuda"
    device = torch.device("cpu" if filling else options.device)
    if not on_gpu:
        priors.shrink()
    dtype = torch.bfloat16 if on_gpu else torch.float16  # the interpreter computes bf16 wrongly
    models, batches = (list(priors.GOALS), BATCHES) if on_gpu and not options.hot else (["D2-small", "PT-1B"], (1,))
    for batch, model in itertools.product(batches, models):
        for case in cases(model, batch, dtype, device):
            if options.only not in case.kernel or (options.hot and (model, case.shape.get("layer")) not in HOT):
                continue
            if filling:
                try_all(case)
                continue
            found = sweep(case, device, only=None if on_gpu else 2)
            samples, configs = found.pop("samples"), found.pop("config")
            for provider in ("chosen", "best"):
                details = case.shape | dict(config=configs[provider]) | (found if provider == "best" else {})
                if not on_gpu:
                    details["quick"] = True
                us = [s * 1e6 for s in samples[provider]]
                line = recording.line(f"sweep of {case.kernel}", provider, us, "us", device, **details)
                if options.record:
                    recording.append(options.record, line)
            what = f"{case.kernel} {case.shape}: {found['tried']} right, {len(found['wrong'])} wrong, "
            what += f"{len(found['refused'])} do not run"
            print(what + (f"; {found['gain']:.2f}x by {configs['best']} over {configs['chosen']}" if on_gpu else ""))
            for config in found["wrong"]:
                print(f"  WRONG: {config}", flush=True)


if __name__ == "__main__":
    main()

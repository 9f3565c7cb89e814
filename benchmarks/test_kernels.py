"""The kernels on a GPU, against the reference in PyTorch, compiled, and the libraries; goals stand beside the figures.

Each figure counts only where the result is right. On the CPU the kernels run in Triton's interpreter, on small shapes:
that shows that this file works, and is recorded only with `--quick`, as what it is.
"""

import functools

import priors
import pytest
import torch
import torch.nn.functional as F
from timing import copy_bandwidth, input_sets, interleaved, median
from torch import Tensor

from fastprior.kernels import ops, reference
from fastprior.kernels.arguments import LinearArgs
from fastprior.kernels.reference import AttentionArgs, NormArgs, StepArgs

DTYPE = {"cuda": torch.bfloat16, "cpu": torch.float16}


@pytest.fixture(autouse=True)
def kernels(device):
    """Triton kernels, on a GPU or interpreted."""
    triton = pytest.importorskip("triton")
    from fastprior.kernels.gpu import launch

    if device.type == "cpu" and not launch.interpreted():
        pytest.skip("needs a CUDA device (or TRITON_INTERPRET=1, to try the benchmark itself)")
    torch._dynamo.reset()
    del triton
    with ops.using("triton"), ops.sharing():
        yield


@functools.cache
def bandwidth(device) -> float:
    return copy_bandwidth(device)


def measure(
    benchmark, record, device, op, runs, make, bytes_each, *, moved, flops=None, goals=None, check=None, **details
):
    """Time `runs` in turns on the same inputs, check the first against `check`, and record what each reached.

    Args:
        runs: {provider: function of one input set}; the first is ours, the others may fail, and are then left out.
        make: input set of a seed.
        bytes_each: of one input set.
        moved: bytes that one call must read and write; gives the share of copy bandwidth.
        flops: of its matrix products.
        goals: see `record`.
        check: (ours, theirs) -> None, raises.
    """
    inputs = input_sets(make, bytes_each, device)
    ours = next(iter(runs))
    wanted = check(inputs[0]) if check else None
    working = {}
    for name, run in runs.items():
        try:
            out = run(inputs[0])
        except (RuntimeError, NotImplementedError, ImportError, ValueError) as error:
            assert name != ours, error
            print(f"{op}: {name} does not run here: {str(error).splitlines()[0]}")
            continue
        if wanted is not None:
            out = out[0] if isinstance(out, tuple) else out
            cosine = F.cosine_similarity(out.float().flatten(), wanted.float().flatten(), dim=0)
            assert cosine > 0.999, f"{name} is wrong: cosine {cosine}"
        working[name] = run
    times = {}
    benchmark.pedantic(lambda: times.update(interleaved(working, inputs, device)), rounds=1)
    share = moved / median(times[ours]) / bandwidth(device)
    others = [median(t) for name, t in times.items() if name != ours]
    ratio = min(others) / median(times[ours]) if others else None
    reached = dict(share_of_copy=share, ratio_to_best_other=ratio, goals=goals)
    benchmark.extra_info.update(us=median(times[ours]) * 1e6, **reached)
    if device.type == "cpu" and not priors.quick:
        return
    for name, samples in times.items():
        extra = reached if name == ours else {}
        record(op, name, [s * 1e6 for s in samples], "us", **details, bytes=moved, flops=flops, **extra)


def with_gradients(run):
    """Forward and backward, with a fixed cotangent: `run` takes an input set whose tensors are differentiated."""

    def both(given):
        leaves = [t for t in given.values() if isinstance(t, Tensor) and t.requires_grad]
        out = run(given)
        out = out[0] if isinstance(out, tuple) else out
        grads = torch.autograd.grad(out, leaves, given["cotangent"])
        return out, *grads

    return both


@pytest.mark.parametrize("rows, dim", [(16384, 768), (16384, 2048)])
@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def test_norm(benchmark, record, device, op, rows, dim, backward):
    dtype, rms = DTYPE[device.type], op == "rms_norm"
    rows = rows if device.type == "cuda" else 8

    def make(seed):
        draw = torch.Generator(device).manual_seed(seed)
        x, cotangent = (torch.randn(rows, dim, device=device, dtype=dtype, generator=draw) for _ in range(2))
        gain = torch.ones(dim, device=device, requires_grad=backward)
        return dict(x=x.requires_grad_(backward), gain=gain, cotangent=cotangent)

    def ours(given):
        return ops.layer_norm(given["x"], given["gain"], rms=rms)

    def torchs(given):
        return reference.layer_norm(NormArgs(given["x"], given["gain"], rms=rms))

    runs = {"kernel": ours, "reference": torchs, "reference compiled": torch.compile(torchs)}
    if backward:
        runs = {name: with_gradients(run) for name, run in runs.items()}
    size = rows * dim * dtype.itemsize
    measure(
        benchmark, record, device, op + (" forward+backward" if backward else " forward"), runs, make, size * 2,
        moved=size * (5 if backward else 2), goals=dict(share_of_copy=0.75 if backward else 0.85),
        check=torchs if not backward else None, rows=rows, dim=dim, dtype=str(dtype)[6:],
    )  # fmt: skip


def attention_baselines(options: dict) -> dict:
    """The same attention by what users have: all prepare queries and keys in PyTorch."""

    def prepared(given):
        q, k, v = (given[name] for name in "qkv")
        rotary = given["cos"], given["sin"]
        q, k = (reference.prepare_heads(t, rotary, True).to(t.dtype) for t in (q, k))
        null_k, null_v = given["null_kv"].to(q.dtype)
        null_k = F.normalize(null_k, dim=-1)
        k, v = (torch.cat((n.expand(len(q), 1, -1, -1), t), dim=1) for n, t in ((null_k, k), (null_v, v)))
        return (t.transpose(1, 2) for t in (q, k, v))

    def dense_bias(given):
        seq = given["q"].shape[1]
        bias = reference.expand_bias(given["bias"], given["buckets"], seq, seq + 1).transpose(0, 1)
        hidden = torch.arange(seq + 1, device=bias.device) > torch.arange(seq, device=bias.device)[:, None] + 1
        return bias.masked_fill(hidden, -torch.inf)[None]

    def sdpa(given):
        q, k, v = prepared(given)
        mask = dense_bias(given).to(q.dtype).expand(len(q), -1, -1, -1)
        out = F.scaled_dot_product_attention(q, k, v, mask, scale=16.0, enable_gqa=True)
        return out.transpose(1, 2).flatten(2)

    def flex(given):
        from torch.nn.attention.flex_attention import flex_attention

        q, k, v = prepared(given)
        table, buckets = given["bias"], given["buckets"]

        def score(logit, batch, head, row, column):
            bias = table[buckets[(row - column).clamp(min=0)], head]
            return torch.where(column <= row + 1, logit + bias, -torch.inf)

        return flex_attention(q, k, v, score_mod=score, scale=16.0, enable_gqa=True).transpose(1, 2).flatten(2)

    def xformers(given):
        from xformers.ops import memory_efficient_attention

        q, k, v = (t.transpose(1, 2) for t in prepared(given))
        k, v = (t.expand(-1, -1, q.shape[2], -1) for t in (k, v))
        bias = dense_bias(given).to(q.dtype).expand(len(q), -1, -1, -1)
        return memory_efficient_attention(q, k, v, attn_bias=bias.contiguous(), scale=16.0).flatten(2)

    def reference_attention(given):
        return reference.attention(
            AttentionArgs(**{name: t for name, t in given.items() if name != "cotangent"}, **options)
        )

    return {
        "reference": reference_attention,
        "reference compiled": torch.compile(reference_attention),
        "flex_attention compiled": torch.compile(flex),
        "SDPA with a materialised bias": sdpa,
        "xformers": xformers,
    }


@pytest.mark.parametrize("kv_heads", ["one", "all"])
@pytest.mark.parametrize("batch, seq, heads", [(128, 81, 12), (128, 81, 32), (64, 260, 12), (64, 260, 32)])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def test_attention(benchmark, record, device, batch, seq, heads, kv_heads, backward):
    dtype, dim_head = DTYPE[device.type], 64
    if device.type == "cpu":
        batch, seq, heads = 1, 9, 2
    kv_heads = 1 if kv_heads == "one" else heads
    options = dict(scale=16.0, cosine=True, causal=True)

    def make(seed):
        draw = torch.Generator(device).manual_seed(seed)
        q, k, v = (
            torch.randn(batch, seq, n, dim_head, device=device, dtype=dtype, generator=draw).requires_grad_(backward)
            for n in (heads, kv_heads, kv_heads)
        )
        angle = torch.rand(seq, 16, device=device, generator=draw)
        cos, sin = (
            F.pad(t.repeat_interleave(2, 1), (0, 32), value=value)
            for t, value in ((angle.cos(), 1.0), (angle.sin(), 0.0))
        )
        sin[:, ::2] *= -1
        null_kv = torch.randn(2, kv_heads, dim_head, device=device, generator=draw).requires_grad_(backward)
        bias = torch.randn(32, heads, device=device, generator=draw).requires_grad_(backward)
        buckets = torch.arange(seq, device=device).clamp(max=31)
        cotangent = torch.randn(batch, seq, heads * dim_head, device=device, dtype=dtype, generator=draw)
        names = "q", "k", "v", "cos", "sin", "null_kv", "bias", "buckets", "cotangent"
        return dict(zip(names, (q, k, v, cos, sin, null_kv, bias, buckets, cotangent)))

    def ours(given):
        return ops.attention(
            given["q"], given["k"], given["v"], rotary=(given["cos"], given["sin"]), null_kv=given["null_kv"],
            bias=given["bias"], buckets=given["buckets"], **options,
        )  # fmt: skip

    baselines = attention_baselines(options)
    exact = baselines["reference"]
    runs = {"kernel": ours, **baselines}
    if backward:
        runs = {name: with_gradients(run) for name, run in runs.items()}
    size = batch * seq * dim_head * 2 * (heads + kv_heads) * dtype.itemsize
    # backward reads all of it and the cotangent, and writes as many gradients; of five products two are forward's again
    moved, flops = (size * 3, 3.5) if backward else (size, 1)
    measure(
        benchmark, record, device, "attention" + (" forward+backward" if backward else " forward"), runs, make, size,
        moved=moved, flops=flops * 2 * batch * heads * dim_head * seq * (seq + 3), goals=dict(ratio_to_best_other=1.2),
        check=exact, batch=batch, seq=seq, heads=heads, kv_heads=kv_heads, dim_head=dim_head, dtype=str(dtype)[6:],
    )  # fmt: skip


LINEARS = {
    "768 to 768": dict(k=768, n=768),
    "768 to 6144, swiglu": dict(k=768, n=6144, activation="swiglu"),
    "3072 to 768": dict(k=3072, n=768),
    "768 to 2048": dict(k=768, n=2048),
    "2048 to 8192, gelu": dict(k=2048, n=8192, activation="gelu"),
    "8192 to 2048": dict(k=8192, n=2048),
}


@pytest.mark.parametrize("rows", [1, 3, 16, 64])
@pytest.mark.parametrize("layer", LINEARS)
@pytest.mark.parametrize("storage", ["16 bits", "int8"])
def test_linear(benchmark, record, device, layer, rows, storage):
    dtype = DTYPE[device.type]
    shape = dict(activation=None) | LINEARS[layer]
    k, n = (shape[name] if device.type == "cuda" else shape[name] // 16 for name in "kn")
    activation = shape["activation"]

    def make(seed):
        draw = torch.Generator(device).manual_seed(seed)
        x = torch.randn(rows, k, device=device, dtype=dtype, generator=draw)
        weight = torch.randn(n, k, device=device, generator=draw)
        if storage == "int8":
            scale = weight.abs().amax(dim=1) / 127
            return dict(x=x, weight=(weight / scale[:, None]).round().to(torch.int8), scale=scale)
        return dict(x=x, weight=weight.to(dtype), scale=None)

    def ours(given):
        return ops.linear(given["x"], given["weight"], scale=given["scale"], activation=activation)

    def torchs(given):
        return reference.linear(LinearArgs(given["x"], given["weight"], scale=given["scale"], activation=activation))

    size = n * k * (1 if storage == "int8" else dtype.itemsize)
    runs = {"kernel": ours, "cuBLAS": torchs, "cuBLAS, compiled": torch.compile(torchs)}
    measure(
        benchmark, record, device, "linear", runs, make, size, moved=size, flops=2 * rows * n * k, check=torchs,
        goals=dict(share_of_copy=0.8) if rows <= 16 else None,
        layer=layer, rows=rows, storage=storage, dtype=str(dtype)[6:],
    )  # fmt: skip


@pytest.mark.parametrize("prefix", [78, 258, 1024])
@pytest.mark.parametrize("rows, prompts", [(1, 1), (8, 8), (64, 64), (64, 16)])
@pytest.mark.parametrize("kv_heads", ["one", "all"])
def test_decode(benchmark, record, device, rows, prompts, prefix, kv_heads):
    dtype, dim_head, heads, suffix = DTYPE[device.type], 64, 12, 3
    if device.type == "cpu":
        rows, prompts, prefix, heads = min(rows, 2), min(prompts, 1), 20, 2
    kv_heads = 1 if kv_heads == "one" else heads

    def make(seed):
        draw = torch.Generator(device).manual_seed(seed)
        shapes = (rows, suffix, heads), (rows, suffix, kv_heads), (rows, suffix, kv_heads)
        q, k, v = (torch.randn(*s, dim_head, device=device, dtype=dtype, generator=draw) for s in shapes)
        cache = torch.randn(2, prompts, prefix, kv_heads, dim_head, device=device, dtype=dtype, generator=draw)
        return q, k, v, F.normalize(cache[0], dim=-1), cache[1]

    def ours(given):
        return ops.decode_attention(*given, scale=16.0, cosine=True)

    def torchs(given):
        return reference.decode_attention(*given, scale=16.0, cosine=True)

    size = 2 * prompts * prefix * kv_heads * dim_head * dtype.itemsize
    measure(
        benchmark, record, device, "decode attention",
        {"kernel": ours, "reference": torchs, "reference compiled": torch.compile(torchs)}, make, size, check=torchs,
        moved=size, flops=4 * rows * suffix * heads * dim_head * (prefix + suffix),
        rows=rows, prompts=prompts, prefix=prefix, heads=heads, kv_heads=kv_heads, dtype=str(dtype)[6:],
    )  # fmt: skip


@pytest.mark.parametrize("rows, dim", [(1, 768), (64, 768), (64, 2048)])
def test_step(benchmark, record, device, rows, dim):
    """One launch."""

    def make(seed):
        draw = torch.Generator(device).manual_seed(seed)
        x, pred, x0, noise = torch.randn(4, rows, dim, device=device, generator=draw)
        table, null = (
            torch.rand(64, 6, device=device, generator=draw),
            torch.randn(64, dim, device=device, generator=draw),
        )
        return x, pred, None, torch.tensor(2.0, device=device), x0, noise, table, torch.tensor([5], device=device), null

    def ours(given):
        return ops.diffusion_step(*given[:-1], clamp="l2", radius=27.7, null_table=given[-1])

    def torchs(given):
        return reference.diffusion_step(StepArgs(*given[:-1], clamp="l2", radius=27.7, null_table=given[-1]))

    runs = {"kernel": ours, "reference": torchs, "reference compiled": torch.compile(torchs)}
    size = rows * dim * 4
    measure(
        benchmark, record, device, "diffusion step", runs, make, size * 4, moved=size * 6, check=lambda g: torchs(g)[0],
        goals=dict(p50=5) if (rows, dim) == (64, 768) else None, rows=rows, dim=dim,
    )  # fmt: skip

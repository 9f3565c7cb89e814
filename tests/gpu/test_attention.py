"""Flash attention: results and gradients against the reference, each option alone and all together, and messages."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fastprior.kernels import ops, reference
from fastprior.kernels.gpu import attention as module
from fastprior.kernels.gpu import launch
from fastprior.kernels.reference import AttentionArgs
from helpers.kernel_checks import DEVICE, DTYPES, check, check_gradients, guarded, random, sliced
from helpers.pairwise import pairwise

# batch, queries, keys, heads, heads of keys, dim_head: one row; multi-query; grouped and queries at the end of more
# keys; every query its own keys; several tiles of rows and of columns
SHAPES = [(1, 1, 3, 1, 1, 16), (2, 5, 5, 4, 1, 52), (1, 5, 17, 4, 2, 16), (2, 17, 17, 2, 2, 64), (1, 81, 81, 3, 1, 64)]
ALL = ("rotary", "cosine", "null", "relative", "causal", "keep", "dropout")
OPTIONS = {
    "plain": (),
    "rotary": ("rotary",),
    "cosine": ("cosine",),
    "null": ("null",),
    "relative": ("relative",),
    "relative-null": ("relative", "null"),
    "dense": ("dense",),
    "dense-null": ("dense", "null"),
    "causal": ("causal",),
    "causal-finite": ("finite",),
    "keep": ("keep",),
    "mask": ("mask",),
    "dropout": ("dropout",),
    "causal-null-rotary": ("causal", "null", "rotary"),
    "all": ALL,
    "all-dense": ("rotary", "cosine", "null", "dense", "finite", "mask", "dropout"),
}


def attention(function=module.attention, *, rotary=(None, None), **given) -> Tensor:
    return function(AttentionArgs(**given, cos=rotary[0], sin=rotary[1]))


exact_attention = partial(attention, reference.attention)


def make(shape, dtype, options=(), *, grad=True) -> tuple[dict[str, Tensor], dict]:
    """Tensors that may have a gradient, by name, and the other arguments."""
    batch, seq, keys, heads, kv_heads, dim = shape
    columns = keys + ("null" in options)
    inputs = dict(
        q=random(batch, seq, heads, dim, dtype=dtype, grad=grad, seed=1),
        k=random(batch, keys, kv_heads, dim, dtype=dtype, grad=grad, seed=2),
        v=random(batch, keys, kv_heads, dim, dtype=dtype, grad=grad, seed=3),
    )
    others = dict(scale=5.0 if "cosine" in options else dim**-0.5, cosine="cosine" in options)
    if "null" in options:
        inputs["null_kv"] = random(2, kv_heads, dim, dtype=dtype, grad=grad, seed=4)
    if "relative" in options:
        inputs["bias"] = random(5, heads, dtype=dtype, grad=grad, seed=5)
        others["buckets"] = torch.arange(keys, device=DEVICE).float().sqrt().long().clamp(max=4)
    if "dense" in options:
        inputs["bias"] = random(seq, heads, columns, dtype=dtype, grad=grad, seed=5)
    if "rotary" in options:
        width = min(dim, 32) - 4  # not a power of two
        angle = random(keys, width // 2, seed=6, scale=3.0).repeat_interleave(2, dim=-1)
        others["rotary"] = angle.cos(), angle.sin() * torch.tensor([-1.0, 1.0], device=DEVICE).repeat(width // 2)
    if "causal" in options or "finite" in options:
        others |= dict(causal=True, causal_fill=-10000.0 if "finite" in options else -math.inf)
    if "keep" in options:
        others["mask"] = random(batch, keys, seed=7) > -0.3
        others["mask"][:, 0] = True
    if "mask" in options:
        others["mask"] = random(batch, keys, seed=7)
    if "dropout" in options:
        others |= dict(dropout=0.3, seed=torch.tensor(2**61 + 12345, device=DEVICE))
    return inputs, others


def compare(inputs: dict, others: dict) -> None:
    check_gradients(partial(attention, **others), partial(exact_attention, **others), inputs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape, options, dtype", pairwise(shape=SHAPES, options=["plain", "all"], dtype=DTYPES), ids=str
)
def test_shapes(shape, options, dtype):
    with guarded():
        compare(*make(shape, dtype, ALL if options == "all" else ()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options, dtype):
    with guarded():
        compare(*make((2, 5, 9, 4, 2, 16), dtype, options))


def test_one_key():
    inputs, others = make((2, 1, 1, 2, 1, 16), torch.float32)
    out = attention(**inputs, **others)
    assert torch.equal(out, inputs["v"].expand(-1, -1, 2, -1).flatten(2))
    dq, dk, dv = torch.autograd.grad(out, list(inputs.values()), torch.ones_like(out))
    assert dq.abs().max() < 1e-5 and dk.abs().max() < 1e-5 and torch.equal(dv, torch.full_like(dv, 2.0))


@pytest.mark.slow
@pytest.mark.parametrize("options", [("causal",), ("causal", "null", "relative")], ids="-".join)
@pytest.mark.parametrize("shape", [(1, 67, 67, 1, 1, 16), (1, 31, 37, 2, 1, 16)], ids=str)
def test_the_diagonal_at_the_edges_of_tiles(shape, options):
    compare(*make(shape, torch.float32, options))


@pytest.mark.parametrize(
    "options", [("null", "keep"), ("null", "mask"), ("keep",), ("keep", "finite", "dropout")], ids="-".join
)
def test_rows_that_see_nothing(options):
    inputs, others = make((2, 5, 7, 2, 1, 16), torch.float32, options)
    others["mask"][0] = False if "keep" in options else torch.finfo(torch.float32).min
    compare(inputs, others)


def test_keys_hidden_by_minus_infinity():
    inputs, others = make((2, 5, 7, 2, 1, 16), torch.float32, ("mask",))
    others["mask"][:, 2:5] = -math.inf
    compare(inputs, others)


@pytest.mark.parametrize("wanted", ["q", "k", "v", "null_kv", "bias"])
def test_a_gradient_alone(wanted):
    inputs, others = make((1, 5, 5, 2, 1, 16), torch.float32, ALL)
    compare({name: t.detach().requires_grad_(name == wanted) for name, t in inputs.items()}, others)


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ALL], ids=["plain", "all"])
def test_strides(options):
    inputs, others = make((2, 5, 5, 4, 2, 16), torch.float32, options)
    inputs["q"] = sliced(inputs["q"])
    inputs["k"] = inputs["k"].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    both = torch.randn(2, 5, 2, 32, device=DEVICE)
    inputs["v"] = both[..., 16:].detach().requires_grad_()
    compare(inputs, others)
    # check_gradients clones its inputs: the strides themselves are checked here
    contiguous = {name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in inputs.items()}
    results = []
    for given in (inputs, contiguous):
        given = {name: t.requires_grad_() for name, t in given.items()}
        out = attention(**given, **others)
        grad = random(*out.shape, 2)[..., 0]
        results.append((out, *torch.autograd.grad(out, list(given.values()), grad)))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_bias_shared_by_heads():
    inputs, others = make((1, 5, 5, 4, 2, 16), torch.float32)
    inputs["bias"] = random(5, 1, 5, grad=True)

    def run(function, bias, **inputs):
        return function(bias=bias.expand(-1, 4, -1), **inputs, **others)

    check_gradients(partial(run, attention), partial(run, exact_attention), inputs)


def test_null_kv_and_bias_of_another_dtype():
    inputs, others = make((2, 5, 5, 4, 1, 16), torch.float16, ALL)

    def run(function, null_kv, bias, **inputs):
        wide = torch.promote_types(null_kv.dtype, torch.float32)
        return function(null_kv=null_kv.to(wide), bias=bias.to(wide), **inputs, **others)

    check_gradients(partial(run, attention), partial(run, exact_attention), inputs)


@pytest.mark.slow
@pytest.mark.parametrize("programs", [1, 8])
def test_sums_over_rows_and_batch(programs, monkeypatch):
    """In one program and in several: rows of a key, and elements of the batch for the bias."""
    monkeypatch.setattr(module, "PROGRAMS", programs)
    with guarded():
        compare(*make((3, 9, 9, 8, 1, 16), torch.float32, ("null", "relative", "causal", "keep")))
        compare(*make((3, 9, 9, 4, 2, 16), torch.float32, ("dense", "mask")))


@pytest.mark.slow
def test_equal_bits_twice():
    inputs, others = make((2, 9, 9, 8, 1, 16), torch.float16, ALL)

    def once():
        out = attention(**inputs, **others)
        return out, *torch.autograd.grad(out, list(inputs.values()), random(*out.shape, dtype=out.dtype))

    assert all(torch.equal(a, b) for a, b in zip(once(), once()))


def test_dropout_without_seed_draws_one():
    inputs, others = make((1, 9, 9, 2, 1, 16), torch.float32, ("dropout",), grad=False)
    others["seed"] = None
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(attention(**inputs, **others))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend):
    inputs, others = make((1, 5, 5, 4, 2, 16), torch.float32, ALL)
    with ops.using("triton"):
        compiled = torch.compile(partial(ops.attention, **others), fullgraph=True, backend=backend)
        check_gradients(lambda **given: compiled(**given), partial(exact_attention, **others), inputs)


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ALL], ids=["plain", "all"])
def test_opcheck(options):
    inputs, others = make((1, 3, 5, 2, 1, 16), torch.float32, options)
    tensors = [inputs["q"], inputs["k"], inputs["v"], inputs.get("null_kv"), *others.get("rotary", (None, None))]
    tensors += [inputs.get("bias"), *(others.get(name) for name in ("buckets", "mask", "seed"))]
    numbers = others["scale"], others["cosine"], bool(options), -math.inf, others.get("dropout", 0.0)
    torch.library.opcheck(module._attention, (*tensors, *numbers))
    tensors = [t if t is None else t.detach() for t in tensors]
    out, stats = module._attention(*tensors, *numbers)
    torch.library.opcheck(module._attention_bwd, (*tensors, *numbers, out.clone(), out, stats, bool(options)))


@pytest.mark.parametrize("options", [(), ALL], ids=["plain", "all"])
def test_reference_gradients(options):
    inputs, others = make((1, 3, 4, 2, 1, 8), torch.float64, options)
    names = list(inputs)

    def run(*tensors):
        return exact_attention(**dict(zip(names, tensors)), **others)

    assert torch.autograd.gradcheck(run, tuple(inputs.values()))


def test_the_comparison_rejects_wrong_results():
    inputs, others = make((1, 5, 5, 2, 1, 16), torch.float32, ALL, grad=False)
    exact = exact_attention(**{name: t.double() for name, t in inputs.items()}, **others)
    plain = exact_attention(**inputs, **others)
    for wrong in (torch.zeros_like(plain), -plain, plain * math.nan, plain * 1.001):
        with pytest.raises(AssertionError, match="result: error"):
            check(wrong, exact, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [16, 52, 64, 100, 128])
def test_launches_can_be_recorded_without_a_device(dim, dtype):
    q = torch.empty(2, 81, 12, dim, dtype=dtype, device="meta")
    k = torch.empty(2, 81, 1, dim, dtype=dtype, device="meta")
    args = module.AttentionArgs(q, k, k, *[None] * 7, 1.0, False, False, 0.0, 0.0)
    with launch.recording() as recorded:
        out, stats = module.attention_fwd(args)
        module.attention_bwd(args, out, out, stats, False)
    assert len(recorded) == 3 and all(dict(variant.constants)["DIM"] == dim for variant in recorded)


WRONG = {
    "dtype": (
        dict(q=torch.zeros(1, 3, 2, 16, dtype=torch.int32)),
        TypeError,
        "q has dtype torch.int32",
    ),
    "k-dtype": (
        dict(k=torch.zeros(1, 5, 1, 16, dtype=torch.float16)),
        TypeError,
        "k has dtype torch.float16",
    ),
    "dimensions": (dict(q=torch.zeros(3, 2, 16)), ValueError, "q and k have 3 and 4 dimensions; they must have 4"),
    "v-shape": (dict(v=torch.zeros(1, 4, 1, 16)), ValueError, "v has shape (1, 4, 1, 16); it must be (1, 5, 1, 16)"),
    "empty": (dict(q=torch.zeros(1, 0, 2, 16)), ValueError, "q has shape (1, 0, 2, 16); no dimension may be zero"),
    "strides": (
        dict(q=torch.zeros(1, 3, 16, 2).transpose(2, 3)),
        ValueError,
        "q has stride 2 in its last dimension; it must be contiguous there",
    ),
    "dim-head": (
        dict(q=torch.zeros(1, 3, 2, 8), k=torch.zeros(1, 5, 1, 8), v=torch.zeros(1, 5, 1, 8)),
        ValueError,
        "q has dim_head 8; it must be from 16 to 128",
    ),
    "heads": (
        dict(k=torch.zeros(1, 5, 3, 16), v=torch.zeros(1, 5, 3, 16)),
        ValueError,
        "q has 2 heads; they must be a multiple of the 3 heads of k",
    ),
    "queries": (dict(q=torch.zeros(1, 6, 2, 16)), ValueError, "q has 6 positions; they must be the last of the 5 of k"),
    "rotary": (
        dict(rotary=(torch.ones(5, 4), torch.ones(3, 4))),
        ValueError,
        "rotary sin has shape (3, 4); it must be (5, 4)",
    ),
    "width": (
        dict(rotary=(torch.ones(5, 3), torch.ones(5, 3))),
        ValueError,
        "rotary tables have width 3; it must be even and at most dim_head, 16",
    ),
    "rotary-gradient": (
        dict(rotary=(torch.ones(5, 4, requires_grad=True), torch.ones(5, 4))),
        ValueError,
        "rotary cos requires a gradient, which these kernels do not give; use reference.attention",
    ),
    "mask-gradient": (
        dict(mask=torch.zeros(1, 5, requires_grad=True)),
        ValueError,
        "mask requires a gradient, which these kernels do not give; use reference.attention",
    ),
    "null": (dict(null_kv=torch.zeros(2, 16)), ValueError, "null_kv has shape (2, 16); it must be (2, 1, 16)"),
    "bias": (dict(bias=torch.zeros(3, 2, 4)), ValueError, "bias has shape (3, 2, 4); it must be (3, 2, 5)"),
    "table": (
        dict(bias=torch.zeros(4, 3), buckets=torch.zeros(5, dtype=torch.int64)),
        ValueError,
        "bias has shape (4, 3); it must be (4, 2)",
    ),
    "buckets": (
        dict(buckets=torch.zeros(5, dtype=torch.int64)),
        ValueError,
        "buckets came without bias; they are buckets of the table that bias is",
    ),
    "buckets-dtype": (
        dict(bias=torch.zeros(4, 2), buckets=torch.zeros(5)),
        TypeError,
        "buckets has dtype torch.float32; it must be one of int64",
    ),
    "mask": (dict(mask=torch.ones(1, 4)), ValueError, "mask has shape (1, 4); it must be (1, 5)"),
    "mask-dtype": (dict(mask=torch.ones(1, 5, dtype=torch.int32)), TypeError, "mask has dtype torch.int32; it must be"),
    "dropout": (dict(dropout=1.0), ValueError, "dropout=1.0; it must be at least 0 and less than 1"),
    "seed": (
        dict(dropout=0.1, seed=torch.zeros(())),
        TypeError,
        "seed has dtype torch.float32; it must be",
    ),
}


@pytest.mark.parametrize("change, kind, message", WRONG.values(), ids=WRONG)
def test_messages(change, kind, message):
    arguments = dict(q=torch.zeros(1, 3, 2, 16), k=torch.zeros(1, 5, 1, 16), v=torch.zeros(1, 5, 1, 16), scale=1.0)
    with pytest.raises(kind) as caught:
        attention(**arguments | change)
    assert str(caught.value).startswith(message)

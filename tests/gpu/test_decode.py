"""Attention over a cached prefix: its reference against plain attention, its kernels against the reference."""

import math

import pytest
import torch

from fastprior.kernels import ops, reference
from fastprior.kernels.gpu import decode, launch
from helpers.kernel_checks import DEVICE, DTYPES, check_gradients, guarded, random, sliced
from helpers.pairwise import pairwise
from helpers.priors import relative_error

HALF = torch.float16
TENSORS = "q", "k", "v", "prefix_k", "prefix_v"


def tables(length: int, width: int, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    angle = random(length, width // 2, dtype=dtype).repeat_interleave(2, dim=-1)
    return angle.cos(), angle.sin() * torch.tensor([-1, 1], device=DEVICE, dtype=dtype).repeat(width // 2)


def make(
    rows=2, prompts=2, prefix=9, suffix=3, seq=3, heads=4, kv_heads=1, dim_head=16, dtype=torch.float32, cached=None,
    width=None, bias=False, mask=False,
):  # fmt: skip
    """The tensors of one call by name, those that get gradients among them; k and v are halves of one projection."""
    k, v = random(rows, suffix, kv_heads, 2 * dim_head, dtype=dtype).chunk(2, dim=-1)
    prefix_k, prefix_v = random(2, prompts, prefix, kv_heads, dim_head, dtype=cached or dtype)
    cos, sin = (None, None) if width is None else tables(suffix, width)
    inputs = dict(
        q=random(rows, seq, heads, dim_head, dtype=dtype),
        k=k,
        v=v,
        prefix_k=prefix_k,
        prefix_v=prefix_v,
        cos=cos,
        sin=sin,
        bias=random(suffix, heads, prefix + suffix) if bias else None,
        mask=random(prompts, prefix, seed=3) if mask else None,
    )
    for name in (*TENSORS, "bias"):
        if inputs[name] is not None:
            inputs[name] = inputs[name].detach().requires_grad_()
    return inputs


def caller(function, cosine=False, scale=0.3):
    def call(q, k, v, prefix_k, prefix_v, cos=None, sin=None, bias=None, mask=None):
        rotary = None if cos is None else (cos, sin)
        return function(
            q, k, v, prefix_k, prefix_v, scale=scale, rotary=rotary, cosine=cosine, bias=bias, mask=mask
        )  # fmt: skip

    return call


def check_call(inputs, **kwargs):
    with guarded():
        check_gradients(
            caller(decode.decode_attention, **kwargs), caller(reference.decode_attention, **kwargs), inputs
        )  # fmt: skip


# the reference


@pytest.mark.parametrize("options", ["causal", "bias", "rotary", "cosine", "all"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("seq", [1, 4])
def test_reference_is_attention_over_prefix_and_suffix(seq, samples, kv_heads, options):
    prompts, prefix, suffix, heads, dim = 2, 5, 4, 4, 8
    rows, every = prompts * samples, options == "all"
    k, v = torch.randn(2, prompts, prefix, kv_heads, dim, dtype=torch.float64)
    own_k, own_v = torch.randn(2, rows, suffix, kv_heads, dim, dtype=torch.float64)
    q = torch.randn(rows, seq, heads, dim, dtype=torch.float64)
    rotary = tuple(t.cpu() for t in tables(prefix + suffix, 6, torch.float64)) if every or options == "rotary" else None
    bias, mask = None, None
    if every or options == "bias":
        bias = torch.randn(suffix, heads, prefix + suffix, dtype=torch.float64)
    if every:
        mask = torch.zeros(prompts, prefix, dtype=torch.float64)
        mask[0, 2:], mask[1, 3] = -math.inf, -1.5
    kwargs = dict(scale=0.7, cosine=every or options == "cosine")
    whole_k, whole_v = (
        torch.cat((t.repeat_interleave(samples, 0), own), dim=1) for t, own in ((k, own_k), (v, own_v))
    )  # fmt: skip
    cos, sin = rotary or (None, None)
    args = reference.AttentionArgs(
        q, whole_k, whole_v, **kwargs, cos=cos, sin=sin, causal=bias is None,
        bias=None if bias is None else bias[suffix - seq :],
        mask=None if mask is None else torch.nn.functional.pad(mask, (0, suffix)).repeat_interleave(samples, 0),
    )  # fmt: skip
    wanted = reference.attention(args)
    early, late = (None, None) if rotary is None else ([t[:prefix] for t in rotary], tuple(t[prefix:] for t in rotary))
    prepared = reference.prepare_heads(k, early, kwargs["cosine"])
    got = reference.decode_attention(q, own_k, own_v, prepared, v, **kwargs, rotary=late, bias=bias, mask=mask)
    assert relative_error(got, wanted) < 1e-12


@pytest.mark.parametrize("rows", [2, 4])
def test_reference_gradients(rows):
    inputs = make(rows=rows, heads=2, kv_heads=2, prefix=3, suffix=2, seq=2, dim_head=4, width=2, bias=True, mask=True)
    given = tuple(t.detach().double().requires_grad_() for t in inputs.values())
    assert torch.autograd.gradcheck(caller(reference.decode_attention, cosine=True), given)


def test_reference_takes_a_bias_and_a_cache_of_other_dtypes():
    inputs = make(rows=4, bias=True, dtype=HALF)
    wanted = caller(reference.decode_attention)(**inputs)
    for dtype in (torch.float32, torch.float64):
        others = {name: inputs[name].to(dtype) for name in ("prefix_k", "prefix_v", "bias")}
        assert relative_error(caller(reference.decode_attention)(**inputs | others), wanted) < 1e-3


# the kernels

SHAPES = {
    "mqa": dict(heads=12, dim_head=64),
    "one-of-all": dict(rows=1, prompts=1, prefix=1, suffix=1, seq=1, heads=1),
    "full-heads": dict(heads=3, kv_heads=3, dim_head=40),
    "groups-of-samples": dict(rows=6, heads=6, kv_heads=2, dim_head=32, suffix=4, seq=2),
    "dim-52": dict(rows=3, prompts=1, heads=5, dim_head=52, suffix=5, seq=5),
    "whole-tile": dict(rows=1, prompts=1, prefix=64, heads=16, suffix=16, seq=1),
    "tile-and-one": dict(rows=2, prefix=65, heads=17, suffix=2, seq=1),
    "dim-128": dict(rows=2, prompts=1, prefix=70, heads=4, dim_head=128, suffix=2, seq=2),
    "many-heads": dict(rows=1, prompts=1, prefix=78, heads=32, dim_head=24, suffix=3, seq=3),
    "two-splits": dict(rows=2, prompts=1, prefix=512, heads=4, suffix=2, seq=2),
    "odd-splits": dict(rows=1, prompts=1, prefix=1101, heads=3, kv_heads=3, dim_head=20, suffix=8, seq=8),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape, options, dtype", pairwise(shape=SHAPES, options=["plain", "all-options"], dtype=DTYPES), ids=str
)
def test_forward_and_gradients(shape, options, dtype):
    shape, options = SHAPES[shape], options == "all-options"
    width = shape.get("dim_head", 16) // 4 * 2
    inputs = make(**shape, dtype=dtype, **(dict(width=width, bias=True, mask=True) if options else {}))
    check_call(inputs, cosine=options, scale=8.0 if options else 0.3)


@pytest.mark.parametrize(
    "options", [dict(width=16), dict(width=6), dict(bias=True), dict(mask=True), dict(cosine=True)]
)
@pytest.mark.parametrize("seq", [1, 3])
def test_each_option(options, seq):
    options = dict(options)
    cosine = options.pop("cosine", False)
    check_call(make(rows=4, heads=6, kv_heads=2, seq=seq, **options), cosine=cosine)


@pytest.mark.parametrize("dtype, cached", [(HALF, torch.float32), (torch.float32, HALF)], ids=str)
@pytest.mark.parametrize("prefix", [9, 600])
def test_a_cache_of_another_dtype_is_used_in_full_precision(dtype, cached, prefix):
    inputs = make(rows=2, prompts=1, prefix=prefix, heads=2, dtype=dtype, cached=cached, width=16, bias=True)
    check_call(inputs, cosine=True, scale=16.0)
    exact = caller(reference.decode_attention, cosine=True, scale=16.0)(
        **{name: None if t is None else t.double() for name, t in inputs.items()}
    )
    got = caller(decode.decode_attention, cosine=True, scale=16.0)(**inputs)
    assert relative_error(got, exact) < (1e-5 if dtype == torch.float32 else 6e-4)  # half a place of 11 bits: 4.9e-4


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_strides(dtype):
    inputs = make(rows=4, heads=6, kv_heads=2, dim_head=24, dtype=dtype, width=8, bias=True, mask=True)
    inputs = {name: sliced(t) for name, t in inputs.items()}
    for name in TENSORS:  # heads before tokens
        inputs[name] = sliced(inputs[name].detach().transpose(1, 2)).transpose(1, 2).detach().requires_grad_()
    inputs["bias"] = inputs["bias"].detach().transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    check_call(inputs, cosine=True)


@pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter")  # numpy's, of infinities that are meant
@pytest.mark.parametrize("prefix", [70, 600])
@pytest.mark.parametrize("by", ["bias", "mask"])
def test_keys_that_are_not_seen(prefix, by):
    """-inf over the first tiles, a whole split, or the whole prefix; and over a part of the suffix."""
    inputs = make(prefix=prefix, bias=True, mask=True, heads=2)
    with torch.no_grad():
        inputs["bias"][0, :, -2:] = inputs["bias"][1, :, -1:] = -math.inf
        if by == "bias":
            inputs["bias"][0, :, :prefix] = inputs["bias"][1, 1, : prefix // 2] = -math.inf
        else:
            inputs["mask"][0, : prefix - 3] = inputs["mask"][1] = -math.inf
    del inputs["cos"], inputs["sin"]
    check_call(inputs)


def test_a_null_query_and_key_have_no_direction():
    inputs = make()
    with torch.no_grad():
        inputs["q"][0], inputs["k"][1] = 0, 0
    inputs = {name: None if t is None else t.detach() for name, t in inputs.items()}
    check_call(inputs, cosine=True)


@pytest.mark.slow
@pytest.mark.parametrize("prefix", [30, 700])
def test_two_runs_give_equal_bits(prefix):
    inputs = make(rows=3, prompts=1, prefix=prefix, heads=6, width=8, bias=True)
    assert torch.equal(*(caller(decode.decode_attention, cosine=True)(**inputs) for _ in range(2)))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend):
    run, wanted = (caller(f.decode_attention, cosine=True) for f in (decode, reference))
    compiled = torch.compile(lambda **given: run(**given) * 2, fullgraph=True, backend=backend)
    check_gradients(compiled, lambda **given: wanted(**given) * 2, make(rows=4, width=8, bias=True, mask=True))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, dict(width=8, bias=True, mask=True)], ids=["plain", "all-options"])
def test_custom_op(options):
    arguments = *make(**options).values(), 0.3, True
    torch.library.opcheck(torch.ops.fastprior.decode_attention.default, arguments)


def test_models_reach_it():
    call, inputs = caller(ops.decode_attention), make()
    for backend in ("reference", "triton"):
        with ops.using(backend), launch.recording() as recorded:
            call(**inputs)
        assert len(recorded) == (backend == "triton")


@pytest.mark.parametrize("dim_head", [16, 52, 64, 128])
@pytest.mark.parametrize("wide", [True, False])
def test_splits_cover_the_prefix(dim_head, wide):
    for prefix in (1, 78, 258, 511, 512, 600, 1101, 1900, 2048, 5000):
        for programs in (1, 64, 65, 1000):
            config = decode.decode_attention_config(programs, prefix, dim_head, wide)
            assert config.span % config.block_n == 0 and config.splits <= decode.MAX_SPLITS
            assert (config.splits - 1) * config.span < prefix <= config.splits * config.span
            assert (config.splits > 1) == (prefix >= 512 and programs <= 64)


GOOD = make(width=8, bias=True, mask=True)
WIDE = dict(zip(("cos", "sin"), tables(3, 18)))


@pytest.mark.parametrize(
    "error, text, changed",
    [
        (ValueError, r"q has shape \(2, 3, 64\); it must have 4 dimensions", dict(q=GOOD["q"].flatten(2))),
        (ValueError, r"v has shape \(2, 2, 1, 16\); it must be \(2, 3, 1, 16\)", dict(v=GOOD["v"][:, :2])),
        (ValueError, r"prefix_v has shape \(2, 8, 1, 16\); it must be \(2, 9", dict(prefix_v=random(2, 8, 1, 16))),
        (ValueError, r"bias has shape \(3, 4, 9\); it must be \(3, 4, 12\)", dict(bias=random(3, 4, 9))),
        (ValueError, r"mask has shape \(4, 9\); it must be \(2, 9\)", dict(mask=random(4, 9))),
        (ValueError, r"cos has shape \(2, 8\); it must be \(3, 8\)", dict(cos=random(2, 8))),
        (ValueError, r"sin has shape \(3, 6\); it must be \(3, 8\)", dict(sin=random(3, 6))),
        (
            ValueError,
            "cos has width 18; it must be even and at most dim_head, 16",
            dict(zip(("cos", "sin"), tables(3, 18))),
        ),
        (ValueError, "cos has width 3; it must be even", dict(cos=random(3, 3), sin=random(3, 3))),
        (ValueError, "k is on meta; it must be on", dict(k=GOOD["k"].to("meta"))),
        (ValueError, "q has stride 4 in its last dimension", dict(q=random(2, 3, 16, 4).transpose(2, 3))),
        (ValueError, "prefix_k has shape .*; no dimension may be zero", make(prefix=0)),
        (ValueError, "dim_head is 8; it must be from 16 to 128", make(dim_head=8)),
        (ValueError, "dim_head is 130; it must be from 16 to 128", make(dim_head=130)),
        (ValueError, r"the suffix has 17 tokens; it must have from 1 \(those of q\) to 16", make(suffix=17, seq=1)),
        (ValueError, r"the suffix has 3 tokens; it must have from 4 \(those of q\)", make(seq=4)),
        (ValueError, "kv_heads is 3; it must divide the 4 heads of q", make(kv_heads=3)),
        (ValueError, "q has 3 rows; they must be a multiple of the 2 prompts", make(rows=3)),
        (TypeError, "k has dtype torch.float16; it must be torch.float32, as q is", dict(k=GOOD["k"].half())),
        (TypeError, "prefix_v has dtype torch.float16; .* as prefix_k is", dict(prefix_v=GOOD["prefix_v"].half())),
        (TypeError, "mask has dtype torch.bool; it must be one of float32", dict(mask=GOOD["mask"] > 0)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors(error, text, changed):
    with pytest.raises(error, match=text):
        caller(decode.decode_attention)(**GOOD | changed)

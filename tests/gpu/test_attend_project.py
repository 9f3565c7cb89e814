"""Attention over a cached prefix and the projection behind it in one launch, against both by the reference."""

import pytest
import torch

pytest.importorskip("triton")

from fastprior.kernels import reference
from fastprior.kernels.arguments import LinearArgs
from fastprior.kernels.gpu import attend_project, launch
from fastprior.kernels.gpu.attend_project import attend_project_config, launch_attend_project
from fastprior.kernels.gpu.launch import ceil_div
from fastprior.kernels.gpu.skinny_linear import Weight
from helpers.kernel_checks import CANARY, DEVICE, DTYPES, cast, check, guarded, random
from helpers.pairwise import pairwise

# of queries that are none, 0 / 0
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning")
HALF, BRAIN = torch.float16, torch.bfloat16
OPERANDS = DTYPES if launch.interpreted() else [HALF, BRAIN]  # `takes` allows no fp32
OPTIONS = {
    "causal": (),
    "bias": ("bias",),
    "mask": ("mask",),
    "rotary": ("rotary",),
    "cosine": ("cosine",),
    "all": ("bias", "mask", "rotary", "cosine"),
}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter runs them one after the other."""
    if launch.interpreted():
        monkeypatch.setattr(attend_project, "MULTIPROCESSORS", 3)


def make(seq, heads, dim_head, prefix, dtype, options=(), *, suffix=None, outputs=40, weight=None) -> dict:
    """What `run` and `expected` take; q, k and v are slices of one projection, as in a step."""
    suffix, width = suffix or seq, 2 * (dim_head // 4)
    own = heads * dim_head
    qkv = random(suffix, own + 2 * dim_head, dtype=dtype)
    q, k, v = qkv.split((own, dim_head, dim_head), dim=-1)
    given = dict(q=q[suffix - seq :].unflatten(-1, (heads, dim_head)), k=k, v=v, scale=dim_head**-0.5, cosine=False)
    given |= dict(zip(("prefix_k", "prefix_v"), random(2, prefix, dim_head, dtype=dtype, seed=1)))
    given["weight"] = weight or Weight(random(outputs, own, dtype=dtype, seed=2, scale=own**-0.5))
    if "rotary" in options:
        angle = random(suffix, width // 2, seed=3).repeat_interleave(2, dim=-1)
        given["rotary"] = angle.cos(), angle.sin() * torch.tensor([-1, 1], device=DEVICE).repeat(width // 2)
    if "bias" in options:
        given["bias"] = random(suffix, heads, prefix + suffix, seed=4)
    if "mask" in options:
        given["mask"] = random(prefix, seed=5)
        given["mask"][prefix // 2] = -torch.inf
    if "cosine" in options:
        given |= dict(cosine=True, scale=8.0)
    return given


def run(q, *given, dtype=None, **options) -> torch.Tensor:
    outputs = len(options["weight"].weight)
    with guarded():
        out = launch.empty((len(q), outputs), q, dtype)
        launch_attend_project(q, *given, out=out, **options)
    return out


def expected(kind: str, q, k, v, prefix_k, prefix_v, weight, rotary=None, bias=None, mask=None, **options):
    dtype = torch.float64 if kind == "exact" else q.dtype
    if kind == "exact":
        q, k, v, prefix_k, prefix_v, bias, mask = (
            None if t is None else t.double() for t in (q, k, v, prefix_k, prefix_v, bias, mask)
        )
        rotary = rotary and tuple(t.double() for t in rotary)
    many = q[None], k[None, :, None], v[None, :, None], prefix_k[None, :, None], prefix_v[None, :, None]
    mask = None if mask is None else mask[None]
    attended = reference.decode_attention(*many, rotary=rotary, bias=bias, mask=mask, **options)
    matrix, out_bias, out_scale = (None if t is None else cast(t, kind if t.itemsize > 1 else "plain") for t in weight)
    return reference.linear(LinearArgs(attended[0].to(dtype), matrix, out_bias, scale=out_scale))


def compare(inputs: dict) -> None:
    check(run(**inputs), expected("exact", **inputs), expected("plain", **inputs))


# no tile full, exactly one, one and a rest, two, and several
@pytest.mark.parametrize("prefix", [1, 15, 16, 17, 79, 128, 130, 200])
@pytest.mark.parametrize("options", ["causal", "all"])
def test_prefixes(options, prefix):
    compare(make(3, 3, 16, prefix, HALF, OPTIONS[options]))


@pytest.mark.parametrize(
    "options, heads, seq, dim_head, dtype",
    pairwise(options=OPTIONS, heads=[1, 3, 12], seq=[1, 3, 5], dim_head=[16, 32, 52, 64], dtype=OPERANDS),
    ids=str,
)
def test_options(options, heads, seq, dim_head, dtype):
    compare(make(seq, heads, dim_head, 37, dtype, OPTIONS[options]))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("seq, suffix", [(1, 3), (2, 5), (1, 16)])
def test_queries_of_the_last_tokens_alone(seq, suffix, options):
    compare(make(seq, 3, 32, 20, HALF, OPTIONS[options], suffix=suffix))


@pytest.mark.parametrize("stored", [None, torch.int8, torch.float8_e4m3fn], ids=["16 bits", "int8", "fp8"])
@pytest.mark.parametrize("outputs", [1, 33, 50])
def test_projections(outputs, stored):
    """With a bias, and 8 bits with a scale; a slice of a larger matrix is read in place."""
    weight = random(outputs, 3 * 32, seed=2, scale=0.1)
    scale = None
    if stored is not None:
        scale = weight.abs().amax(dim=1) / (127 if stored == torch.int8 else 448)
        weight = weight / scale[:, None]
        weight = weight.round() if stored == torch.int8 else weight
    weight = weight.to(stored or HALF)
    bias = random(outputs, dtype=HALF, seed=6)
    inputs = make(3, 3, 32, 20, HALF, weight=Weight(weight, bias, scale))
    compare(inputs)
    wider = torch.full((outputs, 100), 1, device=DEVICE).to(weight.dtype)
    wider[:, :96] = weight
    assert torch.equal(run(**inputs | dict(weight=Weight(wider[:, :96], bias, scale))), run(**inputs))


def test_results_of_any_dtype_and_stride():
    inputs = make(3, 3, 32, 20, HALF)
    assert torch.equal(run(**inputs), run(**inputs, dtype=torch.float32).half())
    whole = torch.full((3, 50), CANARY, device=DEVICE)
    launch_attend_project(**inputs, out=whole[:, 5:45])
    assert torch.equal(whole[:, 5:45].half(), run(**inputs))
    assert (whole[:, :5] == CANARY).all() and (whole[:, 45:] == CANARY).all()


def test_what_lies_beside_the_cache_is_not_read():
    """Layers lie one behind the other, and so do the projections of q, k and v."""
    inputs = make(3, 3, 32, 37, HALF, OPTIONS["all"])
    wanted = run(**inputs)
    for name in ("prefix_k", "prefix_v", "k", "v"):
        t = inputs[name]
        whole = torch.full((len(t) + 40, t.shape[1] + 8), torch.nan, dtype=HALF, device=DEVICE)
        inputs[name] = whole[: len(t), : t.shape[1]]
        inputs[name].copy_(t)
    assert torch.equal(run(**inputs), wanted)


def test_a_token_sees_none_behind_it():
    inputs = make(3, 3, 32, 20, HALF)
    wanted = run(**inputs)
    for name in ("k", "v"):
        inputs[name] = inputs[name].clone()
        inputs[name][2] = 100
    got = run(**inputs)
    assert torch.equal(got[:2], wanted[:2]) and not torch.allclose(got[2], wanted[2])


def test_nan_goes_where_it_is_seen():
    """And what is rounded up to tokens, heads, features and columns spoils nothing."""
    for name in ("q", "k", "v", "prefix_k", "prefix_v"):
        inputs = make(3, 3, 52, 20, HALF)
        inputs[name] = inputs[name].clone()
        inputs[name][2].view(-1)[0] = torch.nan
        got, plain = run(**inputs), expected("plain", **inputs)
        assert torch.equal(got.isnan(), plain.isnan()) and got.isnan().any()


TAKEN = {  # rows, seq, heads, kv_heads, dim_head, prefix, operand
    "D2-small": ((1, 3, 12, 1, 64, 79, BRAIN), True),
    "its last block": ((1, 1, 12, 1, 64, 79, BRAIN), True),
    "one row of two samples": ((1, 5, 8, 1, 64, 79, HALF), True),
    "several rows": ((2, 3, 12, 1, 64, 79, BRAIN), False),
    "heads with keys of their own": ((1, 3, 12, 12, 64, 79, BRAIN), False),
    "products of fp32": ((1, 3, 12, 1, 64, 79, torch.float32), False),
    "narrow heads": ((1, 3, 12, 1, 8, 79, BRAIN), False),
    "wide heads": ((1, 3, 12, 1, 160, 79, BRAIN), False),
    "a long prefix": ((1, 3, 12, 1, 64, 513, BRAIN), False),
    "many queries": ((1, 5, 12, 1, 64, 79, BRAIN), False),
}


@pytest.mark.parametrize("arguments, taken", TAKEN.values(), ids=TAKEN)
def test_what_it_takes(arguments, taken):
    assert attend_project.takes(*arguments) == taken


@pytest.mark.parametrize("seq, heads, prefix, outputs", [(3, 12, 79, 768), (1, 12, 79, 768), (1, 32, 79, 768)])
def test_config_of_the_models(seq, heads, prefix, outputs, monkeypatch):
    monkeypatch.undo()
    assert attend_project.takes(1, seq, heads, 1, 64, prefix, BRAIN)
    config = attend_project_config(seq, heads, 64, prefix, outputs)
    assert 100 <= ceil_div(outputs, config.span) <= attend_project.MULTIPROCESSORS, "not one wave of all of the chip"


@pytest.mark.parametrize("prefix", range(1, 129, 7))
@pytest.mark.parametrize("seq, heads", [(1, 1), (3, 12), (5, 3), (16, 1)])
def test_config_covers_all(seq, heads, prefix):
    config = attend_project_config(seq, heads, 52, prefix, 50)
    assert config.tokens >= seq and config.heads >= heads and config.tokens * config.heads >= 16
    assert config.block_d >= 52 and config.block_n >= config.span
    whole = prefix // config.block_c * config.block_c
    assert config.rest >= prefix - whole if whole else config.block_c >= prefix

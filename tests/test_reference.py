"""The reference operations against their definitions."""

import pytest
import torch
import torch.nn.functional as F

from fastprior.kernels import reference as ops
from fastprior.kernels.arguments import LinearArgs
from helpers.priors import relative_error


def linear(*args, **kwargs):
    return ops.linear(LinearArgs(*args, **kwargs))


def attention(q, k, v, *, rotary=(None, None), **options):
    return ops.attention(ops.AttentionArgs(q, k, v, cos=rotary[0], sin=rotary[1], **options))


@pytest.mark.parametrize("rows", [1, 4, 5, 24, 64, 65, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_linear(rows, dtype):
    x, weight, bias = (torch.randn(*shape, dtype=dtype) for shape in ((rows, 2, 40), (30, 40), (30,)))
    wanted = x.double() @ weight.double().t() + bias.double()
    tolerance = 0.02 if dtype == torch.bfloat16 else 1e-5
    for given in (x, x.transpose(0, 1).contiguous().transpose(0, 1)):
        got = linear(given, weight, bias)
        assert got.dtype == dtype and relative_error(got, wanted) < tolerance
        assert linear(given, weight).is_contiguous(), "a strided result changes what randn_like and dropout draw"


def test_linear_gradients():
    x, weight = torch.randn(6, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    assert torch.autograd.gradcheck(linear, (x.requires_grad_(), weight.requires_grad_()))
    x, weight = (t.detach().float().requires_grad_() for t in (x, weight))
    cotangent = torch.randn(6, 5)
    given, wanted = (torch.autograd.grad(f(x, weight), (x, weight), cotangent) for f in (linear, F.linear))
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(given, wanted))


def test_rotate_turns_pairs_and_keeps_the_rest():
    x, angle = torch.randn(3, 7), torch.rand(3, 2)
    cos, sin = (t.repeat_interleave(2, dim=-1) for t in (angle.cos(), angle.sin()))
    got = ops.rotate(x, cos, sin * torch.tensor([-1.0, 1, -1, 1]))
    turned = torch.view_as_complex(x[:, :4].reshape(3, 2, 2).contiguous()) * torch.polar(torch.ones_like(angle), angle)
    assert relative_error(got[:, :4], torch.view_as_real(turned).flatten(1)) < 1e-6
    assert torch.equal(got[:, 4:], x[:, 4:])


def by_hand(q, k, v, bias) -> torch.Tensor:
    """Plain attention of every head over its own copy of the keys: bias (seq, heads, keys)."""
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], dim=2) for t in (k, v))
    out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), bias.transpose(0, 1), scale=0.3)
    return out.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("seq", [1, 3, 6])
def test_attention(kv_heads, seq):
    batch, keys, heads, dim = 2, 6, 4, 8
    q, k, v = (torch.randn(batch, n, h, dim) for n, h in ((seq, heads), (keys, kv_heads), (keys, kv_heads)))
    bias, null_kv = torch.randn(seq, heads, keys + 1), torch.randn(2, kv_heads, dim)
    hidden = torch.arange(keys + 1) > torch.arange(keys - seq, keys)[:, None] + 1
    columns = (torch.cat((n.expand(batch, 1, -1, -1), t), dim=1) for n, t in zip(null_kv, (k, v)))
    wanted = by_hand(q, *columns, bias.masked_fill(hidden[:, None], -torch.inf))
    got = attention(q, k, v, scale=0.3, null_kv=null_kv, bias=bias, causal=True)
    assert relative_error(got, wanted) < 1e-5
    unlimited = attention(q, k, v, scale=0.3, causal=False)
    assert relative_error(unlimited, by_hand(q, k, v, torch.zeros(seq, heads, keys))) < 1e-5


def test_attention_prepares_queries_and_keys():
    q, k, v = (torch.randn(2, 5, h, 8) for h in (4, 1, 1))
    angle = torch.rand(5, 2).repeat_interleave(2, dim=-1)
    rotary = angle.cos(), angle.sin() * torch.tensor([-1.0, 1, -1, 1])
    ready = [F.normalize(ops.rotate(t, *(table[:, None] for table in rotary)), dim=-1) for t in (q, k)]
    wanted = by_hand(*ready, v, torch.zeros(5, 4, 5))
    assert relative_error(attention(q, k, v, scale=0.3, rotary=rotary, cosine=True), wanted) < 1e-5
    last = attention(q[:, 3:], k, v, scale=0.3, rotary=rotary, cosine=True)
    assert relative_error(last, wanted[:, 3:]) < 1e-5, "queries stand at the last positions of the keys"


@pytest.mark.parametrize("null", [0, 1])
def test_attention_bias_by_bucket(null):
    """The bucket of the distance to a column; a null key at column 0 shifts the others."""
    q, k, v = (torch.randn(2, n, 2, 8) for n in (3, 5, 5))
    table, buckets = torch.randn(3, 2), torch.tensor([0, 1, 1, 2, 2])
    null_kv = torch.randn(2, 2, 8) if null else None
    dense = torch.stack([
        torch.stack([table[buckets[max(position - column, 0)]] for column in range(5 + null)], dim=-1)
        for position in (2, 3, 4)
    ])  # fmt: skip
    got, wanted = (
        attention(q, k, v, scale=0.3, null_kv=null_kv, causal=True, **bias)
        for bias in (dict(bias=table, buckets=buckets), dict(bias=dense))
    )
    assert relative_error(got, wanted) < 1e-6


def test_attention_masks():
    q, k, v = (torch.randn(3, 4, 2, 8) for _ in range(3))
    keep = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    got = attention(q, k, v, scale=0.3, mask=keep)
    assert relative_error(got[:1], by_hand(q[:1], k[:1, [0, 1, 3]], v[:1, [0, 1, 3]], torch.zeros(4, 2, 3))) < 1e-5
    assert relative_error(got[2], v[2].mean(0).flatten().expand(4, -1)) < 1e-5, "a row without a key sees all alike"
    added = attention(q, k, v, scale=0.3, mask=torch.where(keep, 0.0, -1e4))
    assert relative_error(added[:2], got[:2]) < 1e-5
    soft = attention(q, k, v, scale=0.3, causal=True, causal_fill=-1e4)
    assert relative_error(soft, attention(q, k, v, scale=0.3, causal=True)) < 1e-5


def test_attention_dropout_by_seed():
    q, k, v = (torch.randn(2, 6, h, 8) for h in (4, 2, 2))
    seed = torch.tensor(5)
    weights = attention(q, k, torch.eye(6, 8).expand(2, 2, 6, 8).transpose(1, 2), scale=0.3).unflatten(-1, (4, 8))
    kept = ops.dropout_mask(seed, 0.4, 2, 4, 6, 6).transpose(1, 2)
    assert 0.4 < kept.float().mean() < 0.8
    values = v.repeat_interleave(2, dim=2)
    wanted = torch.einsum("bshk,bkhd->bshd", weights[..., :6] * kept / 0.6, values).flatten(2)
    assert relative_error(attention(q, k, v, scale=0.3, dropout=0.4, seed=seed), wanted) < 1e-5


def test_philox_is_the_published_generator():
    """Known answers of Random123 (Salmon et al. 2011) for philox4x32-10, and the spread of what is made of it."""
    zero = torch.tensor(0)
    assert ops.philox(zero, zero, zero).item() == 0x6627E8D5
    uniform = ops.philox_uniform(torch.tensor(2**40 + 3), torch.arange(20000), zero)
    assert 0 <= uniform.min() and uniform.max() < 1 and (uniform.mean() - 0.5).abs() < 0.01
    normal = ops.philox_normal(torch.tensor(3), torch.tensor([4, 5]), 10000)
    assert normal.mean().abs() < 0.02 and (normal.std() - 1).abs() < 0.02
    assert torch.corrcoef(normal)[0, 1].abs() < 0.03


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("biased", [True, False])
def test_decode_attention_equals_attention_over_everything(samples, kv_heads, biased):
    prompts, prefix, suffix, heads, dim = 2, 6, 3, 4, 8
    rows = prompts * samples
    q, k, v = (torch.randn(rows, suffix, h, dim) for h in (heads, kv_heads, kv_heads))
    prefix_k, prefix_v = torch.randn(2, prompts, prefix, kv_heads, dim)
    bias = torch.randn(suffix, heads, prefix + suffix) * biased
    bias[0, :, -2:] = bias[1, :, -1:] = -torch.inf
    whole = [torch.cat((p.repeat_interleave(samples, 0), own), dim=1) for p, own in ((prefix_k, k), (prefix_v, v))]
    wanted = by_hand(q, *whole, bias)
    given = k, v, prefix_k, prefix_v
    kwargs = dict(scale=0.3, bias=bias if biased else None)
    assert relative_error(ops.decode_attention(q, *given, **kwargs), wanted) < 1e-5
    assert relative_error(ops.decode_attention(q[:, 2:], *given, **kwargs), wanted[:, 2:]) < 1e-5
    mask = torch.zeros(prompts, prefix)
    mask[0, 2:] = -1e4
    got = ops.decode_attention(q, *given, **kwargs, mask=mask)
    short = ops.decode_attention(q[:samples], k[:samples], v[:samples], prefix_k[:1, :2], prefix_v[:1, :2], scale=0.3,
                                 bias=bias[..., [0, 1, 6, 7, 8]])  # fmt: skip
    assert relative_error(got[:samples], short) < 1e-5 and relative_error(got[samples:], wanted[samples:]) < 1e-5


@pytest.mark.parametrize("activation, residual", [(None, False), ("gelu", True), ("swiglu", True)])
def test_linear_with_its_surroundings(activation, residual):
    x, weight, bias, gain, shift = (torch.randn(*s) for s in ((5, 8), (6, 8), (6,), (8,), (8,)))
    y = F.layer_norm(x, (8,), gain, shift) @ weight.t() + bias
    y = {None: y, "gelu": F.gelu(y), "swiglu": y[:, :3] * F.silu(y[:, 3:])}[activation]
    added = torch.randn_like(y) if residual else None
    kwargs = dict(norm_gain=gain, norm_bias=shift, activation=activation, residual=added)
    assert relative_error(linear(x, weight, bias, **kwargs), y + added if residual else y) < 1e-5
    scale = weight.abs().amax(dim=1) / 127
    stored = (weight / scale[:, None]).round().to(torch.int8)
    got = linear(x, stored, bias, scale=scale)
    assert relative_error(got, x @ (stored.float() * scale[:, None]).t() + bias) < 1e-5


@pytest.mark.parametrize("stable", [False, True])
@pytest.mark.parametrize("l2", [False, True])
def test_layer_norm_with_its_surroundings(stable, l2):
    x, residual, after, gain, shift = (torch.randn(*s) for s in ((4, 8), (4, 8), (4, 8), (8,), (8,)))
    total = x + residual
    scaled = total / total.amax(dim=-1, keepdim=True) if stable else total
    wanted = (scaled - scaled.mean(-1, keepdim=True)) / (scaled.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    wanted = wanted * gain + shift
    wanted = (wanted / wanted.norm(dim=-1, keepdim=True) if l2 else wanted) + after
    y, summed = ops.layer_norm(ops.NormArgs(x, gain, shift, residual, after, stable=stable, l2=l2))
    assert relative_error(y, wanted) < 1e-5 and torch.equal(summed, total)
    rms = ops.layer_norm(ops.NormArgs(x, gain, rms=True))
    assert relative_error(rms, x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain) < 1e-5

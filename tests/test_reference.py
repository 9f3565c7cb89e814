"""The reference operations against their definitions."""

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error

from fastprior.kernels import reference as ops


@pytest.mark.parametrize("rows", [1, 4, 5, 24, 64, 65, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_linear(rows, dtype):
    x, weight, bias = (torch.randn(*shape, dtype=dtype) for shape in ((rows, 2, 40), (30, 40), (30,)))
    wanted = x.double() @ weight.double().t() + bias.double()
    tolerance = 0.02 if dtype == torch.bfloat16 else 1e-5
    for given in (x, x.transpose(0, 1).contiguous().transpose(0, 1)):
        got = ops.linear(given, weight, bias)
        assert got.dtype == dtype and relative_error(got, wanted) < tolerance
        assert ops.linear(given, weight).is_contiguous(), "a strided result changes what randn_like and dropout draw"


def test_linear_gradients():
    x, weight = torch.randn(6, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    assert torch.autograd.gradcheck(ops.linear, (x.requires_grad_(), weight.requires_grad_()))
    x, weight = (t.detach().float().requires_grad_() for t in (x, weight))
    cotangent = torch.randn(6, 5)
    given, wanted = (torch.autograd.grad(f(x, weight), (x, weight), cotangent) for f in (ops.linear, F.linear))
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(given, wanted))


def test_rotate_turns_pairs_and_keeps_the_rest():
    x, angle = torch.randn(3, 7), torch.rand(3, 2)
    cos, sin = (t.repeat_interleave(2, dim=-1) for t in (angle.cos(), angle.sin()))
    got = ops.rotate(x, cos, sin * torch.tensor([-1.0, 1, -1, 1]))
    turned = torch.view_as_complex(x[:, :4].reshape(3, 2, 2).contiguous()) * torch.polar(torch.ones_like(angle), angle)
    assert relative_error(got[:, :4], torch.view_as_real(turned).flatten(1)) < 1e-6
    assert torch.equal(got[:, 4:], x[:, 4:])


@pytest.mark.parametrize("samples", [1, 3])
def test_decode_attention_equals_attention_over_everything(samples):
    prompts, prefix, suffix, heads, dim = 2, 6, 3, 4, 8
    rows = prompts * samples
    q, k, v = (torch.randn(rows, suffix, *shape) for shape in ((heads, dim), (dim,), (dim,)))
    prefix_k, prefix_v = torch.randn(2, prompts, prefix, dim)
    bias = torch.randn(suffix * heads, prefix + suffix)
    bias[: 2 * heads, -1] = -torch.inf
    whole = (torch.cat((p.repeat_interleave(samples, 0), own), dim=1) for p, own in ((prefix_k, k), (prefix_v, v)))
    wanted = ops.attention(q, *whole, bias)
    logits = torch.einsum("bshd,bkd->bshk", q[:1], torch.cat((prefix_k[:1], k[:1]), dim=1)) + bias.view(
        suffix, heads, -1
    )
    by_hand = torch.einsum("bshk,bkd->bshd", logits.softmax(-1), torch.cat((prefix_v[:1], v[:1]), dim=1)).flatten(2)
    assert relative_error(wanted[:1], by_hand) < 1e-5
    assert relative_error(ops.decode_attention(q, prefix_k, prefix_v, k, v, bias), wanted) < 1e-5

"""SwiGLU and the norm behind it on Triton's path: results, gradients, and what backward keeps."""

from functools import partial

import pytest
import torch

from fastprior.kernels import ops, reference
from fastprior.kernels.gpu import gated
from helpers.kernel_checks import DEVICE, DTYPES, check_gradients, random
from helpers.tracing import kept_for_backward

SHAPES = [(1, 2), (3, 200), (2, 5, 64), (2, 2 * 4096), (3, 2 * 4100)]  # the last is beyond the kernels' rows


def make_inputs(shape, dtype, with_norm=True):
    gain = (random(shape[-1] // 2, seed=1) + 1).detach().requires_grad_() if with_norm else None
    return dict(x=random(*shape, dtype=dtype, grad=True), gain=gain)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_norm", [True, False], ids=["norm", "no norm"])
def test_results_and_gradients(shape, dtype, with_norm):
    if shape[-1] == 2 and with_norm:
        pytest.skip("a normalised row of one element is zero")
    inputs = make_inputs(shape, dtype, with_norm)
    check_gradients(partial(gated.swiglu_norm, eps=1e-3), partial(reference.swiglu_norm, eps=1e-3), inputs)


@pytest.mark.parametrize("wanted", ["x", "gain"])
@pytest.mark.parametrize("shape", SHAPES[2::2], ids=str)
def test_a_gradient_alone(wanted, shape):
    inputs = make_inputs(shape, torch.float32)
    inputs = {name: t if name == wanted else t.detach() for name, t in inputs.items()}
    check_gradients(partial(gated.swiglu_norm, eps=1e-5), partial(reference.swiglu_norm, eps=1e-5), inputs)


def test_a_slice_of_wider_rows():
    x = random(6, 300, grad=True)
    run, plain = (
        lambda x, gain, run=run: run(x[1::2, 20:220], gain, 1e-5) for run in (gated.swiglu_norm, reference.swiglu_norm)
    )
    check_gradients(run, plain, dict(x=x, gain=random(100, seed=1, grad=True)))


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_backward_keeps_the_input_alone(shape):
    x, gain = make_inputs(shape, torch.float32).values()
    with kept_for_backward() as kept:
        gated.swiglu_norm(x, gain, 1e-5)
    assert sum(s.nbytes() for s in kept) <= x.nbytes + gain.nbytes + 2 * x.nbytes // shape[-1]
    with kept_for_backward() as kept:
        reference.swiglu_norm(x, gain, 1e-5)
    assert sum(s.nbytes() for s in kept) >= 2 * x.nbytes


def test_neither_input_nor_gradient_is_changed():
    x, gain = (t.detach().requires_grad_() for t in make_inputs((4, 60), torch.float32).values())
    cotangent = random(4, 30, seed=3)
    given = [t.detach().clone() for t in (x, gain, cotangent)]
    torch.autograd.grad(gated.swiglu_norm(x, gain, 1e-5), (x, gain), cotangent)
    assert all(torch.equal(a, b) for a, b in zip((x, gain, cotangent), given))


@pytest.mark.slow
def test_compiled_it_is_the_reference():
    x, gain = make_inputs((4, 60), torch.float32).values()
    with ops.using("triton"):
        out = torch.compile(ops.swiglu_norm, backend="aot_eager", fullgraph=True)(x, gain)
    assert torch.equal(out, reference.swiglu_norm(x, gain, 1e-5))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(gain=torch.ones(5)), "gain has shape (5,); it must be (30,)"),
        (dict(x=torch.ones(4, 60, dtype=torch.int64)), "x has dtype torch.int64; it must be one of float32"),
        (dict(x=torch.ones(0, 60)), "x has shape (0, 60); no dimension may be zero"),
    ],
)
def test_messages(change, message):
    given = dict(x=torch.ones(4, 60), gain=torch.ones(30)) | change
    with pytest.raises((ValueError, TypeError)) as raised:
        gated.swiglu_norm(**{name: t.to(DEVICE) for name, t in given.items()}, eps=1e-5)
    assert message in str(raised.value)

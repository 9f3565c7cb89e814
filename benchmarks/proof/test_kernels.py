"""Each kernel against its reference on the device: results, gradients, other strides, and the same bits again."""

import kernel_cache
import pytest
import torch
from kernel_cases import FAMILIES, Case

from fastprior.kernels import ops
from helpers.kernel_checks import check_gradients, guarded, random, sliced

REPEATS = 3


def families(name: str):
    return pytest.mark.parametrize("case", FAMILIES[name](), ids=lambda case: case.name)


def outputs(case: Case, given: dict) -> list[torch.Tensor]:
    """Results, then gradients for a random cotangent."""
    found = case.run(**given)
    found = list(found) if isinstance(found, tuple) else [found]
    leaves = [t for t in given.values() if t is not None and t.requires_grad]
    if not leaves:
        return found
    return [*found, *torch.autograd.grad(found, leaves, [random(*o.shape, dtype=o.dtype) for o in found])]


def check(case: Case) -> None:
    given = case.make()
    if kernel_cache.filling():
        outputs(case, given)
        return
    with ops.using("reference"), guarded():  # what a reference calls is one too
        check_gradients(case.run, case.reference, given)
    first = outputs(case, given)
    for _ in range(REPEATS):
        assert all(map(torch.equal, first, outputs(case, given))), "other bits than before"
    names = [name for name in case.strided if given.get(name) is not None]
    views = {name: sliced(given[name]).detach().requires_grad_(given[name].requires_grad) for name in names}
    assert all(map(torch.equal, first, outputs(case, given | views))), f"other strides of {names} give other bits"


@families("norm")
def test_norm(case):
    check(case)


@families("step")
def test_step(case):
    check(case)


@families("linear")
def test_linear(case):
    check(case)


@families("decode")
def test_decode(case):
    check(case)


@families("attention_forward")
def test_attention_forward(case):
    check(case)


@families("attention_backward")
def test_attention_backward(case):
    check(case)


@families("barrier")
def test_barrier(case):
    check(case)

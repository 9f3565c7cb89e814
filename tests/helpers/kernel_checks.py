"""How kernels are checked: one rule of tolerance, poisoned and guarded results, and awkward inputs."""

import contextlib

import torch
from torch import Tensor

from fastprior.kernels.gpu import launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the interpreter computes bf16 dot products wrongly, so bf16 is for devices alone
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
GUARD = 64  # elements before and after every result
CANARY = -12345.0


def error(got: Tensor, exact: Tensor) -> float:
    """Root mean square of the difference over that of `exact`; infinite for NaN or a wrong shape."""
    if got.shape != exact.shape:
        return float("inf")
    exact = exact.double()
    scale = exact.square().mean().sqrt()
    found = (got.double() - exact).square().mean().sqrt() / scale.clamp(min=1e-30)
    return found.item() if found.isfinite() else float("inf")


def check(got: Tensor, exact: Tensor, plain: Tensor, *, factor: float = 2.0, name: str = "result") -> None:
    """The one rule: the error against `exact` is at most `factor` times that of plain PyTorch, plus a small floor.

    Args:
        got: what the kernel gave, in its own dtype.
        exact: the reference in fp64 (of the same, already rounded, inputs).
        plain: the reference in the kernel's dtype.
        factor: 2 for results, 3 for gradients.

    The floor is 4 units in the last place of the dtype for 16 bits and 32 for fp32, where the order of a long sum
    alone moves more than one place.
    """
    assert got.dtype == plain.dtype, f"{name} has dtype {got.dtype}, plain PyTorch gives {plain.dtype}"
    floor = torch.finfo(got.dtype).eps * (32 if got.dtype == torch.float32 else 4)
    ours, theirs = error(got, exact), error(plain, exact)
    assert ours <= factor * theirs + floor, f"{name}: error {ours:.2e}; plain PyTorch {theirs:.2e}, floor {floor:.2e}"


def check_gradients(run, reference, inputs: dict[str, Tensor | None], *, seed: int = 0) -> None:
    """Forward and every gradient of `run` against `reference`, with a random cotangent.

    Args:
        run, reference: take the tensors by name and return a tensor or a tuple of them. `reference` is called with the
            inputs, and with the inputs in fp64.
        inputs: those with `requires_grad` are differentiated.
    """
    found = {}
    for kind, function in (("got", run), ("exact", reference), ("plain", reference)):
        given = {
            name: t if t is None else cast(t.detach(), kind).requires_grad_(t.requires_grad)
            for name, t in inputs.items()
        }
        outputs = function(**given)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        draw = torch.Generator().manual_seed(seed)
        cotangents = [torch.randn(o.shape, generator=draw).to(o.device, o.dtype) for o in outputs]
        wanted = {name: t for name, t in given.items() if t is not None and t.requires_grad}
        grads = torch.autograd.grad(outputs, list(wanted.values()), cotangents) if wanted else ()
        found[kind] = {f"output {i}": o.detach() for i, o in enumerate(outputs)} | dict(zip(wanted, grads))
    for name, got in found["got"].items():
        factor = 2.0 if name.startswith("output") else 3.0
        check(got, found["exact"][name], found["plain"][name], factor=factor, name=name)


def cast(t: Tensor, kind: str) -> Tensor:
    return t.double() if kind == "exact" and t.is_floating_point() else t.clone()


@contextlib.contextmanager
def guarded():
    """Results are poisoned with NaN and lie between guard bands, which must be untouched at the end."""
    made = []
    plain_empty = launch.empty

    def empty(shape, like, dtype=None):
        dtype = dtype or like.dtype
        size = 1
        for extent in shape:
            size *= extent
        whole = torch.full((size + 2 * GUARD,), 77 if not dtype.is_floating_point else float("nan"), dtype=dtype)
        whole = whole.to(like.device)
        whole[:GUARD] = whole[-GUARD:] = CANARY if dtype.is_floating_point else 99
        made.append(whole)
        return whole[GUARD : GUARD + size].view(shape)

    launch.empty = empty
    try:
        yield
    finally:
        launch.empty = plain_empty
    for whole in made:
        bands = torch.cat((whole[:GUARD], whole[-GUARD:]))
        assert (bands == bands[0]).all() and not bands.isnan().any(), "a kernel wrote outside of its result"


def random(*shape: int, dtype=torch.float32, seed: int = 0, grad: bool = False, scale: float = 1.0) -> Tensor:
    draw = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=draw) * scale).to(DEVICE, dtype).requires_grad_(grad)


def sliced(t: Tensor) -> Tensor:
    """The same values with other strides: every other row of a wider, longer tensor."""
    big = torch.full((2 * t.shape[0], *t.shape[1:-1], t.shape[-1] + 3), float("nan"), device=t.device, dtype=t.dtype)
    view = big[::2, ..., : t.shape[-1]]
    view.copy_(t.detach())
    return view.requires_grad_(t.requires_grad)

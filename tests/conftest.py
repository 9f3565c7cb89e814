"""Shared fixtures: tiny priors, the same prior in the peer, and the comparison every parity test uses."""

import os

import pytest
import torch

# without a GPU the kernels run in Triton's interpreter; triton reads this when it is first imported
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import fastprior
from fastprior.layers import l2norm

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other

NETWORK = dict(dim=32, depth=2, dim_head=16, heads=4, max_text_len=7)


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference over the largest magnitude of `theirs`; infinite where anything is not finite or zero."""
    if ours.shape != theirs.shape:
        return float("inf")
    error = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()
    return error.item() if error.isfinite() else float("inf")


def make_prior(net: dict | None = None, *, seed: int = 0, module=fastprior, **prior) -> torch.nn.Module:
    """A tiny prior of `module` (fastprior, or the peer), in eval mode, with weights that depend on the seed alone."""
    net = NETWORK | (net or {})
    prior = dict(image_embed_dim=net["dim"], timesteps=20, cond_drop_prob=0.2) | prior
    torch.manual_seed(seed)
    return module.DiffusionPrior(module.DiffusionPriorNetwork(**net), **prior).eval()


def make_text(prompts: int, dim: int, length: int = 5, seed: int = 0) -> dict:
    """Normalised text embeddings, and encodings with full, padded and empty captions among them."""
    draw = torch.Generator().manual_seed(seed)
    encodings = torch.randn(prompts, length, dim, generator=draw)
    for row in range(prompts):
        encodings[row, (length, length // 2, 0)[row % 3] :] = 0
    return dict(text_embed=l2norm(torch.randn(prompts, dim, generator=draw)), text_encodings=encodings)


def sample(prior, text_cond: dict, *, rows: int | None = None, seed: int = 1, **kwargs) -> torch.Tensor:
    torch.manual_seed(seed)
    if isinstance(prior, fastprior.DiffusionPrior):
        kwargs.setdefault("progress", False)
    rows = rows or len(text_cond["text_embed"])
    return prior.p_sample_loop((rows, prior.image_embed_dim), text_cond=text_cond, **kwargs)


@pytest.fixture(scope="session")
def peer():
    return pytest.importorskip("dalle2_pytorch", reason="the peer is in the test extra")


@pytest.fixture
def lenient(monkeypatch):
    """float8 rounds to 6 %, which random weights do not forgive."""
    monkeypatch.setattr(fastprior.quantise, "MEDIAN", 0.9)
    monkeypatch.setattr(fastprior.quantise, "WORST", 0.9)

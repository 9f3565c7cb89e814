"""Fixtures and hooks of all tests; what they import is in `helpers`."""

import os

import pytest
import torch

# without a GPU the kernels run in Triton's interpreter; triton reads this when it is first imported
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import fastprior

pytest.register_assert_rewrite("helpers")

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other


@pytest.fixture(scope="session")
def peer():
    return pytest.importorskip("dalle2_pytorch", reason="the peer is in the test extra")


@pytest.fixture
def lenient(monkeypatch):
    """float8 rounds to 6 %, which random weights do not forgive."""
    monkeypatch.setattr(fastprior.quantise, "MEDIAN", 0.9)
    monkeypatch.setattr(fastprior.quantise, "WORST", 0.9)

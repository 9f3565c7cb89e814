"""The benchmark of the blocks in a network of others: its goals, its network, and that it counts only what is right."""

import sys

import pytest
import torch

from helpers import ROOT

sys.path.append(str(ROOT / "benchmarks"))
pytest.importorskip("dalle2_pytorch", reason="the peer is in the test extra")
import blocks
import priors
import test_blocks as benchmark

CPU = torch.device("cpu")


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(priors, "quick", True)
    for cached in benchmark.shape_on, benchmark.built:
        cached.cache_clear()
    yield
    for cached in benchmark.shape_on, benchmark.built:
        cached.cache_clear()


def test_the_shape_is_that_of_brain_decoding():
    shape = benchmark.shape_on(torch.device("cuda"))
    assert shape == dict(
        dim=1664, depth=6, dim_head=52, heads=32, tokens=256
    )  # 513 tokens with the text's and the time
    assert benchmark.shape_on(CPU) == shape | dict(depth=1)


def test_goals(monkeypatch):
    cuda = torch.device("cuda")
    assert benchmark.goal_of(cuda, "bfloat16") == ("peer compiled", 2.0) and benchmark.MEMORY_GOAL == 2.0
    assert benchmark.goal_of(cuda, "float32") == ("peer compiled", None)
    assert benchmark.goal_of(CPU, "float32") == ("peer eager", 1.0)
    for has, goal in ((True, 2.0), (False, None)):
        monkeypatch.setattr(benchmark, "has_bf16_tiles", lambda has=has: has)
        assert benchmark.goal_of(CPU, "bfloat16") == ("fastprior, fp32", goal)


@pytest.mark.parametrize("flags, has", [("fma avx512_bf16 amx_bf16\n", True), ("avx512_bf16 amx_bf16x", False)])
def test_tiles_are_read_from_the_flags(tmp_path, flags, has):
    cpuinfo = tmp_path / "cpuinfo"
    assert not blocks.has_bf16_tiles(cpuinfo)
    cpuinfo.write_text(f"model name\t: one\nflags\t\t: fpu {flags}")
    assert blocks.has_bf16_tiles(cpuinfo) == has


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_what_is_right_is_timed(quick, dtype):
    nets, batch = benchmark.built(CPU)
    wanted = benchmark.check(CPU, dtype)
    assert torch.equal(wanted, blocks.runner(nets["peer"], batch, "float32", backward=False)())
    runs = benchmark.runs_of(CPU, dtype, backward=True)
    assert {"fastprior", "peer eager", "fastprior compiled", "peer compiled"} <= set(runs)
    assert ("fastprior, fp32" in runs) == (dtype == "bfloat16")
    runs["fastprior"]()
    assert all(p.grad is None for p in nets["ours"].parameters())
    with torch.no_grad():
        nets["ours"].layers[0][0].to_q.weight.neg_()
    with pytest.raises(AssertionError):
        benchmark.check(CPU, dtype)


def test_wrong_gradients_are_not_timed(quick, monkeypatch):
    """Of a network whose results are right."""
    given = blocks.gradients
    monkeypatch.setattr(benchmark, "gradients", lambda net, *rest: given(net, *rest) * (-1 if "fast" in net.of else 1))
    nets, _ = benchmark.built(CPU)
    for name, net in nets.items():
        net.of = {"ours": "fastprior"}.get(name, name)
    with pytest.raises(AssertionError):
        benchmark.check(CPU, "float32")

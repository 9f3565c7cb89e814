"""What makes tables and pictures of records, and the tools beside benchmarks: the sweep, and the profile of a step."""

import json
import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch

from helpers import ROOT

BENCHMARKS = ROOT / "benchmarks"
sys.path.append(str(BENCHMARKS))
pytest.importorskip("dalle2_pytorch", reason="the peer is in the test extra")
pytest.importorskip("matplotlib", reason="is in the test extra")
pytest.importorskip("triton")
import priors  # noqa: E402
import profile_step  # noqa: E402
import report  # noqa: E402
import roofline  # noqa: E402
import sweep  # noqa: E402

from fastprior.kernels.gpu import attend_project, attention, launch, norm, skinny_linear  # noqa: E402

interpreted = pytest.mark.skipif(not launch.interpreted(), reason="needs the interpreter")


def figure(op: str, provider: str, p50: float, unit: str = "s", **details) -> dict:
    """A record as benchmarks write them on an H200."""
    versions = {
        "torch": "2.15.0",
        "triton": "3.9.0",
        "dalle2-pytorch": "1.15.6",
        "diffusers": "0.42.1",
        "python": "3.11",
    }
    made = dict(device="NVIDIA H200", versions=versions, commit="abc", date="2026-12-24")
    return dict(op=op, provider=provider, unit=unit, p20=p50, p50=p50, p80=p50, runs=3, **details) | made


@pytest.mark.slow
def test_nothing_quick_is_kept_as_a_record():
    command = [sys.executable, "-m", "pytest", "--quick", "--record", "benchmarks/records/x.jsonl"]
    command.append("benchmarks/test_environment.py")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR and "--record benchmarks/records/x.jsonl" in done.stderr


@pytest.mark.parametrize(
    "figures, missed",
    [
        (dict(ratio=3.0, goals=dict(ratio=3)), []),
        (dict(ratio=2.9, goals=dict(ratio=3)), ["ratio 2.9, goal 3"]),
        (dict(goals=dict(p50=0.5)), []),
        (dict(goals=dict(p50=0.4), share=0.3), ["p50 0.5 s, goal 0.4 s; 30% of the floor"]),
        (dict(ratio_to_one=1.2, goals=dict(ratio_to_one=1.3)), []),
        (dict(ratio_to_one=1.4, goals=dict(ratio_to_one=1.3)), ["ratio to one 1.4, goal 1.3"]),
        (dict(goals=None), []),
        (dict(), []),
    ],
)
def test_missed_goals(figures, missed):
    found = report.missed(figure("sample", "ours", 0.5, batch=1, **figures))
    assert found == [f"sample, ours (batch=1): {line}" for line in missed]


RUNS = {
    "D2-small": (64, 1.0, 5.9e-3, 6.2e-3),
    "D2-large": (64, 1.0, 14.1e-3, 13e-3),
    "PT-1B": (25, 4.0, 15e-3, 15.5e-3),
}
SHARES = {"D2-small": (0.52, 0.5), "D2-large": (0.55, 0.6), "PT-1B": (0.81, 0.8)}
RATIOS = {
    ("D2-small", 1.0): (3, 5, 15), ("D2-small", 3.0): (6, 10, 30), ("D2-large", 1.0): (4, 10, 40),
    ("D2-large", 3.0): (8, 20, 80), ("PT-1B", 1.0): (1.4, 3, 12), ("PT-1B", 4.0): (1.4, 6, 18),
}  # fmt: skip


def test_goals_are_those_of_the_table():
    own = {model: (goals["seconds"], goals["share"]) for model, goals in priors.GOALS.items()}
    assert own == {model: (RUNS[model][3], SHARES[model][1]) for model in RUNS}
    for (model, scale), goals in RATIOS.items():
        assert tuple(priors.GOALS[model]["ratios"][scale][batch] for batch in (1, 8, 64)) == goals


@pytest.mark.parametrize("pipeline", ["PriorPipeline", "PriorPipeline, compiled"])
def test_the_tables_of_a_gpu(tmp_path, monkeypatch, pipeline):
    records = [figure("copy bandwidth", "torch", 4300.0, "GB/s", driver="570.1")]
    for model, (steps, scale, seconds, goal) in RUNS.items():
        ours = pipeline if model == "PT-1B" else "sampler-bfloat16"
        run = dict(model=model, steps=steps, dtype="bfloat16")
        records.append(figure("sample", ours, seconds, **run, batch=1, cond_scale=scale, goals=dict(p50=goal)))
        if model != "PT-1B":
            records.append(figure("sample", ours, 0.02, **run, batch=8, cond_scale=1.0, ratio=77.0))
        share, goal = SHARES[model]
        step = dict(model=model, batch=1, dtype="bfloat16", share=share, bytes=10**8)
        records.append(figure("step", "sampler-bfloat16", 0.1, "ms", **step, goals=dict(share=goal)))
        records.append(figure("step", "reference compiled", 0.2, "ms", **step | dict(share=0.2), goals=None))
        for (own, scale), goals in RATIOS.items():
            for batch, goal in zip((1, 8, 64), goals):
                if own == model:
                    ratio = goal * (0.9 if (model, batch) == ("D2-large", 64) else 1.1)
                    case = run | dict(batch=batch, cond_scale=scale)
                    records.append(
                        figure("ratio to compiled peer", ours, ratio, "x", **case, ratio=ratio, goals=dict(ratio=goal))
                    )
                    records.append(figure("ratio to compiled peer", "reference compiled", 2.5, "x", **case, ratio=2.5))
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "nvidia-h200.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    monkeypatch.setattr(report, "HERE", tmp_path)
    lines = report.table().splitlines()
    assert lines[0] == (
        "NVIDIA H200, driver 570.1; torch 2.15.0, triton 3.9.0, dalle2-pytorch 1.15.6, diffusers 0.42.1, python 3.11; "
        "2026-12-24."
    )
    assert "| D2-small, 64 steps | **5.9 ms** | 6.2 ms | **52%** | 50% |" in lines
    assert "| D2-large, 64 steps | 14.1 ms | 13 ms | 55% | 60% |" in lines  # both missed
    assert "| PT-1B, 25 steps, guidance 4 | **15 ms** | 15.5 ms | **81%** | 80% |" in lines
    assert (
        "| D2-small, dalle2-pytorch | none | **3.3x** (3x; 2.5x) | **5.5x** (5x; 2.5x) | **16.5x** (15x; 2.5x) |"
        in lines
    )
    assert "| D2-large, dalle2-pytorch | 3 | **8.8x** (8x; 2.5x) | **22x** (20x; 2.5x) | 72x (80x; 2.5x) |" in lines
    assert "| PT-1B, diffusers | 4 | **1.54x** (1.4x; 2.5x) | **6.6x** (6x; 2.5x) | **19.8x** (18x; 2.5x) |" in lines
    assert "| `PriorSampler`, bf16 | none | **77x** (20 ms) |" in lines
    summary = report.summary(tmp_path / "records" / "nvidia-h200.jsonl").split("== goals that were missed\n")[1]
    assert len(summary.splitlines()) == 4 and all("D2-large" in line for line in summary.splitlines())


@pytest.mark.slow
def test_roofline(tmp_path):
    records = [
        figure("copy bandwidth", "torch", 4000.0, "GB/s"),
        figure("read bandwidth", "torch", 3000.0, "GB/s"),
        figure("bf16 peak", "torch.matmul", 800.0, "TFLOP/s"),
        figure("linear", "kernel", 10.0, "us", bytes=2 * 10**7, flops=4 * 10**7, rows=1),  # 5 us at 4 TB/s
        figure("step", "sampler", 0.1, "ms", bytes=2 * 10**8, flops=None, dtype="bfloat16"),  # 50 us
        figure("product", "cuBLAS", 1e-3, flops=4 * 10**11),  # 0.5 ms at the peak
        figure("sample", "ours", 0.1, ratio=3.0),
        figure("peak memory", "ours", 100.0, "MiB", bytes=5),
    ]
    points = roofline.points_of(records, *roofline.roofs_of(records))
    assert [(p["provider"], p["intensity"]) for p in points] == [("kernel", 2.0), ("sampler", None), ("cuBLAS", None)]
    assert [p["share"] for p in points] == pytest.approx([0.5] * 3)
    assert points[0]["flops"] == pytest.approx(4e12)
    path, out = tmp_path / "records.jsonl", tmp_path / "out.png"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    command = [sys.executable, str(BENCHMARKS / "roofline.py"), str(path), str(out)]
    subprocess.run(command, check=True)
    assert out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size > 10_000
    path.write_text(json.dumps(records[3]) + "\n")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "must hold those of benchmarks/test_environment.py" in done.stderr


def test_roofline_of_the_records_of_the_cpu(tmp_path):
    roofline.draw(report.latest(report.read(BENCHMARKS / "records" / "cpu-2-cores.jsonl")), tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def tiny(monkeypatch):
    """Models as `--quick` has them, for one test."""
    monkeypatch.setattr(priors, "quick", False)
    for sizes in (*priors.D2.values(), priors.PT_1B):
        for name, value in list(sizes.items()):
            monkeypatch.setitem(sizes, name, value)
    priors.shrink()


def case_of(kernel: str) -> sweep.Case:
    found = sweep.cases("D2-small", 1, torch.float16, torch.device("cpu"))
    return next(case for case in found if case.kernel == kernel)


@interpreted
def test_sweep_rejects_what_is_wrong(tiny):
    case = case_of("norm forward")
    plain = norm.layer_norm_config

    def grid(config):
        return [replace(config, block=32), replace(config, block=48), replace(config, num_warps=2)]

    found = sweep.sweep(replace(case, grid=grid), torch.device("cpu"))
    assert found["tried"] == 2 and len(found["wrong"]) == 1 and "block=32" in found["wrong"][0]
    assert len(found["refused"]) == 1 and "block=48" in found["refused"][0]  # no power of two
    assert norm.layer_norm_config is plain
    wrong = replace(norm.layer_norm_config(64), block=32)
    with sweep.configured(case, wrong), pytest.raises(RuntimeError, match="is wrong, or does not run"):
        sweep.sweep(case, torch.device("cpu"))


@interpreted
def test_sweep_does_not_take_what_was_there_before(tiny, monkeypatch):
    """All results lie in the same memory, and with 16 warps nothing is written."""
    memory, plain = {}, launch.launch

    def empty(shape, like, dtype=None):
        return memory.setdefault((shape, dtype), torch.empty(shape, dtype=dtype or like.dtype))

    def launched(*args, num_warps, **kwargs):
        if num_warps != 16:
            plain(*args, num_warps=num_warps, **kwargs)

    monkeypatch.setattr(launch, "empty", empty)
    monkeypatch.setattr(launch, "launch", launched)
    case = replace(case_of("norm forward"), grid=lambda config: [replace(config, num_warps=16)])
    found = sweep.sweep(case, torch.device("cpu"))
    assert found["tried"] == 1 and len(found["wrong"]) == 1 and launch.empty is empty


def test_sweep_compares():
    draw = torch.Generator().manual_seed(0)
    exact = torch.randn(64, 64, generator=draw, dtype=torch.float64)
    plain = exact.half()
    assert sweep.is_right(plain, exact, plain, 2.0)
    late = plain.clone()
    late[3] = 0
    for wrong in (-plain, torch.zeros_like(plain), torch.full_like(plain, math.nan), plain.roll(1, 0), late):
        assert not sweep.is_right(wrong, exact, plain, 2.0)


@interpreted
def test_sweep_configures_one_kernel_of_attention(tiny):
    case = case_of("attention dq")
    asked = ("dq", "fwd")
    before = [attention.attention_config(kernel, 32, 2, True) for kernel in asked]
    other = replace(before[0], block_m=before[0].block_m * 2)
    with sweep.configured(case, other) as chosen:
        assert [attention.attention_config(kernel, 32, 2, True) for kernel in asked] == [other, before[1]]
    assert chosen == before[:1]


def test_sweep_has_every_kernel_of_every_model():
    d2 = ["norm forward", "norm backward", *["linear"] * 4, "decode"]
    d2 += [f"attention {kernel}" for kernel in ("fwd", "dq", "dkv", "dbias")] + ["step"]
    pt = [name for name in d2 if name != "attention dbias"]
    pt.remove("linear")  # q, k and v are apart, and alike
    device = torch.device("cpu")
    for model in priors.GOALS:
        for batch in sweep.BATCHES:
            kernels = [case.kernel for case in sweep.cases(model, batch, torch.bfloat16, device)]
            wanted = pt if model == "PT-1B" else d2
            assert kernels == (wanted if batch * 3 <= 64 else [name for name in wanted if name != "linear"])


@interpreted
def test_sweep_records(tiny, tmp_path):
    path = tmp_path / "records.jsonl"
    sweep.main(["--device", "cpu", "--record", str(path), "--only", "step"])
    records = report.read(path)
    assert [(r["op"], r["model"], r["provider"]) for r in records] == [
        ("sweep of step", model, provider) for model in ("D2-small", "PT-1B") for provider in ("chosen", "best")
    ]
    for chosen, best in zip(records[::2], records[1::2]):
        assert set(chosen["config"]) == set(best["config"]) == {"block", "num_warps"}
        assert chosen["quick"] and best["quick"] and best["gain"] > 0
        assert best["tried"] == 2 and best["wrong"] == best["refused"] == []
    assert len(report.latest(records * 2)) == len(records)
    report.summary(path)


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("model", ["D2-small", "PT-1B"])
def test_profile(tiny, monkeypatch, model):
    monkeypatch.setattr(profile_step, "CALLS", 1)
    monkeypatch.setattr(priors, "STEPS_AT_ONCE", 2)
    for kernels in (skinny_linear, attend_project):
        monkeypatch.setattr(kernels, "MULTIPROCESSORS", 3)  # programs are what the interpreter takes time for
    lines = profile_step.table(model, torch.device("cpu")).splitlines()
    assert lines[0].startswith(f"{model}, batch 1, torch.float16: a step of ")
    operations = lines[3 : lines.index("", 3)]
    counts = Counter()
    for line in operations:
        counts[line.split()[0]] += float(line.split("]")[-1].split()[0])
    # all of a step: 2 layers between the entry of PT-1B, the head and the solver
    linears, attention = (7, "_attend_project") if model == "D2-small" else (10, "_decode_attention")
    assert counts == {"_skinny_linear_fwd_kernel": linears, f"{attention}_fwd_kernel": 2, "_advance_fwd_kernel": 1}
    times = [float(line.split("]")[-1].split()[1]) * float(line.split("]")[-1].split()[0]) for line in operations]
    assert all(time > 0 for time in times) and times == sorted(times, reverse=True)

"""What runs on the day that a GPU is at hand, tried without one: the driver, what is prepared, tables and figures."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
PROOF = BENCHMARKS / "proof"
PATHS = str(ROOT), str(ROOT / "tests"), str(BENCHMARKS), str(PROOF)
sys.path += [str(BENCHMARKS), str(PROOF)]
pytest.importorskip("dalle2_pytorch", reason="the peer is in the test extra")
pytest.importorskip("matplotlib", reason="is in the test extra")
pytest.importorskip("triton")
import priors  # noqa: E402
import profile_step  # noqa: E402
import report  # noqa: E402
import roofline  # noqa: E402
import run  # noqa: E402
import stages  # noqa: E402
import sweep  # noqa: E402

from fastprior.kernels import attention, launch, norm  # noqa: E402

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


def item(name: str, program: str = "", seconds: float = 30, **options) -> stages.Item:
    return stages.Item(name, (sys.executable, "-u", "-c", program), seconds, 1, **options)


@pytest.fixture
def runner(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "GRACE", 1)
    monkeypatch.setattr(stages, "WORKERS", 4)
    # what a shell began in the background ignores it, and so would items; the proof itself handles it
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield run.Runner(tmp_path, 1.0, dict(os.environ))
    signal.signal(signal.SIGINT, before)


def stage(*groups: tuple[stages.Item, ...], seconds: float = 60) -> stages.Stage:
    return stages.Stage("a test", seconds, groups)


def archived(path: Path) -> dict[str, str]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read().decode() for member in tar}


ENDS = [
    (item("good", "print(3)"), "passed", ""),
    (item("bad", "print('E   of before')\nraise ValueError('no luck')"), "FAILED (1)", "E   of before"),
    (item("raises", "raise ValueError('no luck')"), "FAILED (1)", "ValueError: no luck"),
    (item("aborts", "print('last words')\nimport os\nos.abort()"), "FAILED (-6)", "last words"),
    # with time to begin, also where all cores are busy
    (item("overruns", "import time\ntime.sleep(90)", seconds=6), "FAILED (stopped after 6 s)", "KeyboardInterrupt"),
    (
        item(
            "ignores",
            "import signal, time\nsignal.signal(2, lambda *_: print('not I'))\nwhile True: time.sleep(1)",
            seconds=6,
        ),
        "FAILED (stopped after 6 s)",
        "not I",
    ),
    (item("needs a package", needs=("module:no_such_package",)), "skipped: no_such_package is not installed", ""),
    (item("needs a program", needs=("program:no-such-tool",)), "skipped: no-such-tool is not installed", ""),
    (item("needs a record", needs=("record:speed",)), "skipped: no speed in OUT/records.jsonl", ""),
    (item("needs more", needs=("not:needs a GPU",)), "skipped: needs a GPU", ""),
    (item("says so", "print('skipped: nothing to do')"), "skipped: nothing to do", ""),
    (
        item("skips all", "print('SKIPPED [2] a.py:3: no GPU')\nprint('2 skipped in 0.1s')"),
        "skipped: no GPU",
        "",
    ),
    (item("skips some", "print('SKIPPED [1] a.py:3: no GPU')\nprint('1 passed, 1 skipped in 0.1s')"), "passed", ""),
]


@pytest.mark.slow
def test_no_end_of_an_item_touches_the_others(runner, tmp_path):
    verdicts = runner.stage(1, stage(tuple(one for one, _, _ in ENDS)))
    for (one, text, why), verdict in zip(ENDS, verdicts, strict=True):
        assert verdict.item == one.name and verdict.text == text.replace("OUT", str(tmp_path)), verdict
        assert why in verdict.why and bool(why) == bool(verdict.why), verdict
        assert verdict.failed == text.startswith("FAILED")
    log = (tmp_path / "stage1.log").read_text()
    assert "good| 3\n" in log and "aborts| last words\n" in log
    verdict_table = log.split("== verdicts of stage 1")[1]
    for one, text, _ in ENDS:
        assert any(line.startswith(one.name) and text.split("OUT")[0] in line for line in verdict_table.splitlines())


def test_items_of_a_group_run_at_once_and_groups_in_turn(runner, tmp_path):
    meet = """
import pathlib, sys, time
own, other = (pathlib.Path(sys.argv[0] or ".") / name for name in {names})
own.touch()
while not other.exists(): time.sleep(0.01)
"""
    names = [tmp_path / "one", tmp_path / "two"]
    together = [item(f"of {pair}", meet.format(names=[*map(str, pair)])) for pair in (names, names[::-1])]
    after = item("after", f"import os\nassert os.path.exists({str(names[1])!r})")
    verdicts = runner.stage(1, stage(tuple(together), (after,)))
    assert [verdict.text for verdict in verdicts] == ["passed"] * 3


def test_a_stage_archives_what_its_items_leave(runner, tmp_path):
    leave = "import os, pathlib\npathlib.Path(os.environ['PROOF_WORK'], 'profile.txt').write_text('profile')"
    (tmp_path / "records.jsonl").write_text('{"op": "speed"}\n')
    runner.stage(2, stage((item("leaves", leave),)))
    found = archived(tmp_path / "stage2.tar.gz")
    assert found["stage2/profile.txt"] == "profile" and '"speed"' in found["stage2/records.jsonl"]
    assert found["stage2/log"] == (tmp_path / "stage2.log").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["records.jsonl", "stage2.log", "stage2.tar.gz"]


def test_no_item_begins_when_the_time_of_the_stage_is_over(runner):
    slow = item("slow", "import time\ntime.sleep(60)")
    verdicts = runner.stage(1, stage((slow,), (item("late"),), seconds=0.6))
    assert [v.text for v in verdicts] == [
        "FAILED (stopped after 1 s)",
        "FAILED (not begun: the time of the stage was over)",
    ]


def test_kernels_that_were_found_are_in_the_table(runner):
    counts = 'print(\'@kernels {"hits": 3, "misses": 1, "seconds": 2.0}\')'
    (verdict,) = runner.stage(1, stage((item("counts", counts),)))
    assert "passed; 3 of 4 kernels in the cache" in run.table([verdict])[0]


DRIVER = """
import sys
sys.path[:0] = [{proof!r}]
import run, stages
def item(name, program): return stages.Item(name, (sys.executable, "-u", "-c", program), 60, 1)
first = item("first", "print('done')")
long = item("long", "import time; print('begun'); time.sleep(60)")
stages.stages = lambda device: {{
    1: stages.Stage("one", 60, ((first,),)), 2: stages.Stage("two", 60, ((long,), (item("never", ""),)))
}}
sys.exit(run.main([]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_what_stops_the_proof_takes_no_result_along(tmp_path, number):
    out, log = tmp_path / "out", tmp_path / "out" / "stage2.log"
    environment = os.environ | dict(OUT=str(out), DEVICE="cpu", PROOF_FOLDER=str(tmp_path / "kept"))
    driver = DRIVER.format(proof=str(PROOF))
    process = subprocess.Popen([sys.executable, "-c", driver], env=environment, stdout=subprocess.PIPE, text=True)
    while process.poll() is None and not (log.exists() and "long| begun" in log.read_text()):
        time.sleep(0.02)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=30)
    assert "done" in archived(out / "stage1.tar.gz")["stage1/log"]
    assert "long| begun" in log.read_text()
    if number == signal.SIGKILL:
        assert not (out / "stage2.tar.gz").exists()
        return
    assert process.returncode == 1
    assert f"FAILED ({number.name})" in printed and f"FAILED (not begun: {number.name})" in printed
    assert "long| begun" in archived(out / "stage2.tar.gz")["stage2/log"]


def script(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [str(BENCHMARKS / "gpu_proof.sh"), *arguments]
    own = os.environ | dict(PYTHON=sys.executable) | environment
    return subprocess.run(command, env=own, capture_output=True, text=True)


def test_the_plan_keeps_the_times_of_the_stages():
    for number, one in stages.stages("cuda").items():
        planned = sum(max(item.planned for item in group) for group in one.groups)
        assert planned < one.seconds <= {1: 120, 2: 240, 3: 280}[number]
        assert all(item.planned < item.seconds for group in one.groups for item in group)
    done = script("--plan")
    assert done.returncode == 0 and "stage 3" in done.stdout and "kernels attention_backward" in done.stdout


def test_the_cpu_runs_the_items_of_a_gpu():
    names = [
        {item.name for one in stages.stages(device).values() for group in one.groups for item in group}
        for device in ("cuda", "cpu")
    ]
    assert names[1] <= names[0] and {name for name in names[0] - names[1]} == {
        f"compiled peer, {model}, batch {batch}" for model in stages.MODELS for batch in (1, 8)
    }


def test_a_stage_that_there_is_not():
    done = script("1", "4", DEVICE="cpu")
    assert done.returncode == 2 and "unknown stage: 4; there are 1, 2, 3" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_nothing_passes_for_a_proof():
    done = script("1", DEVICE="cuda")
    assert done.returncode == 2 and "PyTorch sees no GPU; DEVICE=cpu tries all without one" in done.stderr
    done = compiling("-c", "import sys; sys.path[:0] = sys.argv[1:]; import places", *PATHS, PROOF_DEVICE="cuda")
    assert "the GPU is gone" in done.stderr


@pytest.mark.slow
@interpreted
def test_items_run_for_real(runner, tmp_path, monkeypatch):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # where it is set, pytest-benchmark measures nothing
    runner.environment = dict(os.environ, TRITON_INTERPRET="1")
    first = stages.stages("cpu")[1]
    chosen = {"versions", "bandwidth", "kernels norm", "path sampler_int8", "racecheck of a split linear"}
    groups = [tuple(item for item in group if item.name in chosen) for group in first.groups]
    verdicts = {verdict.item: verdict for verdict in runner.stage(1, stage(*groups, seconds=600))}
    texts = {name: verdict.text for name, verdict in verdicts.items()}
    assert texts == {
        "versions": "passed",
        "bandwidth": "passed",
        "kernels norm": "passed",
        "path sampler_int8": "skipped: the interpreter computes bf16 wrongly",
        "racecheck of a split linear": "skipped: needs a GPU",
    }, (tmp_path / "stage1.log").read_text()
    records = report.read(tmp_path / "records.jsonl")
    assert {r["op"] for r in records} == {"copy bandwidth", "read bandwidth", "bf16 peak"}
    assert all(r["quick"] and r["p50"] > 0 for r in records)


REACHED = """
import os, sys
sys.path[:0] = sys.argv[1:]
os.environ["PROOF_FILL"] = "90 1"
import torch
import kernel_cases
from fastprior.kernels import launch, resources

def configuration(variant):
    tiles = tuple((name, value) for name, value in variant.constants if name.startswith("BLOCK") or name == "ROWS")
    first = next(kind for _, kind in variant.signature if kind.startswith("*"))
    return variant.kernel.__name__, first, tiles, variant.num_warps, variant.num_stages

with launch.recording() as recorded, torch.no_grad():
    for name, cases in kernel_cases.FAMILIES.items():
        for case in cases():
            with torch.set_grad_enabled(name in ("norm", "attention_backward")):
                given = case.make()
                out = case.run(**given)
                out = out[0] if isinstance(out, tuple) else out
                leaves = [t for t in given.values() if t is not None and t.requires_grad]
                if torch.is_grad_enabled():
                    torch.autograd.grad(out, leaves, torch.zeros_like(out), allow_unused=True)
wanted = {configuration(variant) for variant in resources.variants(90)}
for missing in sorted(wanted - {configuration(variant) for variant in recorded}, key=str):
    print(missing)
"""


def compiling(*command: str, **environment: str) -> subprocess.CompletedProcess:
    """Python, where kernels are compiled: not in the interpreter."""
    own = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PROOF_FILL")}
    command = sys.executable, *command
    return subprocess.run(command, capture_output=True, text=True, env=own | environment)


@pytest.mark.slow
def test_the_cases_of_the_proof_reach_every_configuration():
    done = compiling("-c", REACHED, *PATHS)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == ""


SHALLOW = """
import contextlib, os, sys
sys.path[:0] = sys.argv[1:]
os.environ |= dict(PROOF_FILL="90 1", FASTPRIOR_KERNELS="triton")
import priors
depth = priors.D2_SMALL["depth"]
import places, speed, torch
from fastprior.kernels import launch

found = []
for number, steps in (priors.D2_SMALL["depth"], places.few_steps), (depth, contextlib.nullcontext):
    priors.D2["D2-small"]["depth"] = number
    priors.ours.cache_clear()
    with launch.recording() as recorded, places.as_on_gpu(), steps(), torch.no_grad():
        run = speed.d2_run("D2-small", 8)
        for scale in speed.SCALES["D2-small"]:
            run(scale)
    found.append({(v, v.divisible) for v in recorded})
assert depth == 12 and found[0] == found[1], found[0] ^ found[1]
"""


@pytest.mark.slow
def test_the_shallow_models_and_few_steps_that_are_compiled_launch_the_kernels_of_all():
    done = compiling("-c", SHALLOW, *PATHS)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def other_checkout(tmp_path_factory) -> Path:
    other = tmp_path_factory.mktemp("other") / "checkout"
    for name in ("benchmarks", "fastprior", "kernels", "tests/helpers"):
        shutil.copytree(ROOT / name, other / name, ignore=shutil.ignore_patterns("records", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", other)
    return other


@pytest.mark.slow
def test_kernels_that_were_packed_are_found_by_another_checkout(tmp_path, other_checkout):
    def fill(checkout: Path, cache: Path) -> dict:
        node = "benchmarks/proof/test_kernels.py::test_step[fp32-256-bare]"
        command = ("benchmarks/proof/item.py", "pytest", node)
        own = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")}
        own |= dict(PROOF_FILL="90 1", TRITON_CACHE_DIR=str(cache), PYTHONPATH=str(checkout))
        done = subprocess.run([sys.executable, *command], cwd=checkout, env=own, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        line = next(line for line in done.stdout.splitlines() if line.startswith("@filled "))
        return json.loads(line.removeprefix("@filled "))

    found = fill(ROOT, tmp_path / "made")
    assert [name for name, _ in found["compiled"]] == ["_diffusion_step_fwd_kernel"] and not found["failed"]
    pack = f"""
import sys
from pathlib import Path
sys.path[:0] = [{str(ROOT)!r}, {str(PROOF)!r}]
import kernel_cache
manifest = kernel_cache.pack(Path({str(tmp_path / "made")!r}), Path({str(tmp_path / "triton.tar.xz")!r}))
assert manifest["by_kernel"] == {{"_diffusion_step_fwd_kernel": 1}}, manifest
"""
    done = compiling("-c", pack)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(tmp_path / "made")

    def unpack(checkout: Path) -> subprocess.CompletedProcess:
        paths = checkout / "benchmarks/proof/kernel_cache.py", tmp_path / "kept", tmp_path / "triton.tar.xz"
        return compiling(*map(str, paths), PYTHONPATH=str(checkout))

    done = unpack(other_checkout)
    assert done.returncode == 0 and done.stdout.startswith("prepared: 1 kernels") and "they fit" in done.stdout
    found = fill(other_checkout, tmp_path / "kept")
    assert found["hits"] == found["kernels"] == 1 and found["compiled"] == found["failed"] == []

    source = other_checkout / "kernels" / "step.py"
    source.write_text("# a line more\n" + source.read_text())
    done = unpack(other_checkout)
    assert done.returncode == 1 and "step._diffusion_step_fwd_kernel: here" in done.stdout


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
    monkeypatch.setattr(profile_step, "STEPS", 1)
    lines = profile_step.table(model, torch.device("cpu")).splitlines()
    assert lines[0].startswith(f"{model}, batch 1, torch.float16: a step of ")
    operations = lines[3 : lines.index("", 3)]
    names = {line.split()[0] for line in operations}
    assert names >= {"fastprior::linear", "fastprior::decode_attention", "fastprior::diffusion_step"}
    times = [float(line.split("]")[-1].split()[1]) * float(line.split("]")[-1].split()[0]) for line in operations]
    assert all(time > 0 for time in times) and times == sorted(times, reverse=True)

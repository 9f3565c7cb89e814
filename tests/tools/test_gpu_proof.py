"""What runs on the day that a GPU is at hand, tried without one: the driver, its items, and what is prepared."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from helpers import ROOT

BENCHMARKS = ROOT / "benchmarks"
PROOF = BENCHMARKS / "proof"
PATHS = str(ROOT), str(ROOT / "tests"), str(BENCHMARKS), str(PROOF)
sys.path += [str(BENCHMARKS), str(PROOF)]
pytest.importorskip("dalle2_pytorch", reason="the peer is in the test extra")
pytest.importorskip("matplotlib", reason="is in the test extra")
pytest.importorskip("triton")
import report  # noqa: E402
import run  # noqa: E402
import stages  # noqa: E402

from fastprior.kernels.gpu import launch  # noqa: E402
from helpers.processes import compiling  # noqa: E402

interpreted = pytest.mark.skipif(not launch.interpreted(), reason="needs the interpreter")


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
from fastprior.kernels.gpu import launch
import resources

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
from fastprior.kernels.gpu import launch

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

    source = other_checkout / "kernels" / "gpu" / "step.py"
    source.write_text("# a line more\n" + source.read_text())
    done = unpack(other_checkout)
    assert done.returncode == 1 and "step._diffusion_step_fwd_kernel: here" in done.stdout

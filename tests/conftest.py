"""Fixtures and hooks of all tests; what they import is in `helpers`."""

import os
import threading
from collections import Counter

import pytest
import torch
from tqdm import tqdm

# without a GPU the kernels run in Triton's interpreter; triton reads this when it is first imported
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from fastprior.models import quality

pytest.register_assert_rewrite("helpers")
tqdm.set_lock(threading.RLock())  # its own is shared with forked children, and one that is killed may hold it for ever
torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other

SLOW_SECONDS = 1.0  # of a call; longer ones should have the marker `slow`


def pytest_configure(config):
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False  # pytest-xdist would begin with files of many tests, not of slow ones


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """At most eight: each needs a core and up to 2 GB, and the longest file takes as long as an eighth of all."""
    return min(os.cpu_count() or 1, 8)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file's tests on one worker, where nothing else is asked for: they share what their fixtures make."""
    if config.option.dist == "load":
        from xdist.scheduler import LoadFileScheduling

        return LoadFileScheduling(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Fuzzing is left out unless asked for by its marker.

    On several workers, files with most slow tests come first, so that none is left alone with one at the end.
    """
    if "fuzz" not in config.option.markexpr:
        fuzz = [item for item in items if item.get_closest_marker("fuzz")]
        items[:] = [item for item in items if item not in fuzz]
        config.hook.pytest_deselected(items=fuzz)
    if hasattr(config, "workerinput"):
        slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
        items.sort(key=lambda item: -slow[item.path])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """What needs Triton's interpreter is skipped where that cannot run; the reason says with which numpy it can."""
    try:
        return (yield)
    except Exception as error:
        if type(error).__name__ == "InterpreterFault":  # of a module that needs triton
            pytest.skip(str(error))
        raise


def pytest_terminal_summary(terminalreporter):
    """What did not run and why, and what took long without being marked so; both inform, and fail nothing."""
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", [])
    )
    if reasons:
        terminalreporter.section("skipped here")
        for reason, count in reasons.most_common():
            terminalreporter.line(f"{count:5} {reason}")
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    calls = [report for report in reports if report.when == "call" and "slow" not in report.keywords]
    slow = sorted((report for report in calls if report.duration > SLOW_SECONDS), key=lambda r: -r.duration)
    if slow:
        terminalreporter.section(f"over {SLOW_SECONDS:g} s, and not marked slow")
        for report in slow:
            terminalreporter.line(f"{report.duration:6.1f} s {report.nodeid}")


@pytest.fixture(scope="session")
def peer():
    return pytest.importorskip("dalle2_pytorch", reason="the peer is in the test extra")


@pytest.fixture
def fresh_accelerate():
    """accelerate keeps its precision and accumulation for the whole process."""
    yield
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def lenient(monkeypatch):
    """float8 rounds to 6 %, which random weights do not forgive."""
    monkeypatch.setattr(quality, "MEDIAN", 0.9)
    monkeypatch.setattr(quality, "WORST", 0.9)

"""Calls of C from a seed, against fp64; and the same in processes with sanitizers, which must see what is wrong."""

import os
import platform
import subprocess
import sys

import pytest

from helpers import ROOT
from helpers.c_calls import fuzz
from helpers.cpu_cases import NEEDS_KERNELS, ON_X86

pytestmark = [NEEDS_KERNELS, pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pages of Linux")]
OPTIONS = dict(
    ASAN_OPTIONS="detect_leaks=0:malloc_fill_byte=255:max_malloc_fill_size=1000000000",  # NaN, before it is written
    TSAN_OPTIONS="exitcode=66:halt_on_error=1:ignore_noninstrumented_modules=1:report_signal_unsafe=0",
)


@pytest.mark.slow
def test_calls_from_a_seed():
    """And every kind is among them."""
    found = fuzz(seed=0, calls=200)
    assert {kind.split()[0] for kind in found} >= {"linear", "decode", "blocks", "run", "rows", "sums"}
    assert sum(count for count, _ in found.values()) == 200


@pytest.mark.fuzz
def test_calls_for_a_minute():
    fuzz(seed=int.from_bytes(os.urandom(3), "big"), seconds=60)


def test_a_number_too_many_ends_the_process():
    """Arrays lie at pages that nobody may touch."""
    code = "import ctypes; from helpers.c_calls import Draw\n"
    code += "for seed in range(9):\n    t = Draw(seed).tensor(3, 7)\n    print(t.sum().item())\n"
    code += "    for place in -1, 21: print(ctypes.c_float.from_address(t.data_ptr() + 4 * place).value)"
    environment = os.environ | dict(PYTHONPATH=os.pathsep.join((str(ROOT), str(ROOT / "tests"))))
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode < 0 and done.stdout


def sanitized(sanitizer: str, *options: str) -> subprocess.CompletedProcess:
    name = dict(address="libasan.so", thread="libtsan.so")[sanitizer]
    library = subprocess.run(["cc", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(library):
        pytest.skip(f"the compiler has no {name}")
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    environment = os.environ | OPTIONS | dict(LD_PRELOAD=library, PYTHONPATH=paths, OMP_NUM_THREADS="1")
    # a sanitizer needs its addresses where a system that shuffles them may not leave them
    command = ["setarch", platform.machine(), "-R", sys.executable, "-m", "helpers.sanitized", sanitizer, *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def is_within_bounds(*options: str) -> None:
    done = sanitized("address", *options)
    assert "every access was within bounds" in done.stdout, done.stderr[-3000:]
    assert done.returncode and "ERROR: AddressSanitizer" in done.stderr


def has_no_race(*options: str) -> None:
    # ThreadSanitizer does not see masked stores, which AVX-512 has
    march = ("--march", "haswell") if platform.machine() == "x86_64" else ()
    done = sanitized("thread", *march, *options)
    assert "no two threads met" in done.stdout, done.stderr[-3000:]
    assert done.returncode == 66 and "ThreadSanitizer: data race" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("march", ["native", pytest.param("haswell", marks=ON_X86)])
def test_memory_is_read_and_written_within_bounds(march):
    is_within_bounds("--march", march, "--calls", "100")


@pytest.mark.slow
def test_no_race_between_callers_and_their_threads():
    has_no_race("--calls", "20")


@pytest.mark.fuzz
def test_sanitizers_for_two_minutes():
    seed = str(int.from_bytes(os.urandom(3), "big"))
    is_within_bounds("--seconds", "60", "--seed", seed)
    has_no_race("--seconds", "60", "--seed", seed)

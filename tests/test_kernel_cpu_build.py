"""The CPU kernels as a library: how it is compiled and kept, threads and forks that share it, and its memory."""

import itertools
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from fastprior.kernels import cpu, cpu_blocks, cpu_library, ops, reference
from helpers.cpu_cases import (
    CONFIGS,
    DECODE_OPTIONS,
    FP32,
    HAS_TILES,
    NEEDS_KERNELS,
    ON_X86,
    OPTIONS,
    SHAPES,
    block_arguments,
    built,
    check_decode,
    check_linear,
    make,
    make_blocks,
    make_decode,
    make_tokens,
    make_transformer,
    prior_step,
    random,
    step,
    threads,
    through_reference,
)
from helpers.priors import make_prior, make_text, relative_error

QUICK = *(flag for flag in cpu_library.FLAGS if flag != "-O3"), "-O0"  # to compile

pytestmark = NEEDS_KERNELS


# threads and processes


def test_threads_of_a_program_call_at_once():
    """Each with an input and a number of threads of its own."""
    cases = [make(rows, 97, 300, dtypes, OPTIONS["all-swiglu"]) for rows in (2, 9) for dtypes in ("fp32", "bf16")]
    expected, wrong = [cpu.linear(**inputs) for inputs in cases], []
    given = block_arguments()
    whole = cpu_blocks.run_blocks(**given)

    def work(index):
        torch.set_num_threads(1 + index % 3)
        for _ in range(30):
            for got, wanted in zip(cpu.linear(**cases[index]), expected[index]):
                if not torch.equal(got, wanted):
                    wrong.append(index)
            if not torch.equal(cpu_blocks.run_blocks(**given), whole):
                wrong.append("blocks")

    with threads(1):
        workers = [threading.Thread(target=work, args=(index,)) for index in range(len(cases))]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert not wrong


def child(work) -> int | None:
    """The exit status of a forked process that works; None where it hangs."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(timeout=20)
    if process.exitcode is None:
        process.kill()
        process.join()
        return None
    return process.exitcode


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_forked_child_does_not_wait_for_threads_that_it_does_not_have():
    inputs = make(3, 97, 300)
    with threads(3):
        expected = cpu.linear(**inputs)
        assert child(lambda: sys.exit(not torch.equal(cpu.linear(**inputs), expected))) == 0
        assert torch.equal(cpu.linear(**inputs), expected)


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_two_processes_compile_at_once(tmp_path):
    def work():
        with built(FASTPRIOR_CACHE=tmp_path):
            check_linear(make(3, 23, 77))

    context = multiprocessing.get_context("fork")
    both = [context.Process(target=work) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(timeout=60)
    assert [process.exitcode for process in both] == [0, 0]
    assert len(list(tmp_path.iterdir())) == 1


# compiling


def goes_on(words):
    """PyTorch computes, and `unavailable` has these words."""
    inputs, tokens = make(3, 40, 52), make_tokens()
    assert relative_error(ops.linear(**inputs), reference.linear(**inputs)) < 1e-5
    assert (
        relative_error(step(make_transformer(), *tokens), through_reference(step, make_transformer(), *tokens)) < 1e-5
    )
    assert words in cpu_library.unavailable()
    with pytest.raises(RuntimeError, match="the CPU kernels cannot be compiled"):
        cpu.linear(**inputs)


def refusing(folder, lines):
    script = folder / "compiler"
    script.write_text("#!/bin/sh\n" + lines)
    script.chmod(0o755)
    return script


def test_no_compiler(tmp_path):
    with built(CC="/nonexistent/cc", FASTPRIOR_CACHE=tmp_path):
        goes_on("no C compiler")


def test_a_compiler_that_refuses(tmp_path):
    refuses = refusing(tmp_path, '[ "$1" = --version ] && exit 0\necho no licence >&2; exit 1\n')
    with built(CC=refuses, FASTPRIOR_CACHE=tmp_path / "cache"):
        goes_on("failed: no licence")
    assert not list((tmp_path / "cache").iterdir())
    with built(CC=refusing(tmp_path, "exit 3\n"), FASTPRIOR_CACHE=tmp_path / "cache"):
        goes_on("failed")


def test_a_compiler_with_arguments(tmp_path):
    with built(QUICK, CC="env cc -g0", FASTPRIOR_CACHE=tmp_path):
        assert cpu_library.unavailable() is None


@ON_X86
def test_a_machine_without_vectors(tmp_path):
    flags = tuple(flag.replace("native", "x86-64") for flag in cpu_library.FLAGS)
    with built(flags, FASTPRIOR_CACHE=tmp_path):
        goes_on("neither AVX2 nor NEON")


def test_no_place_to_write_to(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below", "/proc/fastprior"):
        with built(FASTPRIOR_CACHE=place):
            goes_on("no place for what it makes")

    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("FASTPRIOR_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    with built():
        goes_on("home directory")


def test_a_cache_that_was_filled_is_only_read(tmp_path):
    with built(QUICK, FASTPRIOR_CACHE=tmp_path):
        path = cpu_library.build()
        refuses = refusing(tmp_path, '[ "$1" = --version ] && exec cc --version\nexit 1\n')
        with built(QUICK, CC=refuses):
            assert cpu_library.build() == path and cpu_library.unavailable() is None


def test_a_broken_library_is_made_again(tmp_path):
    """As a crash or a full disk leaves it: a loader that maps half of one would die at its first page."""
    with built(QUICK, FASTPRIOR_CACHE=tmp_path):
        path = cpu_library.build()
        whole = path.read_bytes()
        for left in b"", b"no", whole[: len(whole) // 2], whole[:4096] + bytes(len(whole) - 4096):
            path.write_bytes(left)
            assert cpu_library.build() == path and len(path.read_bytes()) == len(whole)
        check_linear(make(3, 23, 77))


# memory


def sanitized():
    """For a process that has the sanitizer: shapes at every border, and at last a weight that is shorter than said."""
    assert cpu_library.unavailable() is None, cpu_library.unavailable()
    options = itertools.cycle(("all-swiglu", "all-gelu"))
    for dtypes, rows, shape in itertools.product(("fp32", "bf16", "int8"), (1, 3, 6, 7, 17, 32, 64, 67), SHAPES[::2]):
        if rows <= cpu.most_rows(FP32):
            check_linear(make(rows, *shape, dtypes, OPTIONS[next(options)]))
    if HAS_TILES:
        check_linear(make(64, 70, 3500, "fp32", OPTIONS["all-swiglu"]))  # a sum in parts
    for kv_heads, options in itertools.product((1, 2, 4), DECODE_OPTIONS.values()):
        check_decode(make_decode(dim_head=7, kv_heads=kv_heads, seq=2, rows=4, **options | {"width": 6}))
    for transformer in make_transformer(**CONFIGS["odd"]), make_transformer(normformer=True):
        for samples, count in (1, 1), (5, 2):
            tokens = make_tokens(samples=samples, dim=transformer.norm.g.shape[0])
            with threads(count):
                step(transformer, *tokens)
    prior, text = make_prior(), make_text(2, 32)
    prior.sample(**text, timesteps=9, num_samples_per_batch=2, progress=False)
    for count in 2, 32:
        with threads(count):
            prior_step(make_blocks(heads=3, dim_head=7), *make_tokens(dim=21), outputs=2)
    print("every access was within bounds", flush=True)
    cpu._fit = lambda *args: None
    cpu.linear(x=random(3, 64), weight=random(5, 7))


SANITIZED = *(flag for flag in QUICK if not flag.startswith("-march")), "-O1", "-g", "-fsanitize=address,undefined"


IN_SANITIZER = """
import sys, test_kernel_cpu_build as tests
flags = *tests.SANITIZED, "-fno-sanitize-recover=all", "-march=" + sys.argv[2]
with tests.built(flags, FASTPRIOR_CACHE=sys.argv[1], LD_PRELOAD=""):  # the compiler does without it
    tests.sanitized()
"""


@pytest.mark.parametrize("march", ["native", pytest.param("haswell", marks=ON_X86)])
def test_memory_is_read_and_written_within_bounds(tmp_path, march):
    """Under gcc's sanitizers, in memory that holds NaN before it is written; at last they show that they see."""
    library = subprocess.run(["cc", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(library):
        pytest.skip("the compiler has no libasan")
    options = "detect_leaks=0:malloc_fill_byte=255:max_malloc_fill_size=1000000000"
    environment = os.environ | dict(LD_PRELOAD=library, ASAN_OPTIONS=options, PYTHONPATH=str(Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-c", IN_SANITIZER, tmp_path, march], env=environment, capture_output=True, text=True
    )
    assert "every access was within bounds" in done.stdout, done.stderr[-3000:]
    assert done.returncode and "ERROR: AddressSanitizer" in done.stderr

"""The CPU kernels as a library: how it is compiled and kept, threads and forks that share it, and its memory."""

import ctypes
import multiprocessing
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch

from fastprior.kernels import ops, reference
from fastprior.kernels.arguments import LinearArgs
from fastprior.kernels.cpu import blocks as cpu_blocks
from fastprior.kernels.cpu import library as cpu_library
from fastprior.kernels.cpu import linear as cpu_linear
from fastprior.kernels.cpu import structs
from helpers.at_once import at_once
from helpers.cpu_cases import (
    NEEDS_KERNELS,
    ON_X86,
    OPTIONS,
    QUICK,
    block_arguments,
    built,
    check_linear,
    child,
    make,
    make_tokens,
    make_transformer,
    step,
    threads,
    through_reference,
)
from helpers.priors import relative_error

pytestmark = NEEDS_KERNELS


# threads and processes


def test_threads_of_a_program_call_at_once():
    """Each with an input and a number of threads of its own."""
    cases = [make(rows, 97, 300, dtypes, OPTIONS["all-swiglu"]) for rows in (2, 9) for dtypes in ("fp32", "bf16")]
    expected, wrong = [cpu_linear.linear(LinearArgs(**inputs)) for inputs in cases], []
    given = block_arguments()
    whole = cpu_blocks.run_blocks(**given)

    def work(index):
        torch.set_num_threads(1 + index % 3)
        for _ in range(30):
            for got, wanted in zip(cpu_linear.linear(LinearArgs(**cases[index])), expected[index]):
                if not torch.equal(got, wanted):
                    wrong.append(index)
            if not torch.equal(cpu_blocks.run_blocks(**given), whole):
                wrong.append("blocks")

    with threads(1):
        at_once(work, range(len(cases)))
    assert not wrong


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_forked_child_does_not_wait_for_threads_that_it_does_not_have():
    inputs = make(3, 97, 300)
    with threads(3):
        expected = cpu_linear.linear(LinearArgs(**inputs))
        assert child(lambda: sys.exit(not torch.equal(cpu_linear.linear(LinearArgs(**inputs)), expected))) == 0
        assert torch.equal(cpu_linear.linear(LinearArgs(**inputs)), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_of_two_processes_one_compiles(tmp_path):
    """The other waits for it."""
    logs = refusing(tmp_path, f'[ "$1" = --version ] || echo called >>{tmp_path}/log\nexec cc "$@"\n')

    def work():
        with built(CC=logs, FASTPRIOR_CACHE=tmp_path / "cache"):
            check_linear(make(3, 23, 77))

    context = multiprocessing.get_context("fork")
    both = [context.Process(target=work) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(timeout=120)
    assert [process.exitcode for process in both] == [0, 0]
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert (tmp_path / "log").read_text() == "called\n"


# compiling


def goes_on(words):
    """PyTorch computes, and `unavailable` has these words."""
    inputs, tokens = make(3, 40, 52), make_tokens()
    with pytest.warns(RuntimeWarning, match="no CPU kernels: .* several times slower .*FASTPRIOR_CACHE") as said:
        assert relative_error(ops.linear(**inputs), reference.linear(LinearArgs(**inputs))) < 1e-5
    assert len(said) == 1
    assert (
        relative_error(step(make_transformer(), *tokens), through_reference(step, make_transformer(), *tokens)) < 1e-5
    )
    assert words in cpu_library.unavailable()
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="the CPU kernels cannot be compiled"):
        warnings.simplefilter("error")  # it was said once
        cpu_linear.linear(LinearArgs(**inputs))


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


def nobody():
    raise RuntimeError("Could not determine home directory.")


def test_no_place_to_write_to(tmp_path, monkeypatch):
    """Neither the folder nor one among temporary files: another user's, one that others may write to, a link."""
    (tmp_path / "file").write_text("")
    (fallback := tmp_path / f"fastprior-{os.geteuid()}").mkdir(mode=0o777)
    fallback.chmod(0o777)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for place in (tmp_path / "file", tmp_path / "file" / "below", "/proc/fastprior"):
        with built(FASTPRIOR_CACHE=place):
            goes_on("is not a folder of this user alone")
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    (tmp_path / "fastprior-4711").mkdir(mode=0o700)
    with built(FASTPRIOR_CACHE="/proc/fastprior"):
        goes_on("is not a folder of this user alone")
    monkeypatch.undo()
    fallback.rmdir()
    fallback.symlink_to(tmp_path, target_is_directory=True)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with built(FASTPRIOR_CACHE="/proc/fastprior"):
        goes_on("is not a folder of this user alone")

    monkeypatch.delenv("FASTPRIOR_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", "/proc/fastprior")
    monkeypatch.setattr(Path, "home", nobody)
    with built():
        goes_on("no place for what it makes")


@pytest.mark.parametrize("case", ["unwritable", "full", "no home"])
def test_another_place_to_write_to(tmp_path, monkeypatch, case):
    """Kernels run all the same, and a warning says where they are kept."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    options = dict(FASTPRIOR_CACHE="/proc/fastprior")
    if case == "full":
        fails = 'echo "final close failed: No space left on device" >&2; exit 1'
        full = refusing(tmp_path, f'case "$*" in */small/*) {fails};; esac\nexec cc "$@"\n')
        options = dict(FASTPRIOR_CACHE=tmp_path / "small", CC=full)
    elif case == "no home":
        options = {}
        monkeypatch.delenv("FASTPRIOR_CACHE", raising=False)
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", nobody)
    kept = tmp_path / f"fastprior-{os.geteuid()}"
    for _ in range(2):  # made, and found again
        with built(QUICK, **options), pytest.warns(RuntimeWarning, match=f"kept in {kept}.*Set FASTPRIOR_CACHE"):
            assert cpu_library.unavailable() is None
        assert len(list(kept.glob("cpu-*.so"))) == 1 and stat.S_IMODE(kept.stat().st_mode) == 0o700


def test_a_cache_that_was_filled_is_only_read(tmp_path):
    with built(QUICK, FASTPRIOR_CACHE=tmp_path):
        _, path = cpu_library.build()
        refuses = refusing(tmp_path, '[ "$1" = --version ] && exec cc --version\nexit 1\n')
        with built(QUICK, CC=refuses):
            assert cpu_library.build()[1] == path and cpu_library.unavailable() is None


def test_every_source_has_a_part_in_the_name_of_the_library(tmp_path, monkeypatch):
    """A library that was kept is never that of other sources."""
    sources = shutil.copytree(cpu_library.SOURCES, tmp_path / "c")
    found = subprocess.run(["cc", *cpu_library.FLAGS, "-MM", sources / "library.c"], capture_output=True, check=True)
    included = {Path(name) for name in found.stdout.decode().replace("\\\n", " ").split()[1:]}
    assert included == set(sources.iterdir()), "each is shipped, and has a part in the library"
    monkeypatch.setattr(cpu_library, "SOURCES", sources)
    empty = refusing(tmp_path, '[ "$1" = --version ] && exec cc --version\nexit 0\n')
    with built(CC=empty, FASTPRIOR_CACHE=tmp_path / "cache"):
        paths = {cpu_library.build()[1]}
        for source in sorted(included):
            source.write_text(source.read_text() + "\n")
            paths.add(cpu_library.build()[1])
    assert len(paths) == 1 + len(included)


@pytest.mark.slow
def test_a_struct_of_another_size_is_not_filled(tmp_path, monkeypatch):
    """A field that one side alone has: the library is not used, or is not compiled."""
    for mirror in structs.ALL:
        name = mirror.__name__
        longer = type(name, (mirror,), {"_fields_": [("more", ctypes.c_long)]})
        with built(QUICK, FASTPRIOR_CACHE=tmp_path), pytest.MonkeyPatch.context() as patch:
            patch.setattr(structs, "ALL", (*structs.ALL, longer))
            with pytest.warns(RuntimeWarning, match="no CPU kernels: struct"):
                cpu_library.unavailable()
            assert cpu_library.unavailable() == (
                f"struct {name.lower()} of C has not the {ctypes.sizeof(longer)} bytes of its mirror in structs.py"
            )
    monkeypatch.setattr(cpu_library, "SOURCES", shutil.copytree(cpu_library.SOURCES, tmp_path / "c"))
    source = cpu_library.SOURCES / "run.c"
    source.write_text(source.read_text().replace("double cond_scale,", "double more, cond_scale,"))
    with built(QUICK, FASTPRIOR_CACHE=tmp_path):
        goes_on("structs.py mirrors struct row")


@pytest.mark.parametrize("mirror", [m for m in structs.ALL if m is not structs.Linear], ids=lambda m: m.__name__)
def test_fields_have_the_order_of_their_struct(mirror):
    """No comparison of sizes sees two that changed places. A linear has names of its own."""
    text = "".join(path.read_text() for path in cpu_library.SOURCES.iterdir())
    body = re.search(rf"^struct {mirror.__name__.lower()} {{(.*?)^}};", text, re.DOTALL | re.MULTILINE)[1]
    declared = re.sub(r"/\*.*?\*/", "", body, flags=re.DOTALL).replace(";", ",").split(",")
    assert [re.search(r"\w+$", part.strip())[0] for part in declared if part.strip()] == [
        name for name, _ in mirror._fields_
    ]


@pytest.mark.slow
def test_a_broken_library_is_made_again(tmp_path):
    """As a crash or a full disk leaves it: a loader that maps half of one would die at its first page."""
    with built(QUICK, FASTPRIOR_CACHE=tmp_path):
        _, path = cpu_library.build()
        whole = path.read_bytes()
        for left in b"", b"no", whole[: len(whole) // 2], whole[:4096] + bytes(len(whole) - 4096):
            path.write_bytes(left)
            assert cpu_library.build()[1] == path and len(path.read_bytes()) == len(whole)
        check_linear(make(3, 23, 77))

"""The tests' own rules and tools: what a file may hold and import, and that pairs of options are covered."""

import ast
import math
import re
import threading
from itertools import combinations, product
from pathlib import Path

import pytest
import torch

from helpers import captures
from helpers.at_once import at_once
from helpers.pairwise import pairwise

TESTS = Path(__file__).parent
FILES = sorted(path.relative_to(TESTS).as_posix() for path in TESTS.rglob("*.py"))


def imported(source: str) -> set[str]:
    """Modules that a source imports, at whatever depth, also in the programs that it holds as strings."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= set(re.findall(r"\b(?:from|import) +([\w.]+)", node.value))
    return found


@pytest.mark.parametrize("file", [name for name in FILES if name != Path(__file__).name])
def test_no_file_imports_a_test_file_or_conftest(file):
    stems = {Path(name).stem for name in FILES if Path(name).name.startswith("test_")} | {"conftest"}
    assert not {name for name in imported((TESTS / file).read_text()) if set(name.split(".")) & stems}


def test_conftest_holds_fixtures_and_hooks_only():
    for node in ast.parse((TESTS / "conftest.py").read_text()).body:
        assert not isinstance(node, ast.ClassDef), node.name
        if isinstance(node, ast.FunctionDef):
            decorators = {ast.unparse(decorator).split("(")[0] for decorator in node.decorator_list}
            assert node.name.startswith("pytest_") or "pytest.fixture" in decorators, node.name


def test_what_is_imported_is_seen():
    source = "import a.b\ndef f():\n    from conftest import c\nrun('import test_x')\n"
    assert imported(source) >= {"a.b", "conftest", "test_x"}


@pytest.mark.parametrize("sizes", [(3,), (2, 5), (2, 2, 2), (4, 1, 3, 2), (24, 2, 4), (3,) * 6, (2,) * 9])
def test_pairwise(sizes):
    options = {f"option{place}": [f"{place}-{index}" for index in range(size)] for place, size in enumerate(sizes)}
    cases = pairwise(**options)
    assert cases == pairwise(**options) and len(set(cases)) == len(cases)
    assert all(set(case) <= set(values) for case, values in zip(zip(*cases), options.values()))
    for (one, ones), (other, others) in combinations(enumerate(options.values()), 2):
        assert {(case[one], case[other]) for case in cases} == set(product(ones, others))
    assert len(cases) <= math.prod(sizes) / (1 if len(sizes) < 3 else 2)


def test_at_once():
    """Together, in the order of what was given; an error in one thread, be it in one alone, is seen."""
    meeting = threading.Barrier(5, timeout=60)
    assert at_once(lambda number: meeting.wait() * 0 + number * number, range(5)) == [0, 1, 4, 9, 16]
    with pytest.raises(ZeroDivisionError):
        at_once(lambda number: 1 / number, [2, 1, 0, 3])


@pytest.mark.slow
def test_a_recording_computes_nothing():
    """As a capture: until it runs again, new tensors hold garbage, and those that were there what they held."""
    x, count, seen, made = torch.ones(3), torch.zeros((), dtype=torch.int64), [], {}

    def run():
        seen.append(count.item() if len(seen) < 3 else None)  # which would end a recording
        made.update(sum=x + count, index=torch.arange(3) + 1, kept=x > 0)
        made["view"] = made["sum"][1:]
        x[1:].mul_(2)
        count.add_(1)

    replay, _, _ = captures.capture(run, torch.device("cpu"), None)
    assert seen == [0, 1, 2, None] and count == 3 and x.tolist() == [1, 8, 8]
    assert made["sum"].isnan().all() and made["view"].isnan().all() and made["kept"].all()
    assert (made["index"] == 2**40).all()
    for number in (3, 4):
        wanted = x + count
        replay()
        assert torch.equal(made["sum"], wanted) and torch.equal(made["view"], wanted[1:]) and count == number + 1
    assert made["index"].tolist() == [1, 2, 3] and x.tolist() == [1, 32, 32]
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"), captures.Tape():
        count.item()

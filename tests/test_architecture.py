"""The house stays as docs/architecture.md draws it: arrows run one way, rooms stay small, every file has its line."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
LAYERS = (  # from the top; a room may import from rooms of the layers below it, and from those that BESIDE names
    "cli train_diffusion_prior demos dropin server",
    "fastprior dalle2_pytorch train_configs",
    "serving pipelines trainer checkpoints dataloaders trackers",
    "prior",
    "engine",
    "models",
    "diffusion weight_files clip peer optimizer",
    "batches checks draws program reading utils tokenizer version",
    "kernels",
)
BESIDE = {  # rooms that import from one of their own layer
    "clip": "weight_files",  # local files of CLIPs
    "checks": "reading",  # what messages quote
    "cli": "demos train_diffusion_prior server",  # which commands start
    "pipelines": "checkpoints",  # other weights for what serves, and what of them must agree
    "serving": "checkpoints dataloaders",  # the same, and files of shards
    "utils": "reading",  # what messages quote
    "trackers": "checkpoints",  # files of models that are saved
}
WINGS = {
    "ops": "reference arguments cpu gpu",
    "reference": "arguments",
    "cpu": "reference arguments",
    "gpu": "reference arguments",
    "arguments": "",
}
DOORS = {f"fastprior.kernels.{name}" for name in ("ops", "reference")}  # by which the rest comes to kernels
BEHIND_THE_DOOR = {  # who looks behind it, and why
    "fastprior.cli.info": "says which kernels run here, and why others do not",
    "fastprior.engine.step_cost": "counts what launchers would launch",
}
MODULE_LINES, FUNCTION_LINES, FLOORS = 450, 70, 11
LONG_FUNCTIONS = {  # "file:function" to why it is not cut
    "kernels/gpu/attend_project.py:_attend_project_fwd_kernel": "one kernel: what it asks for before the wait it holds",
    "kernels/gpu/decode.py:_decode_attention_fwd_kernel": "one kernel, whose arguments alone take a dozen lines",
    "kernels/gpu/linear.py:_linear_fwd_kernel": "one kernel, whose arguments alone take thirty lines",
    "kernels/gpu/skinny_linear.py:_skinny_linear_fwd_kernel": "one kernel: what it asks for before the wait it holds",
    "kernels/gpu/step.py:_advance_fwd_kernel": "one kernel, whose arguments alone take a dozen lines",
}


def sources() -> dict[str, Path]:
    """Modules of the product by dotted name."""
    found = {}
    for path in sorted([*(ROOT / "fastprior").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]):
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        parts = ["fastprior", *parts] if parts[0] == "kernels" else parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, tree: ast.AST, is_package: bool, known) -> set[str]:
    """Which of the known modules a module imports: at its top, in functions, and for types alone."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = name.split(".")
            parts = parts[: len(parts) - node.level + is_package] if node.level else []
            source = ".".join([*parts, *([node.module] if node.module else [])])
            inner = {f"{source}.{alias.name}" for alias in node.names}
            found |= inner & set(known)
            if not inner <= set(known):  # some of the names are defined in it, or passed on by it
                found.add(source)
    return {module for module in found if module in known and module != name}


def graph() -> dict[str, set[str]]:
    known = sources()
    return {
        name: imports(name, ast.parse(path.read_text()), path.name == "__init__.py", known)
        for name, path in known.items()
    }


def room(name: str) -> str:
    """The folder of `fastprior/` that a module lies in, or its own name; kernels are one room."""
    return (name.split(".") + ["fastprior"])[1] if name != "fastprior" else "fastprior"


def against_the_layers(edges: dict[str, set[str]]) -> list[str]:
    floor = {name: number for number, names in enumerate(LAYERS) for name in names.split()}
    return [
        f"{name} imports {other}"
        for name, others in edges.items()
        for other in sorted(others)
        if not (
            room(name) == room(other)
            or floor[room(other)] > floor[room(name)]
            or room(other) in BESIDE.get(room(name), "").split()
        )
    ]


def against_the_wings(edges: dict[str, set[str]]) -> list[str]:
    """Of `kernels/`: who passes the door, or goes from one wing to the other."""
    start = "fastprior.kernels."
    return [
        f"{name} imports {other}"
        for name, others in edges.items()
        for other in sorted(others)
        if name.startswith(start)
        and other.startswith(start)
        and (one := name.split(".")[2]) != (another := other.split(".")[2])
        and another not in WINGS[one].split()
    ]


def circle(edges: dict[str, set[str]]) -> list[str]:
    """Modules that import each other, in turn; empty where none do."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def height(edges: dict[str, set[str]]) -> dict[str, int]:
    """Of each module: 1 for one that imports none, else one more than the highest of those that it imports."""
    heights: dict[str, int] = {}
    for name in TopologicalSorter(edges).static_order():
        heights[name] = 1 + max((heights[other] for other in edges[name]), default=0)
    return heights


def too_long(tree: ast.AST) -> dict[str, int]:
    return {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > FUNCTION_LINES
    }


def test_no_modules_import_each_other():
    assert circle(graph()) == []


def test_arrows_run_one_way():
    edges = graph()
    assert against_the_layers(edges) == [] and against_the_wings(edges) == []
    outside = {name: others for name, others in edges.items() if room(name) != "kernels"}
    passed = {
        (name, other)
        for name, others in outside.items()
        for other in others
        if other.startswith("fastprior.kernels.") and other not in DOORS and name not in BEHIND_THE_DOOR
    }
    assert passed == set()


def test_few_floors():
    rooms: dict[str, set[str]] = {}
    for name, others in graph().items():
        rooms.setdefault(room(name), set()).update(room(other) for other in others if room(other) != room(name))
    heights = height(rooms)
    assert max(heights.values()) <= FLOORS, sorted(heights.items(), key=lambda item: -item[1])[:5]


def test_no_long_modules_and_functions():
    modules, functions = {}, {}
    for path in sources().values():
        text, where = path.read_text(), str(path.relative_to(ROOT))
        if text.count("\n") > MODULE_LINES:
            modules[where] = text.count("\n")
        functions |= {f"{where}:{name}": lines for name, lines in too_long(ast.parse(text)).items()}
    assert modules == {}
    assert functions.keys() == LONG_FUNCTIONS.keys(), functions


def unnamed(page: str, files: list[Path]) -> list[str]:
    """Files without a line of their own in the trees of the page, which say folders by their indents."""
    named, folders = set(), []
    for line in page.splitlines():
        word = line.strip().split("  ")[0]
        depth = (len(line) - len(line.lstrip())) // 2
        if word.endswith("/"):
            folders[depth:] = [word]
        named |= {"".join([*folders[:depth], name]) for name in word.split(", ")}
    return [str(path) for path in files if str(path) not in named]


def borrowed(tree: ast.AST) -> list[str]:
    """Private names that are imported from another module; Triton's kernels are private to all but their launchers."""
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names]
    return [name for name in names if re.match(r"_[a-z]", name, re.I) and not name.endswith("_kernel")]


def half_sentences(tree: ast.AST) -> list[str]:
    """Docstrings that begin in the middle of a sentence."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))]
    texts = [ast.get_docstring(node) or "" for node in nodes]
    return [text for text in texts if re.match(r"(Of|For|With|As|That|The same|What it|Also)\b(?! now)", text)]


def test_nothing_private_is_imported_and_sentences_stand_alone():
    found = {}
    for name, path in sources().items():
        tree = ast.parse(path.read_text())
        if wrong := borrowed(tree) + half_sentences(tree):
            found[name] = wrong
    assert found == {}


def test_every_file_is_on_the_page():
    files = [path for folder in ("fastprior", "kernels") for path in (ROOT / folder).rglob("*.*")]
    files = [path.relative_to(ROOT) for path in files if path.suffix in (".py", ".c", ".h")]
    assert unnamed(PAGE.read_text(), [path for path in files if path.name != "__init__.py"]) == []


def test_every_file_of_the_page_is_there():
    known = {
        path.name
        for folder in ("fastprior", "kernels", "tests", "benchmarks", "docs")
        for path in (ROOT / folder).rglob("*")
    }
    for line in PAGE.read_text().splitlines():
        for word in line.replace("`", " ").replace(",", " ").replace(":", " ").split():
            if word != "client.py" and word.endswith((".py", ".c", ".h", ".sh")) and "/" not in word.rstrip("/"):
                assert word in known, line


def test_every_function_of_the_page_is_there():
    calls = re.findall(r"`([\w/]+\.py):(\w+)`", PAGE.read_text())
    assert len(calls) > 20
    for file, function in calls:
        (path,) = [path for folder in ("", "fastprior") if (path := ROOT / folder / file).exists()]
        defined = {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}
        assert function in defined, f"{file}:{function}"


# the guards bite


def test_circles_and_arrows_are_found():
    assert (
        set(circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})) == {"a", "b", "c"} and circle({"a": {"b"}, "b": set()}) == []
    )
    up, down = "fastprior.models.snapshot", "fastprior.prior.loop"
    assert against_the_layers({down: {up}}) == [] and against_the_layers({up: {down}}) == [f"{up} imports {down}"]
    assert against_the_layers({"fastprior.trainer.ema": {"fastprior.serving.quality"}})
    cpu, gpu, ops = (f"fastprior.kernels.{name}" for name in ("cpu.linear", "gpu.linear", "ops"))
    assert against_the_wings({ops: {cpu, gpu}}) == []
    assert against_the_wings({cpu: {gpu, ops}, gpu: {gpu}}) == [f"{cpu} imports {gpu}", f"{cpu} imports {ops}"]
    assert height({"a": {"b"}, "b": {"c"}, "c": set(), "d": {"c"}}) == {"c": 1, "b": 2, "d": 2, "a": 3}


@pytest.mark.parametrize(
    "code, wanted",
    [
        ("import fastprior.utils", {"fastprior.utils"}),
        ("def f():\n    from fastprior import utils", {"fastprior.utils"}),
        ("if TYPE_CHECKING:\n    from fastprior.prior.plan import SamplingPlan", {"fastprior.prior.plan"}),
        ("from fastprior import load", {"fastprior"}),
        ("from . import clock", {"fastprior.engine.clock"}),
        ("from .clock import Clock", {"fastprior.engine.clock"}),
        ("import torch\nfrom collections import deque", set()),
    ],
)
def test_imports_are_found(code, wanted):
    known = {
        "fastprior",
        "fastprior.utils",
        "fastprior.prior.plan",
        "fastprior.engine.clock",
        "fastprior.engine.graphs",
    }
    assert imports("fastprior.engine.graphs", ast.parse(code), False, known) == wanted


def test_what_is_private_and_half_sentences_are_found():
    code = 'from x import _a, b, __version__, _b_kernel\ndef f():\n    "Of a thing."\ndef g():\n    "A thing."'
    assert borrowed(ast.parse(code)) == ["_a"] and half_sentences(ast.parse(code)) == ["Of a thing."]


def test_long_functions_and_unnamed_files_are_found():
    assert too_long(ast.parse("def f():\n" + "    x = 1\n" * 70)) == {"f": 71}
    assert too_long(ast.parse("def f():\n" + "    x = 1\n" * 69)) == {}
    page = "fastprior/\n  models/  networks\n    snapshot.py  whether a model changed\n  clip.py  CLIP\n"
    files = [Path("fastprior/models/snapshot.py"), Path("fastprior/clip.py"), Path("fastprior/snapshot.py")]
    assert unnamed(page, files) == ["fastprior/snapshot.py"]

"""What a file of weights holds: its tensors by name, which of several models, and what is reported of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from fastprior.reading import brief
from fastprior.utils import first_few
from fastprior.weight_files.tensors import Unreadable

MOST_LEVELS, MOST_LETTERS = 64, 1000  # of nested dicts, and of a key: what lies deeper, or is longer, is no prior's
MOST_PRIORS = 100  # in one file, averages and copies among them
MISFITS = TypeError, RuntimeError, ArithmeticError, AttributeError, LookupError, MemoryError
GAMMA, UNPADDED, ONE_NULL, CURRENT = "before 0.16.0", "0.16.0 to 0.23.0", "0.23.1 to 1.8.4", "1.9.0 or later"


@contextmanager
def one_error(path: str) -> Iterator[None]:
    """Make a ValueError that names the file of what its values, which may be anything, lead constructors to raise."""
    try:
        yield
    except MISFITS as error:
        raise ValueError(f"{path} makes no prior: {brief(str(error))}") from error
    except ValueError as error:
        if path in str(error):
            raise
        raise ValueError(f"{path}: {brief(str(error))}") from error


def without_wrappers(key: str) -> str:
    """A tensor's key without what DDP and torch.compile put into it."""
    return re.sub(r"(?:(?<=\.)|^)(?:module|_orig_mod)\.", "", key)


def renamed(key: str, renames: Iterable[tuple[str, str | None]]) -> str | None:
    """A key after a map of renames, patterns and what replaces them, in order; None where one drops it."""
    for pattern, replacement in renames:
        if replacement is not None:
            key = re.sub(pattern, replacement, key)
        elif re.search(pattern, key):
            return None
    return key


def _dicts(tree: Mapping, where: str) -> Iterator[tuple[str, Mapping]]:
    """Nested dicts, each with what the dotted keys of its entries begin with; ValueError for those without an end."""
    stack, known, entries, visited = [("", tree, 0)], set(), 0, 0
    while stack:
        prefix, node, depth = stack.pop()
        visited += 1 + len(node)
        if id(node) not in known:
            known.add(id(node))
            entries += 1 + len(node)
        if visited > 10 * entries + 1000:
            raise ValueError(f"{where}: its dicts contain each other over and over; it must hold a state dict")
        yield prefix, node
        if depth < MOST_LEVELS:
            named = ((_name(key), value) for key, value in node.items() if isinstance(value, Mapping))
            inner = [(f"{prefix}{name}.", value, depth + 1) for name, value in named if name is not None]
            stack += reversed(inner)


def _name(key) -> str | None:
    """A key of a dict as a part of a tensor's; None for one that is no name."""
    is_name = isinstance(key, str) and len(key) <= MOST_LETTERS
    return key if is_name else str(key) if type(key) is int and key.bit_length() <= 64 else None


def flatten(tree: Mapping, where: str) -> Iterator[tuple[str, Tensor | Unreadable]]:
    """The tensors of nested dicts by dotted keys, see `without_wrappers`. Raises ValueError for endless ones."""
    for prefix, node in _dicts(tree, where):
        for key, value in node.items():
            if isinstance(value, (Tensor, Unreadable)) and (name := _name(key)) is not None:
                yield without_wrappers(f"{prefix}{name}"), value


def module_names(tree: Mapping, where: str) -> Iterator[str]:
    """The modules of the state dicts in nested dicts, by dotted names: torch notes them beside the tensors."""
    for prefix, node in _dicts(tree, where):
        noted = getattr(node, "_metadata", None)
        for name in noted if isinstance(noted, Mapping) else ():
            if (name := _name(name)) is not None:
                yield without_wrappers(f"{prefix}{name}.")[:-1]


def widened(tensors: Mapping[str, Tensor], report: LoadReport) -> dict[str, Tensor]:
    """The tensors, of which those of 8-bit floats are made fp32, which has all their values: PyTorch adds no 8 bits."""
    narrow = {value.dtype for value in tensors.values() if value.is_floating_point() and value.dtype.itemsize == 1}
    if narrow:
        report.notes.append(f"weights are {first_few(sorted(map(str, narrow)))} in the file, and were widened")
    return {key: value.float() if value.dtype in narrow else value for key, value in tensors.items()}


def tensors_under(flat: Mapping, root: str, roots: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of one of several places, by the rest of their keys, without those of places within it."""
    nested = tuple(other for other in roots if other != root and other.startswith(root))
    return {key[len(root) :]: t for key, t in flat.items() if key.startswith(root) and not key.startswith(nested)}


@dataclass
class Contents:
    """What a file holds of one prior.

    Attributes:
        tensors: by their keys in a prior, `net.…`.
        modules: the names of its modules, where the file notes them.
        shared_once: whether what layers share, as rotary frequencies are, may have been dropped: see `safe.SharedOnce`.
    """

    tensors: dict[str, Tensor]
    modules: set[str]
    shared_once: bool


def _is_ema(root: str) -> bool:
    *_, last = parts = ["", *root.split(".")[:-1]]
    return last != "online_model" and any(re.match(r"ema(_|$)|.*_ema$", part) for part in parts)


def choose_root(flat: Mapping, roots: Iterable[str], weights: str, report: LoadReport) -> tuple[str, dict[str, Tensor]]:
    """Choose one of the places that hold a prior, such as `ema_model.`: it, and its tensors by the rest of their keys.

    Raises ValueError where there are no weights of the wanted kind.
    """
    if weights not in ("auto", "model", "ema"):
        raise ValueError(f"weights={weights!r}; it must be 'auto', 'model' or 'ema'")
    kinds = {kind: sorted((r for r in roots if _is_ema(r) == (kind == "ema")), key=len) for kind in ("model", "ema")}
    report.weights = ("ema" if kinds["ema"] else "model") if weights == "auto" else weights
    if not kinds[report.weights]:
        other = "model" if weights == "ema" else "ema"
        raise ValueError(f"weights={weights!r}; {report.path} has {other} weights only")
    root = kinds[report.weights][0]
    return root, tensors_under(flat, root, roots)


@dataclass
class LoadReport:
    """What a file held, and what was made of it; meant to be printed.

    Attributes:
        path, kind: the file and what it is, such as "trainer checkpoint".
        weights: "model" or "ema".
        version: the dalle2-pytorch release that the weights are from, where known; fastprior's for its own files.
        era: the releases that write such keys.
        architecture: "recorded" in the file, "given" by a config, or "inferred" from shapes.
        missing, unexpected: keys that no rule for a known era explains.
        derived: constants that the file lacks, such as rotary frequencies and the tables of the noise schedule.
        guesses: assumptions that make results wrong if they are wrong; also warned of.
        assumed: arguments that neither weights nor a config show, and their defaults.
        notes: what was converted, and what cannot be seen in weights.
        metadata: the values given to `save`, and `text_encoder`, what encoded the text in training, where known.
    """

    path: str
    kind: str = ""
    weights: str = "model"
    version: str | None = None
    era: str = CURRENT
    architecture: str = "inferred"
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    derived: list[str] = field(default_factory=list)
    guesses: list[str] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    metadata: dict = field(default_factory=dict)

    def __str__(self) -> str:
        version = f", version {self.version}" if self.version else ""
        lines = [f"{self.path}: {self.kind}, {self.weights} weights{version}, keys of {self.era}"]
        lines += [f"architecture: {self.architecture}"]
        named = "missing", "unexpected", "derived"
        lines += [f"{name}: {first_few(keys)}" for name in named if (keys := getattr(self, name))]
        kinds = dict(guess=self.guesses, assumed=self.assumed, note=self.notes)
        lines += [f"{kind}: {line}" for kind, found in kinds.items() for line in found]
        return "\n  ".join(lines)

"""What a file of weights holds: its tensors by name, which of several models, and what is reported of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastprior.utils import first_few

GAMMA, UNPADDED, ONE_NULL, CURRENT = "before 0.16.0", "0.16.0 to 0.23.0", "0.23.1 to 1.8.4", "1.9.0 or later"


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


def flatten(tree: Mapping, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested dicts by dotted keys, see `without_wrappers`."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        elif torch.is_tensor(value):
            yield without_wrappers(f"{prefix}{key}"), value


def module_names(tree: Mapping, prefix: str = "") -> Iterator[str]:
    """The modules of the state dicts in nested dicts, by dotted names: torch notes them beside the tensors."""
    noted = getattr(tree, "_metadata", None)
    for name in noted if isinstance(noted, Mapping) else ():
        yield without_wrappers(f"{prefix}{name}.")[:-1]
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from module_names(value, f"{prefix}{key}.")


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

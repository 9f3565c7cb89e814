"""Extra conditions of a prior: named scalars, categories and vectors, each a token of the prefix."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastprior.checks import check_count, check_number, check_share
from fastprior.models.dalle2.layers import MLP, SinusoidalPosEmb
from fastprior.models.linears import dtype_of, projected
from fastprior.utils import nearest

SCALAR_WAVES = 64  # sines and cosines that a scalar is embedded as
SCALAR_RATE = 10.0  # of the fastest, in radians per standard deviation: nearer values are told apart by the MLP


class Condition(nn.Module):
    """The token of one condition: its embedding where it is given, its learned null where it is missing or dropped.

    Args:
        dim: width of the token.
        dropout: chance per prompt of the null in training mode.

    Attributes:
        kind: "scalar", "category" or "vector".
        shape: of one prompt's value.
        missing: the value that stands for none.
    """

    kind: str
    shape: tuple[int, ...] = ()
    missing: float = math.nan

    def __init__(self, dim: int, dropout: float = 0.0):
        super().__init__()
        check_share("dropout", dropout)
        self.null = nn.Parameter(torch.randn(dim))
        self.dropout = nn.Dropout(dropout)

    def has_value(self, value: Tensor) -> Tensor:
        """Which prompts have a value: (prompts,) bool."""
        return ~value.isnan().unsqueeze(-1).flatten(1).any(dim=1)

    def none(self, prompts: int, device: torch.device) -> Tensor:
        """The value of prompts that have none."""
        return torch.full((prompts, *self.shape), self.missing, device=device)

    def embed(self, value: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, value: Tensor | None, keep: Tensor) -> Tensor:
        """The token (prompts, dim) of value (prompts, *shape), None where all are missing; keep: (prompts, 1) bool."""
        if value is None:  # embedded all the same: in distributed training every weight takes part in every step
            value = self.none(keep.shape[0], keep.device)
        given = self.has_value(value)
        # a NaN would reach the gradient through where, and a negative index has no embedding
        value = value.where(given.view(-1, *(1,) * (value.ndim - 1)), 0)
        kept = self.dropout(torch.ones(keep.shape[0], 1, device=keep.device)).bool()
        return self.embed(value).where(keep & kept & given[:, None], self.null)


class Scalar(Condition):
    """A number: (prompts,), floating point; NaN is missing.

    It is brought to `(value - mean) / std`, embedded as sines and cosines of rates that fall from 10 radians per
    standard deviation to a ten thousandth of that, and taken to a token by a small MLP.

    Args:
        mean, std: of the values in the training data.
    """

    kind = "scalar"

    def __init__(self, dim: int, *, mean: float = 0.0, std: float = 1.0, dropout: float = 0.0):
        super().__init__(dim, dropout)
        check_number("mean", mean)
        check_number("std", std, above=0)
        self.mean, self.std = mean, std
        self.waves = SinusoidalPosEmb(SCALAR_WAVES)
        self.mlp = MLP(SCALAR_WAVES, dim, expansion_factor=1, depth=1)

    def embed(self, value: Tensor) -> Tensor:
        return self.mlp(self.waves((value.float() - self.mean) * (SCALAR_RATE / self.std)))


class Category(Condition):
    """One of `size` categories: (prompts,), integers; a negative one is missing."""

    kind, missing = "category", -1

    def __init__(self, dim: int, *, size: int, dropout: float = 0.0):
        super().__init__(dim, dropout)
        check_count("size", size)
        self.size = size
        self.embedding = nn.Embedding(size, dim)

    def has_value(self, value: Tensor) -> Tensor:
        return value >= 0

    def embed(self, value: Tensor) -> Tensor:
        return self.embedding(value.long())


class Vector(Condition):
    """An embedding: (prompts, size), floating point; a row that holds NaN is missing."""

    kind = "vector"

    def __init__(self, dim: int, *, size: int, dropout: float = 0.0):
        super().__init__(dim, dropout)
        check_count("size", size)
        self.shape = (size,)
        self.projection = nn.Linear(size, dim)

    def embed(self, value: Tensor) -> Tensor:
        return projected(self.projection, value.to(dtype_of(self.projection, self)))


KINDS = {kind.kind: kind for kind in (Scalar, Category, Vector)}


def find(conditions: Mapping[str, Any] | Conditions | None, name: str, where: str = "conditions") -> Any:
    """The condition of that name. Raises ValueError where there is none, saying where the name stands."""
    if name not in (conditions or ()):
        hint = nearest(str(name), conditions) if conditions else "the network has none"
        raise ValueError(f"{where} has the unknown name {name!r}; {hint}")
    return conditions[name]


class Conditions(nn.ModuleDict):
    """All extra conditions of a network, by name; their tokens stand in the alphabetical order of the names.

    Args:
        dim: width of the tokens.
        specs: for each name, `kind` ("scalar", "category" or "vector") and the options of `Scalar`, `Category` or
            `Vector`, as in {"aesthetic": {"kind": "scalar", "mean": 5.5, "dropout": 0.1}}.
    Raises:
        ValueError: a name, kind or option that cannot be, with its rule.
    """

    def __init__(self, dim: int, specs: Mapping[str, Mapping[str, Any]]):
        super().__init__()
        if not isinstance(specs, Mapping):
            raise ValueError(f"conditions={specs!r}; it must be a dict of names and their options")
        check_count("conditions: their number", len(specs), 0, 2**10)
        for name in sorted(specs, key=str):
            if not isinstance(name, str) or not name.isidentifier() or hasattr(self, name):
                rule = "it must be an identifier, and no attribute of a module"
                raise ValueError(f"conditions has the name {name!r}; {rule}")
            self[name] = _condition(dim, name, specs[name])

    def nulls(self) -> Tensor:
        """The tokens of the unconditional branch: (count, dim)."""
        return torch.stack([condition.null for condition in self.values()])

    def missing(self, prompts: int, device: torch.device) -> dict[str, Tensor]:
        """The values of prompts that have none of any condition."""
        return {name: condition.none(prompts, device) for name, condition in self.items()}

    def forward(self, values: Mapping[str, Tensor] | None, keep: Tensor) -> Tensor:
        """The tokens (prompts, count, dim) of the values given, in the weights' dtype; keep: (prompts, 1) bool."""
        values = values or {}
        return torch.stack([condition(values.get(name), keep) for name, condition in self.items()], dim=1)

    def check(self, values: Mapping[str, Tensor], prompts: int) -> None:
        """Raise ValueError or TypeError unless the values are known, of the right shape and of the right dtype."""
        for name, value in values.items():
            find(self, name)
            if not torch.is_tensor(value):
                raise TypeError(f"conditions[{name!r}] is a {type(value).__name__}; it must be a tensor")
            shape = prompts, *self[name].shape
            if tuple(value.shape) != shape:
                raise ValueError(f"conditions[{name!r}] has shape {tuple(value.shape)}; it must be {shape}")
            whole = isinstance(self[name], Category)
            if value.is_floating_point() == whole or value.is_complex() or value.dtype == torch.bool:
                rule = "integers" if whole else "floating point"
                raise TypeError(f"conditions[{name!r}] has dtype {value.dtype}; it must be {rule}")

    def check_values(self, values: Mapping[str, Tensor], prompts: int) -> None:
        """`check`, and raise ValueError for a category that does not exist, or infinity. The host waits for them."""
        self.check(values, prompts)
        for name, value in values.items():
            if isinstance(self[name], Category):
                size = self[name].size
                if value.numel() and (highest := int(value.max())) >= size:
                    raise ValueError(f"conditions[{name!r}] holds {highest}; it must be below its size, {size}")
            elif value.isinf().any():
                raise ValueError(f"conditions[{name!r}] holds infinity; a value that is missing must be NaN")


def _condition(dim: int, name: str, spec: Mapping[str, Any]) -> Condition:
    where = f"conditions[{name!r}]"
    if not isinstance(spec, Mapping) or str(spec.get("kind")) not in KINDS:
        raise ValueError(f"{where}={spec!r}; it must be a dict whose kind is one of {', '.join(map(repr, KINDS))}")
    options = {key: value for key, value in spec.items() if key != "kind"}
    parameters = inspect.signature(KINDS[spec["kind"]]).parameters
    known = [key for key in parameters if key != "dim"]
    for key in options:
        if key not in known:
            raise ValueError(f"{where} has the unknown option {key!r}; {nearest(str(key), known)}")
    if "size" in known and "size" not in options:
        raise ValueError(f"{where} has no size; a {spec['kind']} needs it")
    try:
        return KINDS[spec["kind"]](dim, **options)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None

"""Checks of arguments: one error that names the argument, its value and the rule."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection
from typing import Any

from fastprior.reading import quoted

MOST = 2**20  # of tokens, widths, steps, rows: more fits no machine


def _refuse(name: str, value: Any, rule: str) -> None:
    raise ValueError(f"{name}={quoted(value)}; it must be {rule}")


def is_integer(value: Any) -> bool:
    """Whether a value is an integer, of Python, NumPy or torch, and no bool."""
    try:
        operator.index(value)
    except (TypeError, RuntimeError):
        return False
    return not isinstance(value, bool)


def check_count(name: str, value: Any, least: int = 1, most: int | None = MOST) -> None:
    """Raise ValueError unless a value is an integer of at least `least`, and at most `most`."""
    if not is_integer(value):
        _refuse(name, value, f"an integer of at least {least}")
    if value < least:
        _refuse(name, value, f"at least {least}")
    if most is not None and value > most:
        _refuse(name, value, f"at most {most:,}")


def check_number(
    name: str,
    value: Any,
    least: float = -math.inf,
    *,
    above: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
) -> None:
    """Raise ValueError unless a value is a finite number: of at least `least`, more than `above`, …"""
    try:
        number = math.nan if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan
    if math.isfinite(number) and least <= number <= most and above < number < below:
        return
    rules = ("at least", least), ("more than", above), ("at most", most), ("below", below)
    _refuse(
        name,
        value,
        " and ".join(["a finite number"] + [f"{word} {bound}" for word, bound in rules if math.isfinite(bound)]),
    )


def check_share(name: str, value: Any) -> None:
    """Raise ValueError unless a value is a number between 0 and 1."""
    try:
        check_number(name, value, 0, most=1)
    except ValueError:
        _refuse(name, value, "between 0 and 1")


def check_choice(name: str, value: Any, choices: Collection[Any]) -> None:
    """Raise ValueError unless a value is one of a few."""
    if not isinstance(value, (str, bool, int, float, type(None))) or value not in choices:
        _refuse(name, value, f"one of {', '.join(map(repr, choices))}")

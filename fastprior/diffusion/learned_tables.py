"""Step tables that were learned for the weights of one checkpoint, as its file keeps them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastprior.checks import check_count, check_number
from fastprior.diffusion.solvers import LEARNED, StepTable
from fastprior.reading import quoted
from fastprior.utils import first_few

MOST_TABLES, MOST_SCALES = 64, 16  # in a file, and of a table
MOST_HELD_OUT = 4 * MOST_SCALES
MOST_COEFFICIENT = 1e9  # well within fp32
DTYPES = "float64", "float32", "float16", "bfloat16"  # of weights, for each of which they have a digest
Scales = tuple[tuple[float, float], ...]


class Agreement(NamedTuple):
    """Cosines between samples and the solution of the ODE from the same noise: what half, 95 % and all reach."""

    median: float
    percentile_5: float
    worst: float


class HeldOut(NamedTuple):
    """What prompts that the table was not learned on showed at one guidance scale.

    Attributes:
        learned, untuned: of the table, and of "dpm++" at "logsnr" times with as many evaluations.
    """

    cond_scale: float
    learned: Agreement
    untuned: Agreement


@dataclass(frozen=True)
class LearnedTable(StepTable):
    """A step table that was learned for some weights and guidance scales; the ODE's, so without noise in the steps.

    Attributes:
        scales: intervals (least, most) of guidance scales that it was learned for.
        digests: SHA-256 of those weights by the dtype that they may be cast to, see `fastprior.prior.learned`.
        held_out: how good it is, at some of the scales.
    """

    scales: Scales = ()
    digests: Mapping[str, str] | None = None
    held_out: tuple[HeldOut, ...] = ()

    @classmethod
    def of(cls, times: Sequence[int], rows: Tensor, **learned: Any) -> LearnedTable:
        """One of these times, falling, and rows (steps, 6)."""
        numbers = rows.detach().to("cpu", torch.float64, copy=True)
        return cls(LEARNED, tuple(times), numbers, draws_noise=(False,) * len(numbers), **learned)

    def __str__(self) -> str:
        return f"{len(self)} evaluations, cond_scale {spell(self.scales)}"

    def check_scale(self, cond_scale: float) -> None:
        """Raise ValueError for a guidance scale that the table was not learned for."""
        check_number("cond_scale", cond_scale)
        if not any(least <= cond_scale <= most for least, most in self.scales):
            learned = f"the table of {len(self)} evaluations was learned for {spell(self.scales)}"
            raise ValueError(f"cond_scale={cond_scale}; {learned}, and it must be within")

    def to_json(self) -> dict[str, Any]:
        """The table in JSON values, in which no digit is lost."""
        return dict(
            evaluations=len(self), times=list(self.times), rows=self.rows.tolist(), scales=list(map(list, self.scales)),
            digests=dict(self.digests or {}),
            held_out=[
                {"cond_scale": one.cond_scale, "learned": list(one.learned), "dpm++": list(one.untuned)}
                for one in self.held_out
            ],
        )  # fmt: skip


def spell(scales: Scales) -> str:
    """Guidance scales as they are written: "1:4", "1, 2 and 3"."""
    first, *rest = (f"{least:g}" if least == most else f"{least:g}:{most:g}" for least, most in reversed(scales))
    return f"{', '.join(reversed(rest))} and {first}" if rest else first


def check_scales(name: str, scales: Any) -> Scales:
    """Intervals of guidance scales as tuples; raises ValueError for what is none, empty, or too much."""
    if not isinstance(scales, (list, tuple)) or not 0 < len(scales) <= MOST_SCALES:
        raise ValueError(f"{name}={quoted(scales)}; it must be 1 to {MOST_SCALES} pairs (least, most)")
    for pair in scales:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ValueError(f"{name}={quoted(scales)}; it must be 1 to {MOST_SCALES} pairs (least, most)")
        for number in pair:
            check_number(name, number)
        check_number(name, pair[1], pair[0])
    return tuple((float(least), float(most)) for least, most in scales)


def read_tables(entries: Any, timesteps: int) -> dict[int, LearnedTable]:
    """The tables of a file, by their number of evaluations.

    Args:
        entries: what `LearnedTable.to_json` gave; may be anything.
        timesteps: of the prior's schedule.
    Raises:
        ValueError: naming what it must not hold.
    """
    if not isinstance(entries, list) or len(entries) > MOST_TABLES:
        raise ValueError(f"learned_tables={quoted(entries)}; it must be a list of at most {MOST_TABLES} tables")
    tables: dict[int, LearnedTable] = {}
    for index, entry in enumerate(entries):
        table = _read(f"learned_tables[{index}]", entry, timesteps)
        if len(table) in tables:
            raise ValueError(f"learned_tables has two of {len(table)} evaluations; it must have one")
        tables[len(table)] = table
    return tables


def _read(name: str, entry: Any, timesteps: int) -> LearnedTable:
    _check_entries(name, entry, "evaluations", "times", "rows", "scales", "digests", "held_out")
    evaluations, times, rows, digests = (entry[key] for key in ("evaluations", "times", "rows", "digests"))
    check_count(f"{name}.evaluations", evaluations, most=timesteps)
    _check_list(f"{name}.times", times, evaluations)
    for time, limit in zip(times, (timesteps, *times)):
        check_count(f"{name}.times", time, 0, limit - 1)  # falling
    _check_list(f"{name}.rows", rows, evaluations)
    for row in rows:
        _check_list(f"{name}.rows", row, 6)
        for number in row:
            check_number(f"{name}.rows", number, -MOST_COEFFICIENT, most=MOST_COEFFICIENT)
        check_number(f"{name}.rows, the noise", row[5], 0, most=0)
    fits = isinstance(digests, Mapping) and all(key in DTYPES for key in digests)
    if not (fits and digests and all(isinstance(d, str) and len(d) == 64 for d in digests.values())):
        raise ValueError(f"{name}.digests={quoted(digests)}; it must be of 64 letters for {', '.join(DTYPES)}")
    scales = check_scales(f"{name}.scales", entry["scales"])
    judged = entry["held_out"]
    _check_list(f"{name}.held_out", judged, min(len(judged), MOST_HELD_OUT) if isinstance(judged, list) else 1)
    held_out = tuple(_read_held_out(f"{name}.held_out", one) for one in judged)
    numbers = torch.tensor([list(map(float, row)) for row in rows], dtype=torch.float64)
    return LearnedTable.of(times, numbers, scales=scales, digests=dict(digests), held_out=held_out)


def _read_held_out(name: str, entry: Any) -> HeldOut:
    _check_entries(name, entry, "cond_scale", "learned", "dpm++")
    check_number(f"{name}.cond_scale", entry["cond_scale"])
    for kind in ("learned", "dpm++"):
        _check_list(f"{name}.{kind}", entry[kind], 3)
        for number in entry[kind]:
            check_number(f"{name}.{kind}", number, -1.001, most=1.001)  # cosines of fp32
    learned, untuned = (Agreement(*map(float, entry[kind])) for kind in ("learned", "dpm++"))
    return HeldOut(float(entry["cond_scale"]), learned, untuned)


def _check_entries(name: str, entry: Any, *wanted: str) -> None:
    if isinstance(entry, Mapping) and set(entry) == set(wanted):
        return
    found = f" has {first_few(sorted(entry))}" if isinstance(entry, Mapping) else f"={quoted(entry)}"
    raise ValueError(f"{name}{found}; it must have the entries {', '.join(wanted)}, and no others")


def _check_list(name: str, value: Any, count: int) -> None:
    if not isinstance(value, list) or len(value) != count:
        raise ValueError(f"{name}={quoted(value)}; it must be a list of {count} entries")

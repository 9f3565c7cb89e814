"""What a run logs, as lines that people read: rows below a header, or a block of a metric a line."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

_PARTS = re.compile(r"(?:(?P<group>.*)/)?(?:(?P<weights>online|ema) )?(?P<metric>.*?)(?: \[(?P<detail>.*)\])?$")
_WIDTH = 118  # of a row; wider ones become blocks
_CELL = 9
_HEADER_EVERY = 25  # rows


def _shown(value: Any) -> str:
    """A number in four digits, or as it is where it is whole."""
    if hasattr(value, "item") and math.prod(getattr(value, "shape", ())) == 1:
        value = value.item()
    if isinstance(value, float):
        size = abs(value) if math.isfinite(value) else 0.0
        return f"{value:,.0f}" if size >= 1e4 else f"{value:#.4g}" if size >= 1e-3 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _spoken(name: str) -> str:
    return name.rsplit("/", 1)[-1].replace("_", " ")


class Table:
    """Lines for one record after the other, the header of whose rows is repeated now and then."""

    def __init__(self):
        self._names: tuple[str, ...] = ()
        self._rows = 0

    def lines(self, log: Mapping[str, Any], step: int | None = None) -> list[str]:
        """Show a record: one or two values in a line, some more as a row of the table, many as a block."""
        step = None if step is None else _shown(step)
        if len(log) <= 2:
            begin = "" if step is None else f"step {step}  "
            return [(begin + ", ".join(f"{name} {_shown(value)}" for name, value in log.items())).rstrip()]
        titles = ["step", *map(_spoken, log)]
        widths = [max(len(title), _CELL) for title in titles]
        is_plain = len(set(titles)) == len(titles) and not any("[" in title for title in titles)
        if not is_plain or sum(widths) + 2 * len(widths) > _WIDTH:
            self._names = ()  # the next row gets a header
            return self._block(log, step)
        lines = []
        if tuple(log) != self._names or self._rows % _HEADER_EVERY == 0:
            self._names, self._rows = tuple(log), 0
            lines.append("  ".join(title.rjust(width) for title, width in zip(titles, widths)))
        self._rows += 1
        cells = ["" if step is None else step, *map(_shown, log.values())]
        return [*lines, "  ".join(cell.rjust(width) for cell, width in zip(cells, widths))]

    def _block(self, log: Mapping[str, Any], step: str | None) -> list[str]:
        """A line for each metric, with a column for the online weights, their average, and numbers of steps."""
        groups: dict[str, dict[str, dict[str, str]]] = {}
        for name, value in log.items():
            parts = _PARTS.match(str(name)).groupdict(default="")
            detail = re.sub(r"^steps=(\d+)$", r"\1 steps", parts["detail"])
            column = ", ".join(filter(None, (parts["weights"], detail)))
            group = groups.setdefault(parts["group"], {})
            group.setdefault(parts["metric"].replace("_", " "), {})[column] = _shown(value)
        lines = [] if step is None else [f"step {step}"]
        margin = max(len(metric) for group in groups.values() for metric in group) + 2
        for title, group in groups.items():
            columns = list(dict.fromkeys(column for cells in group.values() for column in cells))
            widths = [max(_CELL, len(column)) for column in columns]
            begin = f"  {title}".ljust(margin + 2)
            lines.append(begin + "  ".join(c.rjust(w) for c, w in zip(columns, widths)))
            lines += [
                f"    {metric}".ljust(margin + 2)
                + "  ".join(cells.get(c, "").rjust(w) for c, w in zip(columns, widths))
                for metric, cells in group.items()
            ]
        return [line.rstrip() for line in lines]

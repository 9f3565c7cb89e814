"""A run's curves as one picture: small panels, each line named where it ends."""

from __future__ import annotations

import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fastprior.utils import atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DPI = 110
PANEL_SIZE = 6.2, 3.1  # inches
LABEL_GAP = 0.075  # of a panel's height, between names
MANY, FEW = 200, 30  # points of a line that is smoothed, and of one whose points show
SMOOTHED_TO = 100  # points
MUCH = 8.0  # between values whose logarithms are drawn
LOSSES = {"l1": "mean absolute error", "l2": "mean squared error", "huber": "Huber loss"}
GREY = "#7A7A7A"  # of what others are compared with
COLORS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"  # Okabe and Ito's


@dataclass(frozen=True)
class Panel:
    """What belongs in a panel: names that match `pattern`, of which lines leave out `dropped`."""

    title: str
    pattern: str
    unit: str
    dropped: str = ""
    scale: float = 1.0
    may_be_log: bool = False  # where values differ much
    is_noisy: bool = False  # of single batches


PANELS = (
    Panel("loss", r"loss$|/training-", "", may_be_log=True, is_noisy=True),
    Panel("similarity", r"similarity", "cosine", dropped=r"\bsimilarity\b"),
    Panel("recall", r"recall@", "% of pairs", scale=100.0),
    Panel("median rank", r"median rank", "1 is best", may_be_log=True),
    Panel("learning rate", r"(^|[/_ -])(lr|learning[ _-]rate)$", ""),
    Panel("speed", r"samples([-_/ ]per)?[-_/ ]s(ec(ond)?)?$", "samples per second", is_noisy=True),
)


class Name(NamedTuple):
    """What the name of a series says of it."""

    metric: str
    split: str
    weights: str
    steps: int

    @classmethod
    def of(cls, name: str) -> Name:
        steps = re.search(r"\[steps=(\d+)\]", name)
        words = re.sub(r" ?\[.*?\]", "", name).replace("_", " ")
        found = [re.search(rf"\b({options})\b", words) for options in ("training|validation|test", "ema|online")]
        split, weights = (match[1] if match else "" for match in found)
        metric = re.sub(rf"^({weights}|{split}|training)\b[- ]", "", words.rsplit("/", 1)[-1])
        return cls(metric, split, weights, int(steps[1]) if steps else 0)


def _series(records: Iterable[dict]) -> dict[str, list[tuple[float, float]]]:
    """(step, value) by name, in order of the steps; where a step has several values, the last."""
    series: dict[str, dict[float, float]] = defaultdict(dict)
    for record in records:
        for name, value in record.items():
            if (
                record.get("step") is not None
                and name not in ("step", "time")
                and isinstance(value, (int, float, type(None)))
            ):
                series[name][record["step"]] = math.nan if value is None else value
    return {name: sorted(points.items()) for name, points in series.items()}


def _without_derived(names: list[str]) -> list[str]:
    """The names but for differences of two others, which show between their lines."""
    metrics = {Name.of(name).metric for name in names}
    derived = "difference from baseline similarity"
    shown = {"similarity with text", "baseline similarity"} <= metrics
    return [name for name in names if not (shown and Name.of(name).metric == derived)]


def _labels(names: list[Name], panel: Panel) -> list[str]:
    """What to call each line: its metric, and what of its split and weights tells it from other lines."""
    metrics, splits, weights = (len({getattr(name, part) for name in names}) > 1 for part in Name._fields[:3])
    labels = []
    for name in names:
        metric = " ".join(re.sub(panel.dropped, "", name.metric).split()) if panel.dropped else name.metric
        words = {"ema": "average"}.get(name.weights, name.weights) if weights else ""
        beside = ", ".join(filter(None, (name.split if splits else "", words)))
        by_metric = metrics and not (panel.title == "loss" and beside)
        labels.append(f"{metric} ({beside})" if by_metric and beside else metric if by_metric else beside or metric)
    return labels


def _smooth(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Medians (2, SMOOTHED_TO) of as many equal parts of the points, which no single batch moves."""
    finite = np.isfinite(y)
    parts = zip(*(np.array_split(values[finite], SMOOTHED_TO) for values in (x, y)))
    return np.array([(np.median(steps), np.median(values)) for steps, values in parts]).T


def _spread(heights: np.ndarray, gap: float) -> np.ndarray:
    """Places in [0, 1], as near to `heights` as the gap between any two lets them be, in the same order."""
    order, places = np.argsort(heights, kind="stable"), heights.clip(0, 1)
    gap = min(gap, 1 / len(heights))
    for _ in range(200):
        for low, high in zip(order, order[1:]):
            short = max(0.0, gap - (places[high] - places[low]))
            places[low], places[high] = places[low] - short / 2, places[high] + short / 2
        places = places.clip(0, 1)
    return places


def _write_names(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Name each line, of (last value, label, color), at the right, at the height of its end."""
    axes.get_ylim()  # settles the limits
    points = axes.transData.transform([(axes.get_xlim()[1], value) for value, _, _ in ends])
    heights = axes.transAxes.inverted().transform(points)[:, 1]
    for height, (_, label, color) in zip(_spread(heights, LABEL_GAP), ends):
        place = dict(xy=(1.02, height), xycoords="axes fraction", va="center", annotation_clip=False)
        axes.annotate(label, color=color, fontsize="small", **place)


def _draw(axes: Axes, panel: Panel, series: dict[str, list[tuple[float, float]]]) -> None:
    """A panel: of several numbers of sampling steps the most are solid and named, a test is a point."""
    names = {key: Name.of(key) for key in series}
    drawn = [key for key in series if names[key].split != "test"] or [*series]
    labels = dict(zip(drawn, _labels([names[key] for key in drawn], panel)))
    colored = [label for label in dict.fromkeys(labels.values()) if not re.match("training|baseline", label)]
    colors = defaultdict(lambda: GREY, zip(colored, COLORS * len(colored)))
    by_name = {names[key]._replace(split=""): colors[labels[key]] for key in drawn}
    steps, ends, low, high = sorted({names[key].steps for key in drawn}), [], math.inf, 0.0
    for key, points in series.items():
        x, y = np.array(points, float).T
        y, main = y * panel.scale, names[key].steps == steps[-1]
        color = by_name.get(names[key]._replace(split=""), GREY)
        low, high = min(low, np.nanmin(y, initial=low)), max(high, np.nanmax(y, initial=high))
        if key not in labels:
            axes.plot(x, y, "D", color=color, markerfacecolor="white", markersize=5, zorder=4)
            continue
        finite = np.isfinite(y)
        if panel.is_noisy and finite.sum() > MANY:
            axes.plot(x, y, color=color, linewidth=0.5, alpha=0.3)
            x, y = _smooth(x, y)
            finite = np.isfinite(y)
        axes.plot(
            x, y, color=color, linewidth=1.8 if main else 1.0, linestyle="-" if main else (0, (4, 2)),
            marker="o" if finite.sum() <= FEW else None, markersize=3,
        )  # fmt: skip
        if main and finite.any():
            ends.append((y[finite][-1], labels[key], color))
    if panel.may_be_log and low > 0 and high > MUCH * low:
        from matplotlib.ticker import LogLocator, NullFormatter

        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter("{x:,g}")
    if len(ends) > 1 or panel.title in ("similarity", "recall"):
        _write_names(axes, ends)
    notes = [f"solid: {steps[-1]} sampling steps, dashed: {', '.join(map(str, steps[:-1]))}"] if steps[:-1] else []
    notes += ["\N{WHITE DIAMOND} test"] if len(labels) < len(series) else []
    axes.set_title("; ".join(notes), loc="right", fontsize="small", color="0.4")


def plot_curves(records: Iterable[dict], path: str | os.PathLike) -> None:
    """Write a PNG of a run's loss, similarities, ranks, learning rate and speed over its steps. Atomic.

    Args:
        records: as `fastprior.trackers.read_metrics` gives them: numbers by name, and `step`. Panels without any are
            left out, and a value of None is a gap. A step that was run again shows its last values.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError('matplotlib is not installed: pip install "fastprior[quickstart]"') from error
    series = _series(records)
    found = [(panel, _without_derived([n for n in series if re.search(panel.pattern, n)])) for panel in PANELS]
    found = [(panel, names) for panel, names in found if names]
    columns = 2 if len(found) > 1 else 1
    rows = max(1, -(-len(found) // columns))
    figure = Figure(figsize=(PANEL_SIZE[0] * columns, 0.5 + PANEL_SIZE[1] * rows), dpi=DPI, layout="constrained")
    last = max((points[-1][0] for points in series.values()), default=0)
    run = Path(path).absolute().parent.name
    figure.suptitle(f"{run}: {last:,.0f} steps" if found else f"{run}: nothing was logged", fontsize="large")
    for index, (panel, names) in enumerate(found):
        axes = figure.add_subplot(rows, columns, index + 1)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlim(0, last * 1.01)
        axes.set_title(panel.title, loc="left", fontweight="bold")
        kinds = [LOSSES[kind] for kind in LOSSES if panel.title == "loss" and any(kind in name for name in names)]
        axes.set(xlabel="step", ylabel="".join(kinds[:1]) or panel.unit)
        _draw(axes, panel, {name: series[name] for name in names})
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png")

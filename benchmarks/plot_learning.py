"""Draw the learning curves of a file of records: `python benchmarks/plot_learning.py RECORDS.jsonl OUT.png`."""

import sys
from pathlib import Path

from matplotlib.figure import Figure
from report import latest, read

COLOURS = ("tab:orange", "tab:blue", "tab:green", "tab:red")
PANELS = {
    "score": "share of the Bayes optimum, score",
    "similarity": "similarity with another image of the text",
    "self-similarity": "similarity of two samples of a text",
}


def curves_of(path: Path) -> list[dict]:
    """The measured (not the tuning) curves. Raises ValueError where there are none."""
    records = latest(read(path))
    curves = [record for record in records if record["op"] == "learning"]
    if not curves:
        raise ValueError(f"{path} has no curves; it must hold records that benchmarks/test_learning_curve.py wrote")
    return curves


def draw(records: list[dict], path: Path) -> None:
    """Write a PNG: each statistic, as a share of the optimum, over seconds of training."""
    one = records[0]
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    figure.suptitle(f"{one['device']}; batch {one['batch']}, {one['model']['max_text_len']} text tokens")
    colours = dict(zip(sorted({record["draws"] for record in records}), COLOURS))
    for axes, (name, title) in zip(figure.subplots(1, len(PANELS)), PANELS.items()):
        for record in records:
            first = record is next(r for r in records if r["draws"] == record["draws"])
            label = f"draws={record['draws']}, lr={record['lr']:g}" if first else None
            curve = record["curve"]
            axes.plot(curve["seconds"], curve[name], color=colours[record["draws"]], alpha=0.7, label=label)
        axes.axhline(1.0, color="0.4", linestyle=":")
        if name == "score":
            axes.axhline(one["aim"], color="0.6", linestyle="--", label=f"{one['aim']:.0%}")
        axes.set(title=title, xlabel="seconds of training", ylim=(0.5 if name == "score" else 0.8, None))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, format="png", dpi=110)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    draw(curves_of(Path(sys.argv[1])), Path(sys.argv[2]))

"""Draw what records reached under the roofs that they measured: `python benchmarks/roofline.py RECORDS.jsonl OUT.png`.

Left, records with bytes and FLOPs: TFLOP/s over FLOPs per byte (Williams et al. 2009, Roofline). Right, those with only
one of them: the share of the roof that is theirs.
"""

import sys
from pathlib import Path

from matplotlib.figure import Figure
from report import latest, read

SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}


def roofs_of(records: list[dict]) -> tuple[float | None, float | None]:
    """Bytes and FLOPs per second, as measured, None where they were not. Raises ValueError where neither was."""
    bandwidths = [r["p50"] * 1e9 for r in records if r["op"] in ("copy bandwidth", "read bandwidth")]
    peaks = [r["p50"] * 1e12 for r in records if r["op"] == "bf16 peak"]
    if not bandwidths and not peaks:
        raise ValueError("no bandwidth and no bf16 peak; the records must hold those of benchmarks/test_environment.py")
    return max(bandwidths, default=None), max(peaks, default=None)


def points_of(records: list[dict], bandwidth: float | None, peak: float | None) -> list[dict]:
    """Of every record of a time with bytes or FLOPs: `intensity`, `flops` a second (None without), `share` of its roof.

    Records whose roof was not measured are left out.
    """
    points = []
    for r in records:
        moved, flops = r.get("bytes"), r.get("flops")
        if r["unit"] not in SECONDS or not (moved or flops):
            continue
        seconds = r["p50"] * SECONDS[r["unit"]]
        floors = [moved / bandwidth if moved and bandwidth else 0, flops / peak if flops and peak else 0]
        if not any(floors):
            continue
        points.append(
            dict(
                label=_label(r),
                provider=r["provider"],
                intensity=flops / moved if flops and moved else None,
                flops=flops / seconds if flops else None,
                share=max(floors) / seconds,
            )
        )
    return points


def _label(record: dict) -> str:
    names = ("model", "layer", "rows", "batch", "seq", "dim", "prefix", "heads", "kv_heads", "storage", "dtype")
    details = " ".join(str(record[name]) for name in names if record.get(name) is not None)
    return f"{record['op']}, {record['provider']}: {details}"


def draw(records: list[dict], path: Path) -> None:
    """Write a PNG."""
    bandwidth, peak = roofs_of(records)
    points = points_of(records, bandwidth, peak)
    whole = [p for p in points if p["intensity"]]
    others = sorted((p for p in points if not p["intensity"]), key=lambda p: p["share"])
    figure = Figure(figsize=(16, max(6, 0.17 * len(others))), layout="constrained")
    one = records[-1]
    roofs = [f"{bandwidth / 1e9:.0f} GB/s"] if bandwidth else []
    roofs += [f"{peak / 1e12:.3g} TFLOP/s in bf16"] if peak else []
    figure.suptitle(f"{one['device']}; measured roofs: {', '.join(roofs)}; {one['date']}")
    left, right = figure.subplots(1, 2)
    for number, provider in enumerate(dict.fromkeys(p["provider"] for p in whole)):
        own = [p for p in whole if p["provider"] == provider]
        x, y = [p["intensity"] for p in own], [p["flops"] / 1e12 for p in own]
        left.scatter(x, y, s=14, label=provider, color=f"C{number % 10}", marker="os^vD"[number // 10 % 5])
    if bandwidth:
        ends = [p["intensity"] for p in whole] + ([peak / bandwidth] if peak else [])
        x = [min(ends, default=1) / 2, max(ends, default=1) * 2]
        x = sorted([*x, peak / bandwidth]) if peak else x
        left.plot(x, [min(bandwidth * i, peak or float("inf")) / 1e12 for i in x], color="0.3")
    elif peak:
        left.axhline(peak / 1e12, color="0.3")
    left.set(xscale="log", yscale="log", xlabel="FLOPs per byte", ylabel="TFLOP/s")
    left.grid(alpha=0.3)
    if whole:
        left.legend(frameon=False, fontsize="x-small")
    right.barh([p["label"] for p in others], [p["share"] for p in others], color="tab:blue")
    right.axvline(1.0, color="0.3")
    right.tick_params(axis="y", labelsize=6)
    right.set(xlabel="share of the roof")
    figure.savefig(path, format="png", dpi=110)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        draw(latest(read(Path(sys.argv[1]))), Path(sys.argv[2]))
    except (OSError, ValueError) as error:
        sys.exit(f"{sys.argv[1]}: {error}")

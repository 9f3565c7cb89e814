"""Make the README's speed table from the records: `python benchmarks/report.py`; with `--check` only compare.

`--summary FILE` prints every measurement of a file of records beside its goal.
"""

import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
START, END = "<!-- speed table: made by benchmarks/report.py -->", "<!-- end of speed table -->"
PROVIDERS = {
    "drop-in": "drop-in, eager fp32",
    "sampler-float32": "`PriorSampler`, fp32",
    "sampler-bfloat16": "`PriorSampler`, bf16",
}


MEASURED = {
    "p20", "p50", "p80", "runs", "ratio", "ratio_to_one", "ratio_to_best_other", "share", "share_of_copy", "goal",
    "worst_cosine", "max_error", "floor_ms", "bytes", "peer_evaluations", "driver", "versions", "commit", "date",
    "lr", "reached", "curve", "open_s", "read_s", "before_mib",
}  # fmt: skip


def latest(records: list[dict]) -> list[dict]:
    """The last record of each measurement; the files are appended to, so later lines are newer."""
    last = {}
    for record in records:
        key = tuple(sorted((name, str(value)) for name, value in record.items() if name not in MEASURED))
        last.pop(key, None)
        last[key] = record
    return list(last.values())


def summary(path: Path) -> str:
    """A line for each measurement: what, by whom, how much, and what was reached of the goal."""
    lines = []
    for r in latest([json.loads(line) for line in path.read_text().splitlines()]):
        known = MEASURED | {"op", "provider", "unit", "device"}
        details = " ".join(f"{name}={value}" for name, value in r.items() if name not in known)
        reached = [
            f"{name.replace('_', ' ')} {r[name]:.3g}"
            for name in ("ratio", "ratio_to_one", "ratio_to_best_other", "share", "share_of_copy")
            if r.get(name) is not None
        ]
        goal = f"goal {r['goal']}" if r.get("goal") is not None else ""
        lines.append(f"{r['op']:30} {r['provider']:30} {r['p50']:10.4g} {r['unit']:8} " + "; ".join([*reached, goal]))
        lines[-1] += f"  ({details})"
    return "\n".join(lines)


def read_records() -> list[dict]:
    return latest(
        [
            json.loads(line)
            for path in sorted((HERE / "records").glob("*.jsonl"))
            for line in path.read_text().splitlines()
        ]
    )


def find(records: list[dict], **wanted) -> dict | None:
    return next((r for r in records if all(r.get(k) == v for k, v in wanted.items())), None)


def speed_table(records: list[dict]) -> list[str]:
    """Ratios to the eager peer of a 64-step run, and our time, per batch."""
    runs = [r for r in records if r["op"] == "sample" and r.get("steps") == 64 and r.get("ratio")]
    batches = sorted({r["batch"] for r in runs})
    lines = [
        "| 64-step DDIM, D2-small | guidance | " + " | ".join(f"batch {b}" for b in batches) + " |",
        "|---|---|" + "---|" * len(batches),
    ]
    for provider, label in PROVIDERS.items():
        for scale in sorted({r["cond_scale"] for r in runs}):
            row = [find(runs, provider=provider, cond_scale=scale, batch=b) for b in batches]
            cells = [f"**{r['ratio']:.3g}x** ({_time(r['p50'])})" if r else "" for r in row]
            if any(cells):
                lines.append(f"| {label} | {'none' if scale == 1 else scale} | " + " | ".join(cells) + " |")
    return lines


PRIOR_STAGE = "in diffusers' pipeline", "PriorPipeline", "PriorPipeline, compiled"


def prior_stage_table(records: list[dict]) -> list[str]:
    """Ratios to diffusers of Kandinsky's prior stage, and our time, per batch and length of the text."""
    runs = [r for r in records if r["op"] == "prior stage" and r.get("ratio")]
    columns = sorted({(r["batch"], r["tokens"]) for r in runs})
    if not columns:
        return []
    lines = [
        f"| 25 steps, {runs[0]['model']} | dtype | " + " | ".join(f"batch {b}, {n} tokens" for b, n in columns) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    for dtype in sorted({r["dtype"] for r in runs}, reverse=True):
        for provider in PRIOR_STAGE:
            row = [find(runs, provider=provider, dtype=dtype, batch=b, tokens=n) for b, n in columns]
            cells = [f"**{r['ratio']:.3g}x** ({_time(r['p50'])})" if r else "" for r in row]
            if any(cells):
                lines.append(f"| {provider} | {dtype} | " + " | ".join(cells) + " |")
    against = f"Times faster than diffusers {runs[0]['versions'].get('diffusers')} (fp32, eager), guidance included:"
    return [against, "", *lines]


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds < 10 else f"{seconds:.1f} s"


def facts(records: list[dict]) -> list[str]:
    lines = []
    for r in records:
        if r["op"] == "ratio to compiled peer":
            lines.append(
                f"- {PROVIDERS[r['provider']]}, batch {r['batch']}: {r['p50']:.3g}x the peer under `torch.compile`."
            )
        if r["op"] == "step":
            lines.append(
                f"- One {r['dtype']} step at batch 1: {r['p50']:.1f} ms, {r['share']:.0%} of the speed of reading its "
                f"{r['bytes'] / 1e6:.0f} MB of weights once."
            )
        if r["op"] == "best of 4":
            lines.append(f"- Best of 4 in {r['dtype']}: {r['ratio_to_one']:.2f}x the time of one sample.")
        if r["op"] == "sample" and r.get("steps") == 1000 and "max_error" in r:
            lines.append(
                f"- 1000-step DDPM at batch 1, eager fp32: {r['ratio']:.3g}x ({_time(r['p50'])}), and after 1000 steps "
                f"within {r['max_error']:.0e} of the peer's embedding."
            )
        if r["op"] == "training step" and "ratio" in r:
            other = "dalle2-pytorch's trainer (fp32)" if r["draws"] == 1 else "the loss terms per second of one draw"
            what = "" if r["draws"] == 1 else f", {r['draws']} draws"
            lines.append(f"- Training, {r['dtype']}, batch {r['batch']}{what}: {r['ratio']:.2f}x {other}.")
        if r["op"] == "seconds to the optimum" and r["draws"] != 1:
            one = find(records, op="seconds to the optimum", draws=1)
            own, other = (f"{x['p50']:.0f} s ({x['reached']} of {x['runs']} runs arrive)" for x in (r, one))
            lines.append(
                f"- Training to {r['aim']:.0%} of the optimum on pairs of a known distribution: {r['draws']} draws "
                f"take {own}, one takes {other}: [curves](benchmarks/records/learning-cpu-2-cores.png)."
            )
        if r["op"] == "peak memory" and "ratio" in r:
            lines.append(f"- Peak memory, {r['dtype']}, batch {r['batch']}: {r['ratio']:.2f}x the peer's (fp32).")
    return sorted(lines)


def table() -> str:
    sections = []
    records = read_records()
    for device in sorted({r["device"] for r in records}):
        here = [r for r in records if r["device"] == device]
        one = find(here, op="sample") or here[0]
        versions = ", ".join(f"{name} {one['versions'][name]}" for name in ("torch", "dalle2-pytorch", "python"))
        sections.append(
            "\n".join(
                [
                    f"Times faster than dalle2-pytorch (fp32, eager), in the same run; our time in brackets. {device}; "
                    f"{versions}; {max(r['date'] for r in here)}.",
                    "",
                    *speed_table(here),
                    "",
                    *facts(here),
                    "",
                    *prior_stage_table(here),
                ]
            )
        )
    return "\n\n".join(sections)


def main() -> int:
    if "--summary" in sys.argv:
        print(summary(Path(sys.argv[sys.argv.index("--summary") + 1])))
        return 0
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(START)
    _, after = rest.split(END)
    wanted = f"{before}{START}\n{table()}\n{END}{after}"
    if "--check" in sys.argv:
        if wanted != text:
            print("README.md: the speed table is not what benchmarks/report.py makes of the records", file=sys.stderr)
        return int(wanted != text)
    README.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

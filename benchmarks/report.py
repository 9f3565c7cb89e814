"""Make the README's speed table from the records: `python benchmarks/report.py`; with `--check` only compare.

`--summary FILE` prints every measurement of a file of records beside its goals, and which of these were missed.
"""

import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
START, END = "<!-- speed table: made by benchmarks/report.py -->", "<!-- end of speed table -->"
PROVIDERS = {
    "drop-in": "drop-in, fp32",
    "sampler-float32": "`PriorSampler`, fp32",
    "sampler-bfloat16": "`PriorSampler`, bf16",
    "sampler-int8": "`PriorSampler`, bf16 with int8 steps",
}


MEASURED = {
    "p20", "p50", "p80", "runs", "ratio", "ratio_to_one", "ratio_to_best_other", "ratio_to_16_bits", "ratio_to_long",
    "share", "share_of_copy", "goal", "goals", "flops", "quick", "worst_cosine", "max_error", "floor_ms", "bytes",
    "peer_evaluations", "driver", "versions", "commit", "date", "lr", "reached", "curve", "open_s", "read_s",
    "before_mib", "config", "gain", "tried", "wrong", "refused", "slowdown", "slowdown_p99", "quiet_ratio", "quiet_s",
    "quiet_p99_s", "ratio_of_products",
}  # fmt: skip


AT_MOST = {"p50", "ratio_to_one", "slowdown", "slowdown_p99"}  # what goals limit; of anything else they are the least


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def latest(records: list[dict]) -> list[dict]:
    """The last record of each measurement; the files are appended to, so later lines are newer."""
    last = {}
    for record in records:
        key = tuple(sorted((name, str(value)) for name, value in record.items() if name not in MEASURED))
        last.pop(key, None)
        last[key] = record
    return list(last.values())


def _details(record: dict) -> str:
    known = MEASURED | {"op", "provider", "unit", "device"}
    return " ".join(f"{name}={value}" for name, value in record.items() if name not in known)


def missed(record: dict) -> list[str]:
    """The goals of a record's figures that it misses, in words."""
    lines = []
    for name, goal in (record.get("goals") or {}).items():
        value = record[name]
        if value > goal if name in AT_MOST else value < goal:
            unit = f" {record['unit']}" if name == "p50" else ""
            line = f"{record['op']}, {record['provider']} ({_details(record)}): "
            line += f"{name.replace('_', ' ')} {value:.3g}{unit}, goal {goal:g}{unit}"
            share = record.get("share", record.get("share_of_copy"))
            lines.append(line + (f"; {share:.0%} of the floor" if share is not None else ""))
    return lines


def summary(path: Path) -> str:
    """A line for each measurement: what, by whom, how much, and what was reached of the goals; then those missed."""
    lines, records = [], latest(read(path))
    for r in records:
        reached = [
            f"{name.replace('_', ' ')} {value:.3g}"
            for name, value in r.items()
            if name.startswith(("ratio", "share")) and value is not None
        ]
        goals = [f"goal: {name.replace('_', ' ')} {goal:g}" for name, goal in (r.get("goals") or {}).items()]
        goals += [f"goal {r['goal']}"] if r.get("goal") is not None else []  # of older records
        lines.append(f"{r['op']:30} {r['provider']:30} {r['p50']:10.4g} {r['unit']:8} " + "; ".join([*reached, *goals]))
        lines[-1] += f"  ({_details(r)})"
    if any(r.get("quick") for r in records):
        return "\n".join([*lines, "== goals: none, for with --quick nothing is measured"])
    return "\n".join([*lines, "== goals that were missed", *(line for r in records for line in missed(r) or ())])


def read_records() -> list[dict]:
    return latest([record for path in sorted((HERE / "records").glob("*.jsonl")) for record in read(path)])


def find(records: list[dict], **wanted) -> dict | None:
    return next((r for r in records if all(r.get(k) == v for k, v in wanted.items())), None)


def speed_table(records: list[dict]) -> list[str]:
    """Ratios to the eager peer of a 64-step run, and our time, per batch."""
    wanted = dict(op="sample", model="D2-small", steps=64)
    runs = [r for r in records if r.get("ratio") and all(r.get(k) == v for k, v in wanted.items())]
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


PEERS = {"D2-small": "dalle2-pytorch", "D2-large": "dalle2-pytorch", "PT-1B": "diffusers"}
ON_GPU = "sampler-bfloat16", "PriorPipeline, compiled", "PriorPipeline"  # ours of each family, in bf16


def gpu_tables(records: list[dict]) -> list[str]:
    """Whole runs and steps at batch 1 beside their goals; and ratios to the peers compiled in the same dtype."""
    ours = [r for r in records if r["provider"] in ON_GPU and r.get("dtype") == "bfloat16"]
    lines = [
        "| bf16, batch 1 | a run | goal | of the floor, a step | goal |",
        "|---|---|---|---|---|",
    ]
    for model in PEERS:
        run = next((r for r in ours if r["op"] == "sample" and r.get("model") == model and r.get("goals")), None)
        step = find(records, op="step", provider="sampler-bfloat16", model=model)
        cells = []
        for r, name, shown in ((run, "p50", lambda x: f"{x * 1e3:.3g} ms"), (step, "share", "{:.0%}".format)):
            cells += [_cell(shown(r[name]), not missed(r)), shown(r["goals"][name])] if r else ["", ""]
        what = f"{model}, {run['steps']} steps" if run else model
        what += f", guidance {run['cond_scale']:g}" if run and run["cond_scale"] != 1 else ""
        lines.append(f"| {what} | " + " | ".join(cells) + " |")
    ratios = [r for r in records if r["op"] == "ratio to compiled peer"]
    batches = sorted({r["batch"] for r in ratios})
    lines += [
        "",
        'Times faster than the peer in bf16 under `torch.compile(mode="reduce-overhead")`; in brackets the goal, and '
        "the same for our own network as PyTorch, compiled and (D2) replayed as a CUDA graph.",
        "",
        "| model, peer | guidance | " + " | ".join(f"batch {b}" for b in batches) + " |",
        "|---|---|" + "---|" * len(batches),
    ]
    for model, scale in sorted(
        {(r["model"], r["cond_scale"]) for r in ratios}, key=lambda k: ([*PEERS].index(k[0]), k)
    ):
        cells = []
        for batch in batches:
            own = [r for r in ratios if (r["model"], r["cond_scale"], r["batch"]) == (model, scale, batch)]
            r, bar = (
                next((r for r in own if r["provider"] in names), None) for names in (ON_GPU, ("reference compiled",))
            )
            cell = _cell(f"{r['ratio']:.3g}x", not missed(r)) + f" ({r['goals']['ratio']:g}x" if r else ""
            cells.append(cell + (f"; {bar['ratio']:.3g}x)" if r and bar else ")" if r else ""))
        guidance = "none" if scale == 1 else f"{scale:g}"
        lines.append(f"| {model}, {PEERS[model]} | {guidance} | " + " | ".join(cells) + " |")
    return lines


def _cell(text: str, reached: bool) -> str:
    return f"**{text}**" if reached else text


def _time(seconds: float) -> str:
    if seconds < 0.02:
        return f"{seconds * 1e3:.1f} ms"
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
        if r["op"] == "default run" and "ratio" in r:
            lines.append(
                f"- {PROVIDERS[r['provider']]}, {r['evaluations']} evaluations by default, at batch 1: "
                f"{_time(r['p50'])}, {r['ratio']:.3g}x the peer's 64 steps, "
                f"{r['ratio_to_16_bits']:.3g}x those under autocast to bf16, "
                f"{r['ratio_to_long']:.2f}x 63 evaluations of its own."
            )
        if r["op"] == "prefill" and "share" in r:
            share = f"{r['share']:.0%} of what the cores multiply"
            lines.append(f"- Prefill of {r['batch']} in {r['dtype']}: {_time(r['p50'])}, {share}.")
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
        if r["op"] == "beside busy processes" and "ratio" in r:
            lines.append(
                f"- {r['steps']} steps beside a busy process per core, {PROVIDERS[r['provider']]}: "
                f"{r['slowdown']:.2f}x the time without (p99 {r['slowdown_p99']:.2f}x), {r['ratio']:.3g}x the peer."
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
        driver = next((r["driver"] for r in here if r.get("driver")), None)
        packages = ("torch", "dalle2-pytorch", "python") if driver is None else one["versions"]
        versions = ", ".join(f"{name} {one['versions'][name]}" for name in packages)
        lines = [
            f"Times faster than dalle2-pytorch (fp32, eager), in the same run; our time in brackets. {device}; "
            f"{versions}; {max(r['date'] for r in here)}.",
            "",
        ]
        known = here
        if driver is not None:
            lines = [
                f"{device}, driver {driver}; {versions}; {max(r['date'] for r in here)}.",
                "",
                *gpu_tables(here),
                "",
            ]
            lines += ["Times faster than dalle2-pytorch (fp32, eager), in the same run; our time in brackets.", ""]
            known = [r for r in here if r["op"] not in ("step", "ratio to compiled peer")]  # stand in these tables
        lines += [*speed_table(here), "", *facts(known), "", *prior_stage_table(here)]
        sections.append("\n".join(lines))
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

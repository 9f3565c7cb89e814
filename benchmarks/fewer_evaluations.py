"""What fewer evaluations cost the demo priors: measures, and writes the record, the tables and the pictures of
docs/fewer-evaluations.md.

    python benchmarks/fewer_evaluations.py                  # all of it: an hour on a core
    python benchmarks/fewer_evaluations.py --only timing    # the milliseconds again, on a quiet machine
    python benchmarks/fewer_evaluations.py --only page      # the page from the record as it is
"""

import argparse
import copy
import itertools
import json
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import demo_priors
import torch
from demo_priors import Demo
from tqdm.auto import tqdm

import fastprior
from fastprior.cli.quality import draw
from fastprior.diffusion.diffusers_schedules import DiffusersSchedule
from fastprior.diffusion.solvers import StepTable, step_table
from fastprior.models import quality
from fastprior.pipelines.pipeline_quality import PipelineRuns
from fastprior.pipelines.prior_pipeline import PriorPipeline
from fastprior.pipelines.text_encoding import TextEncoding
from fastprior.prior import tuning
from fastprior.prior.sampling_quality import Measured, PriorRuns, Runs, Way, energy_distance, measure
from fastprior.serving.prior_sampler import PriorSampler
from fastprior.utils import atomic

ROOT = Path(__file__).parent.parent
RECORD, PAGE = ROOT / "benchmarks/records/fewer-evaluations.json", ROOT / "docs/fewer-evaluations.md"
DDIM, CHOICE = Way("ddim"), (8, 10, 12, 14, 16)  # the peer's default with 64 steps; numbers that could be the default
SDE = Way("sde-dpm++", "logsnr")
TOLERANCE = 0.05  # of steps in parallel, see `parallel`
KANDINSKY = dict(prediction_type="sample", clip_sample_range=5.0)  # of an UnCLIPScheduler


class Size:
    """How much is measured."""

    folder: Path
    names = demo_priors.NAMES
    quick = False
    ddim, counts, few = (7, 15, 24, 63), (4, 6, 8, 10, 12, 14, 16, 25), (8, 12, 16)
    scales, guidance, samples, truths = (1.0, 2.0, 3.0), (1.0, 4.0), 24, 64
    scheduler = (10, 25, 50)
    learned, tuned, of_fit = (4, 6, 8, 12), 256, {}  # evaluations, prompts, and other constants of a fit

    @classmethod
    def shrink(cls) -> None:
        """All of it in seconds, on priors that learned nothing."""
        cls.quick, cls.ddim, cls.counts, cls.few = True, (3, 20), (2, 8), (2,)
        cls.scales, cls.guidance, cls.samples, cls.truths, cls.scheduler = (1.0, 2.0), (1.0, 4.0), 2, 4, (10,)
        cls.learned, cls.tuned, cls.of_fit = (4,), 16, dict(STEPS=4, WITH_TIMES=2, JUDGED_EVERY=1, ODE_EVALUATIONS=20)

    @classmethod
    def demos(cls) -> Iterator[Demo]:
        for name in cls.names:
            if cls.quick:
                text = {key: t[:3] for key, t in demo_priors.prompts(name).items()}
                yield Demo(name, demo_priors.tiny(name), text)
            else:
                yield demo_priors.demo(name, cls.folder)


def ways() -> list[tuple[Way, int]]:
    """What is measured of every prior."""
    found = [(DDIM, count) for count in Size.ddim]
    found += [(Way(solver, "logsnr"), count) for solver in ("dpm++", "sde-dpm++") for count in Size.counts]
    others = [Way(solver, spacing) for solver in ("dpm++", "sde-dpm++") for spacing in ("trailing", "karras")]
    return found + [(way, count) for way in others for count in Size.few]


def pipeline_ways() -> list[tuple[Way, int]]:
    found = [(Way("scheduler"), count) for count in Size.scheduler]
    return found + [(Way(solver, "logsnr"), count) for solver in ("dpm++", "sde-dpm++") for count in Size.counts]


def as_plain(row: Measured) -> dict:
    values = {name: round(v, 4) if isinstance(v, float) else v for name, v in vars(row).items() if v is not None}
    return values | dict(way=str(row.way))


def as_measured(row: dict) -> Measured:
    return Measured(**row | dict(way=Way.parse(row["way"])))


def pipeline_of(demo: Demo) -> tuple[PriorPipeline, TextEncoding, TextEncoding]:
    """The same weights as a pipeline with Kandinsky's scheduler, its texts, and the one that stands for none."""
    net = demo.prior.net
    schedule = DiffusersSchedule(
        "UnCLIPScheduler", **KANDINSKY, num_train_timesteps=demo.prior.noise_scheduler.num_timesteps
    )

    def encoded(embeds: torch.Tensor, encodings: torch.Tensor) -> TextEncoding:
        return TextEncoding(embeds, encodings, encodings.ne(0).any(dim=-1))

    null = encoded(net.null_text_embed, net.null_text_encodings)
    return PriorPipeline(net.prior, schedule), encoded(demo.text["text_embed"], demo.text["text_encodings"]), null


def runs_of(demo: Demo, pipeline: bool) -> Callable[[float], Runs]:
    """The runs of a prior, or of its pipeline, at each scale."""
    if pipeline:
        built, text, null = pipeline_of(demo)
        return lambda scale: PipelineRuns(built, text, null if scale > 1 else None, Size.samples, scale, 0)
    return lambda scale: PriorRuns(demo.prior, demo.text, Size.samples, scale, 0)


def measure_quality(record: dict) -> None:
    """Energy distance to the long run, of each prior at each scale."""
    record["samples"], tables = Size.samples, record.setdefault("quality", {})
    for demo in Size.demos():
        tables[demo.name] = list(map(as_plain, measure(runs_of(demo, False), ways(), Size.scales)))
        yield


def measure_pipeline(record: dict) -> None:
    """The same of the PriorTransformer in a pipeline, beside the 25 steps of its scheduler."""
    for demo in Size.demos():
        if demo.name == "transformer":
            record["pipeline"] = list(map(as_plain, measure(runs_of(demo, True), pipeline_ways(), Size.guidance)))
    yield


def measure_truth(record: dict) -> None:
    """Energy distance to true images of the prompts, without guidance, of the long run and of the fewer ones."""
    tables = record.setdefault("truth", {})
    for demo in Size.demos():
        if Size.quick:
            continue  # three prompts of priors that learned nothing
        true, runs = demo_priors.images(demo.name, Size.folder, Size.truths), runs_of(demo, False)(1.0)
        rows = tables[demo.name] = []
        long = [(runs.long, runs.timesteps), (Way("dpm++", "trailing"), runs.timesteps)]
        for way, count in tqdm([*long, *ways()], desc=f"{demo.name}, to the data"):
            distance = 1e3 * energy_distance(runs.sample(way, count), true).mean().item()
            rows.append(dict(way=str(way), evaluations=count, distance=round(distance, 4)))
        yield


@contextmanager
def without_gate() -> Iterator[None]:
    """Quantised weights are judged, and taken whatever they are."""
    limits = quality.MEDIAN, quality.WORST
    quality.MEDIAN = quality.WORST = -1.0
    try:
        yield
    finally:
        quality.MEDIAN, quality.WORST = limits


def measure_int8(record: dict) -> None:
    """What quantised steps keep of trained priors' embeddings, on their prompts and on random ones."""
    tables = record.setdefault("int8", {})
    steps = {} if not Size.quick else dict(timesteps=20)
    runs = {"default": {}, "ddim 63": dict(timesteps=64, solver="ddim") | steps}
    runs["dpm++:logsnr 8"] = dict(timesteps=8, solver="dpm++", spacing="logsnr")
    for demo in Size.demos():
        if demo.name == "transformer":
            continue  # PriorSampler serves none
        rows = tables[demo.name] = []
        for kind, (run, options), prompts in (
            (kind, item, prompts)
            for kind in ("int8", "float8")
            for item in runs.items()
            for prompts in ("its own", "random")
        ):
            with without_gate():
                judged = demo.text if prompts == "its own" else None
                sampler = PriorSampler(demo.prior, compile=False, quantise=kind, quality_prompts=judged, **options)
            median, worst = (round(value, 5) for value in sampler.quality)
            passes = sampler.quality.median >= quality.MEDIAN and sampler.quality.worst >= quality.WORST
            rows.append(dict(kind=kind, run=run, prompts=prompts, median=median, worst=worst, passes=passes))
        yield


@contextmanager
def noted(of_fit: dict[str, int]) -> Iterator[dict]:
    """What `tuning.tune` finds within, and whether it is kept, which raises nothing here; constants may be others."""
    kept, found = {name: getattr(tuning, name) for name in (*of_fit, "judge")}, {}

    def judge(evaluations, held_out):
        found.update(held_out=held_out, passes=True)
        try:
            kept["judge"](evaluations, held_out)
        except ValueError:
            found.update(passes=False)

    vars(tuning).update(of_fit, judge=judge)
    try:
        yield found
    finally:
        vars(tuning).update(kept)


def measure_learned(record: dict) -> None:
    """What learned tables are worth on prompts that were held out, and how long a fit takes."""
    tables = record.setdefault("learned", {})
    for demo in Size.demos():
        if demo.name == "transformer":
            continue  # its pairs are those of the synthetic one
        rows, text = [], demo_priors.prompts(demo.name, Size.tuned)
        for most, count in itertools.product((1.0, 4.0), Size.learned):
            prior, begin = copy.deepcopy(demo.prior), time.perf_counter()
            with noted(Size.of_fit) as found:
                fastprior.tune(prior, text, count, scales=[(1.0, most)])
            row = dict(scales=[1.0, most], evaluations=count, passes=found["passes"], threads=torch.get_num_threads())
            for name in ("untuned", "learned"):  # of the scale at which each is the lowest
                figures = zip(*(getattr(one, name) for one in found["held_out"]))
                row[name] = [round(min(column), 5) for column in figures]
            rows.append(row | dict(seconds=round(time.perf_counter() - begin, 1)))
        tables[demo.name] = rows
        yield


@torch.no_grad()
def parallel(demo: Demo, table: StepTable, window: int, tolerance: float, seed: int) -> tuple[torch.Tensor, int, int]:
    """One sample by steps in parallel (Shih et al. 2023), with fixed noise; rounds one after the other, evaluations.

    A round evaluates a window of steps at once, where they were guessed to be, and goes through the steps again with
    what it found. The window moves on behind the first that ended elsewhere than before, by more than `tolerance` of an
    embedding's length: that one still began where it was evaluated.
    """
    rows, draw, dim = table.rows.float(), torch.Generator().manual_seed(seed), demo.prior.image_embed_dim
    text = {name: t[:1] for name, t in demo.text.items()}
    noise = torch.randn(1 + len(table), dim, generator=draw)
    path = noise[:1].repeat(len(table) + 1, 1)
    begin = rounds = evaluations = 0
    while begin < len(table):
        end = min(begin + window, len(table))
        times = torch.tensor(table.times[begin:end])
        text_cond = {name: t.expand(end - begin, *t.shape[1:]) for name, t in text.items()}
        x0 = demo.prior.net(path[begin:end], times, **text_cond)
        rounds, evaluations, moved = rounds + 1, evaluations + end - begin, []
        for i in range(begin, end):
            _, _, a, b, _, scale = rows[i]
            after = a * path[i] + b * x0[i - begin] + scale * noise[i + 1]
            moved.append((after - path[i + 1]).norm().item() > tolerance * dim**0.5)
            path[i + 1] = after
        path[end + 1 :] = path[end]
        begin += 1 + (moved.index(True) if True in moved else end - begin - 1)
    return path[-1], rounds, evaluations


def measure_parallel(record: dict) -> None:
    """How many rounds 63 steps need where windows of them run at once."""
    tables = record.setdefault("parallel", {})
    for demo in Size.demos():
        rows = tables[demo.name] = []
        for eta, window in itertools.product((0.0, 1.0), (8, 16)):
            steps = step_table(demo.prior.noise_scheduler, "ddim_trailing", max(Size.ddim), eta=eta)
            found, cosines = [], []
            for seed in range(2 if Size.quick else 16):
                one_by_one, *_ = parallel(demo, steps, 1, 0.0, seed)
                embed, *counts = parallel(demo, steps, window, TOLERANCE, seed)
                found.append(counts)
                cosines.append(torch.cosine_similarity(embed, one_by_one, dim=0).item())
            rounds, evaluations = (statistics.median(column) for column in zip(*found))
            worst = round(min(cosines), 5)
            rows.append(dict(eta=eta, window=window, rounds=rounds, evaluations=evaluations, worst=worst))
        yield


def measure_timing(record: dict) -> None:
    """Milliseconds of what was measured, and the frontier; nothing else is measured again."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    record["machine"] = dict(cpu=cpu[1] if cpu else platform.processor(), threads=torch.get_num_threads())
    for demo in Size.demos():
        tables = [(runs_of(demo, False), record["quality"][demo.name])]
        if demo.name == "transformer":
            tables.append((runs_of(demo, True), record["pipeline"]))
        for runs_at, plain in tables:
            for scale in dict.fromkeys(row["cond_scale"] for row in plain):
                rows = [(at, as_measured(row)) for at, row in enumerate(plain) if row["cond_scale"] == scale]
                runs_at(scale).time([row for _, row in rows])
                for at, row in rows:
                    plain[at] = as_plain(row)
        yield


def enough(rows: list[dict]) -> int | None:
    """The fewest evaluations of CHOICE that are no worse than 64-step DDIM at any scale; None where none are.

    No worse is a distance of at most DDIM's and the standard error that one long run has beside another: what chance
    alone gives.
    """
    for count in CHOICE:
        if all(count in found and found[count] <= limit for limit, found in compared(rows).values()):
            return count
    return None


def compared(rows: list[dict]) -> dict[float, tuple[float, dict[int, float]]]:
    """By scale: how far the default may be from the long run, and how far each of CHOICE is."""
    found = {}
    for scale in dict.fromkeys(row["cond_scale"] for row in rows):
        chance, *part = [row for row in rows if row["cond_scale"] == scale]
        of = {(row["way"], row["evaluations"]): row["distance"] for row in part}
        counts = {count: of[str(SDE), count] for count in CHOICE if (str(SDE), count) in of}
        found[scale] = of[str(DDIM), max(Size.ddim)] + chance["error"], counts
    return found


def markdown(titles: list[str], rows: list[list], left: int = 1) -> str:
    """A table whose columns but the first ones are numbers."""
    lines = [titles, ["---"] * left + ["--:"] * (len(titles) - left), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def quality_table(rows: list[dict]) -> str:
    """A line for each way and number: at each scale the distance, its error, and a star on the frontier."""
    scales = list(dict.fromkeys(row["cond_scale"] for row in rows))
    lines = {}
    for row in rows:
        of = lines.setdefault((row["way"], row["evaluations"]), {})
        star = "*" if row["is_frontier"] else ""
        of[row["cond_scale"]] = f"{row['distance']:.1f} ± {row['error']:.1f}{star}", row
    titles = ["solver", "evaluations", *(f"scale {scale:g}" for scale in scales), "worst cosine to the ODE", "ms"]
    body = []
    for (way, count), of in lines.items():
        worst = min((row["cosine_worst"] for _, row in of.values() if "cosine_worst" in row), default=None)
        times = " / ".join(f"{row['milliseconds']:.1f}" for _, row in of.values())
        body.append([f"`{way}`", count, *(of[s][0] for s in scales), "" if worst is None else f"{worst:.3f}", times])
    return markdown(titles, body)


def choice_table(tables: dict[str, list[dict]]) -> str:
    """Of each prior and scale what 64-step DDIM is at most, and the candidates; those that are no worse are bold."""
    body = []
    for name, rows in tables.items():
        for scale, (limit, found) in compared(rows).items():
            cells = [f"**{v:.1f}**" if v <= limit else f"{v:.1f}" for v in found.values()]
            body.append([name, f"{scale:g}", f"{limit:.1f}", *cells])
    counts = list(next(iter(compared(rows).values()))[1])
    return markdown(["prior", "scale", "DDIM, 63, and chance", *counts], body)


def truth_table(tables: dict[str, list[dict]]) -> str:
    """Of each way the distance to true images, a column for each prior."""
    ways = list(dict.fromkeys((row["way"], row["evaluations"]) for rows in tables.values() for row in rows))
    of = {(name, row["way"], row["evaluations"]): row["distance"] for name, rows in tables.items() for row in rows}
    body = [[f"`{way}`", count, *(f"{of[name, way, count]:.1f}" for name in tables)] for way, count in ways]
    return markdown(["solver", "evaluations", *tables], body)


def int8_table(tables: dict[str, list[dict]]) -> str:
    titles = ["prior", "steps", "run", "prompts", "median", "worst", "gate"]
    body = [
        [name, row["kind"], f"`{row['run']}`", row["prompts"], f"{row['median']:.5f}", f"{row['worst']:.5f}",
         "passes" if row["passes"] else "refused"] for name, rows in tables.items() for row in rows
    ]  # fmt: skip
    return markdown(titles, body, left=4)


def learned_table(tables: dict[str, list[dict]]) -> str:
    titles = ["prior", "scales", "evaluations", "dpm++:logsnr", "learned", "fit"]
    body = []
    for name, rows in tables.items():
        for row in rows:
            least, most = row["scales"]
            cells = [" / ".join(f"{v:.4f}" for v in row[kind]) for kind in ("untuned", "learned")]
            cells[1] += "" if row["passes"] else " (refused)"
            scales = f"{least:g}" if least == most else f"{least:g} to {most:g}"
            body.append([name, scales, row["evaluations"], *cells, f"{row['seconds']:.0f} s"])
    return markdown(titles, body, left=2)


def parallel_table(tables: dict[str, list[dict]]) -> str:
    titles = ["prior", "noise", "window", "rounds", "evaluations", "worst cosine"]
    body = [
        [name, "fixed" if row["eta"] else "none", row["window"], f"{row['rounds']:g}", f"{row['evaluations']:g}",
         f"{row['worst']:.4f}"] for name, rows in tables.items() for row in rows
    ]  # fmt: skip
    return markdown(titles, body, left=2)


def tables_of(record: dict) -> dict[str, str]:
    """The page's tables by the names of their places."""
    found = {name: quality_table(rows) for name, rows in record["quality"].items()}
    found |= {"default": choice_table(record["quality"]), "int8": int8_table(record["int8"])}
    found |= {"pipeline": quality_table(record["pipeline"]), "data": truth_table(record["truth"])}
    found |= {"parallel": parallel_table(record["parallel"]), "learned": learned_table(record["learned"])}
    machine = record["machine"]
    found["machine"] = (
        f"Milliseconds are of a run for one prompt on {machine['threads']} threads of a {machine['cpu']}."
    )
    return found


def filled(page: str, tables: dict[str, str]) -> str:
    """A page with what stands between `<!-- begin NAME -->` and `<!-- end -->` replaced. Raises KeyError for names."""
    return re.sub(
        r"(<!-- begin (\w+) -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}\n{tables[m[2]]}\n\n{m[3]}", page, flags=re.S
    )


def write_page(record: dict, page: Path) -> None:
    """The tables between the page's marks, and a picture of each prior beside it."""
    text = filled(page.read_text(encoding="utf-8"), tables_of(record))
    with atomic(page) as temporary:
        temporary.write_text(text, encoding="utf-8")
    for name, rows in record["quality"].items():
        shown = [row for row in map(as_measured, rows) if row.way.spacing in (None, "logsnr")]
        draw(shown, page.with_name(f"{page.stem}-{name}.png"))


PARTS = {
    "quality": measure_quality, "pipeline": measure_pipeline, "truth": measure_truth, "int8": measure_int8,
    "learned": measure_learned, "parallel": measure_parallel, "timing": measure_timing, "page": None,
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="what fewer evaluations cost the demo priors, and the page about it")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts, in this order (all)")
    parser.add_argument("--priors", type=Path, default=ROOT / "build/demo-priors", help="where they are, or are put")
    parser.add_argument("--names", nargs="+", choices=demo_priors.NAMES, help="measure these priors alone")
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--quick", action="store_true", help="try it out in seconds; give another --record and --page")
    args = parser.parse_args(argv)
    if args.quick:
        Size.shrink()
    Size.folder, Size.names = args.priors, args.names or Size.names
    record = json.loads(args.record.read_text(encoding="utf-8")) if args.record.exists() else {}
    record |= dict(fastprior=fastprior.__version__, torch=torch.__version__)
    for part, measure_part in PARTS.items():
        if part in args.only and measure_part:
            for _ in measure_part(record):
                with atomic(args.record) as temporary:  # as far as it is
                    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if "page" in args.only:
        write_page(record, args.page)
    for name, rows in record.get("quality", {}).items():
        print(f"{name}: {enough(rows)} evaluations are enough")
    return 0


if __name__ == "__main__":
    sys.exit(main())

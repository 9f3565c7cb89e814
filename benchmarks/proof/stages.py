"""What the proof runs: stages of groups of items. Items of a group run at once, groups one after the other."""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

CORES = os.cpu_count() or 1
WORKERS = max(2, CORES - 2)
MODELS = "D2-small", "D2-large", "PT-1B"
FAMILIES = "attention_backward", "attention_forward", "linear", "decode", "norm", "step", "barrier"
PATHS = (
    "sampler_float32", "sampler_bfloat16", "sampler_int8", "drop_in", "pipeline_float32", "pipeline_bfloat16",
    "training",
)  # fmt: skip
PEERS = dict(zip(MODELS, ("dalle2_pytorch", "dalle2_pytorch", "diffusers")))
COUNTERS = "SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats"


@dataclass(frozen=True)
class Item:
    """A process of its own.

    Attributes:
        command: with {work} for a folder that the archive takes, and {out} for that of the records.
        seconds: after which it is stopped.
        planned: seconds that it should take on 16 cores and an H200, with all kernels in the cache.
        needs: "module:NAME", "program:NAME", "record:OPERATION", or "not:REASON"; without them it is skipped.
        fills: whether it launches kernels that can be compiled ahead.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    planned: float
    needs: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    fills: bool = False


@dataclass(frozen=True)
class Stage:
    title: str
    seconds: float
    groups: tuple[tuple[Item, ...], ...]


def stages(device: str = "cuda") -> dict[int, Stage]:
    """On the CPU the same items, with more time for Triton's interpreter, and without those that only a GPU has."""
    on_gpu = device == "cuda"
    slow = 1 if on_gpu else 10
    only_gpu = () if on_gpu else ("not:needs a GPU",)
    pytest_options = ["-rs", "--device", device, *(() if on_gpu else ("--quick",))]
    few_threads = dict(OMP_NUM_THREADS="2", TORCHINDUCTOR_COMPILE_THREADS="2")
    own = few_threads if on_gpu else few_threads | dict(FASTPRIOR_KERNELS="triton")

    def item(name: str, *command: str, seconds: float, planned: float, **options) -> Item:
        start = (sys.executable, "-u", "benchmarks/proof/item.py")
        options = dict(environment=few_threads) | options
        return Item(name, (*start, *command), seconds * slow, planned, **options)

    def tests(name: str, node: str, *arguments: str, **options) -> Item:
        return item(name, "pytest", f"benchmarks/{node}", *pytest_options, *arguments, **options)

    def speed(name: str, *arguments: str, **options) -> Item:
        options = dict(environment=own) | options
        return item(name, "benchmarks/proof/speed.py", *arguments, **options)

    record = "--record", "{out}/records.jsonl"
    first = (
        item("versions", "benchmarks/proof/machine.py", seconds=20, planned=6),
        tests("bandwidth", "test_environment.py", *record, seconds=40, planned=12),
    )
    families = [
        tests(f"kernels {name}", f"proof/test_kernels.py::test_{name}", seconds=75, planned=planned, fills=True)
        for name, planned in zip(FAMILIES, (30, 20, 35, 30, 20, 15, 25))
    ]
    paths = [
        tests(
            f"path {name}", f"proof/test_paths.py::test_{name}", seconds=80, planned=planned, fills=True,
            environment=own,
        )
        for name, planned in zip(PATHS, (30, 30, 35, 25, 40, 40, 25))
    ]  # fmt: skip
    sanitizer = "compute-sanitizer", "--tool", "racecheck", "--error-exitcode", "9"
    race = Item(
        "racecheck of a split linear", (*sanitizer, sys.executable, "-u", "benchmarks/proof/one_launch.py"), 60, 40,
        (*only_gpu, "program:compute-sanitizer"), few_threads,
    )  # fmt: skip
    one = Stage("results", 120 * slow, (first, (*families, *paths, race)))

    runs = [
        speed(f"runs of {model}", "ours", model, seconds=70, planned=planned, fills=True)
        for model, planned in zip(MODELS, (30, 45, 50))
    ]
    needs = "module:dalle2_pytorch"
    eager = [
        speed(f"drop-in and eager peer, batch {batch}", "drop-in", str(batch), seconds=60, planned=30, needs=(needs,))
        for batch in (1, 8)
    ]
    compiled = [
        speed(
            f"compiled peer, {model}, batch {batch}", "peer", model, str(batch), seconds=170, planned=150,
            needs=(f"module:{PEERS[model]}",),
        )
        for model in MODELS
        for batch in ((1, 8, 64) if on_gpu else (64,))
    ]  # fmt: skip
    two = Stage("speed", 240 * slow, ((*runs, *eager), tuple(compiled)))

    quick = () if on_gpu else ("--quick",)
    profiles = [
        item(
            f"profile of {model}", "benchmarks/profile_step.py", "--device", device, "--out", "{work}",
            "--model", model, *quick, seconds=60, planned=30,
        )
        for model in MODELS
    ]  # fmt: skip
    ncu = "ncu", "--clock-control", "none", "--profile-from-start", "off"
    ncu += tuple(word for name in COUNTERS for word in ("--section", name))
    counters = Item(
        "counters of a step", (*ncu, sys.executable, "-u", "benchmarks/proof/one_launch.py", "step"), 75, 45,
        (*only_gpu, "program:ncu"), few_threads,
    )  # fmt: skip
    three = Stage(
        "why",
        280 * slow,
        (
            (*profiles, speed("compiled sampler", "compiled", seconds=110, planned=60)),
            (tests("grid barrier", "test_barrier.py", *record, seconds=60, planned=30),),
            (
                item(
                    "sweep of linears", "benchmarks/sweep.py", "--device", device, "--hot", *record, seconds=110,
                    planned=80, fills=True,
                ),
            ),
            (counters,),
            (
                tests(
                    "training", "test_training.py", *record, *(() if not on_gpu else ("--rounds", "3")), seconds=60,
                    planned=40, needs=(needs, "module:accelerate"),
                ),
            ),
            (
                item("roofline", "benchmarks/roofline.py", "{out}/records.jsonl", "{work}/roofline.png", seconds=20,
                     planned=5, needs=("module:matplotlib", "record:copy bandwidth")),
            ),
        ),
    )  # fmt: skip
    return {1: one, 2: two, 3: three}


def filling(known: dict[int, Stage], numbers: list[int]) -> Iterator[Item]:
    """The items of some stages whose kernels can be compiled ahead."""
    for number in numbers:
        for group in known[number].groups:
            yield from (item for item in group if item.fills)


def compilation(known: dict[int, Stage], numbers: list[int], capability: str) -> Stage:
    """Compile what is not in the cache for the GPU at hand, and launch nothing: so all cores may be busy."""
    items = [
        replace(
            item, name=f"compile for {item.name}", seconds=600, planned=120,
            environment=item.environment | dict(PROOF_FILL=f"{capability} {max(2, CORES // 4)}"),
        )
        for item in filling(known, numbers)
    ]  # fmt: skip
    return Stage("compilation, for there are no prepared kernels that fit", 600, (tuple(items),))


def plan(known: dict[int, Stage]) -> str:
    """Planned and longest times; those of a group are of its longest item, or of its items in turns of `WORKERS`."""
    lines = []
    for number, stage in known.items():
        total = 0.0
        lines.append(f"stage {number}: {stage.title}, at most {stage.seconds:.0f} s")
        for group in stage.groups:
            planned = max(item.planned for item in group)
            total += planned
            for item in group:
                lines.append(f"    {item.name:40} {item.planned:4.0f} s, at most {item.seconds:.0f} s")
            lines.append(f"    {'these at once':40} {planned:4.0f} s")
        lines.append(f"    {'planned':40} {total:4.0f} s")
    return "\n".join(lines)

"""Whole runs in bf16 on the device, recorded case by case as the benchmarks do, whose table reads them.

    speed.py ours MODEL       our graphs without torch.compile, at every batch size, with and without guidance; a step
    speed.py peer MODEL BATCH the peer under torch.compile (CUDA graphs) and ours, in turns
    speed.py drop-in BATCH    our eager prior and the eager peer in fp32, in turns
    speed.py compiled         our sampler compiled, and not

Several of these run at once; what is timed waits for its turn, so that no two are.
"""

import argparse
import contextlib
import copy
import fcntl
import functools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import kernel_cache
import places
import priors
import recording
import runs
import torch
from places import DEVICE
from timing import floor_share, op_seconds

from fastprior import PriorPipeline
from fastprior.diffusion.diffusers_schedules import DiffusersSchedule
from fastprior.kernels import ops
from fastprior.serving.measure import seconds
from fastprior.serving.prior_sampler import PriorSampler

BATCHES = (1, 64) if places.INTERPRETED else (1, 8, 64)
DTYPE = torch.float32 if places.INTERPRETED else torch.bfloat16
NAME = str(DTYPE).removeprefix("torch.")
SCALES = {"D2-small": (1.0, 3.0), "D2-large": (1.0, 3.0), "PT-1B": (1.0, runs.SCALE)}
ROUNDS = 10 if places.REAL else 1
EXACT = 0.999  # cosine of the median to fp32 on the reference


@contextlib.contextmanager
def turn() -> Iterator[None]:
    """Alone among the items of a stage."""
    with open(Path(os.environ.get("PROOF_WORK", "/tmp")) / "turn", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if places.REAL:
            torch.cuda.synchronize()
        yield


def record(op: str, provider: str, samples: list[float], unit: str = "s", **details) -> None:
    if kernel_cache.filling():
        return
    if not places.REAL:
        details["quick"] = True
    line = recording.line(op, provider, samples, unit, DEVICE, **details)
    recording.append(Path(os.environ["PROOF_OUT"]) / "records.jsonl", line)
    figures = ", ".join(f"{name} {details[name]:.3g}" for name in ("ratio", "share") if details.get(name) is not None)
    case = " ".join(f"{name}={details[name]}" for name in ("model", "batch", "cond_scale") if name in details)
    print(f"{op}, {provider} ({case}): {line['p50']:.4g} {unit} {figures}")


def check(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Speed counts only for the right result: the worst cosine."""
    cosine = torch.cosine_similarity(got.float(), wanted.float())
    if not kernel_cache.filling():
        assert cosine.median() >= (EXACT if places.REAL else 0.9), cosine
    return cosine.min().item()


def d2_run(model: str, batch: int, compile: bool = False) -> Callable[[float], torch.Tensor]:
    """A run of a warm sampler, by its guidance."""
    prior, steps = priors.ours(DEVICE, model), places.steps(64)
    options = dict(batch_sizes=(batch,), timesteps=steps, dtype=DTYPE, solver="ddim", compile=compile)
    sampler = places.with_graphs(PriorSampler(prior, graphs=False, **options))

    def run(scale: float) -> torch.Tensor:
        draw = torch.Generator(DEVICE).manual_seed(runs.SEED)
        return sampler(**priors.text(batch, DEVICE), cond_scale=scale, generator=draw)

    run(1.0)
    assert sampler.graphs, "the capture failed"
    return run


def pt_run(batch: int, prior=None) -> Callable[[float], torch.Tensor]:
    schedule = DiffusersSchedule("UnCLIPScheduler", **priors.UNCLIP)
    pipeline = PriorPipeline(pt_prior(DTYPE) if prior is None else prior, schedule, graphs=False, batch_sizes=(batch,))
    places.with_graphs(pipeline)
    tokens = priors.PT_1B["num_embeddings"]

    def run(scale: float) -> torch.Tensor:
        found = runs.by_pipeline(pipeline, batch, tokens, DEVICE, scale, steps=places.steps(25))
        assert pipeline.graphs, "the capture failed"
        return found

    return run


@functools.cache
def pt_prior(dtype: torch.dtype):
    return priors.pt_prior(DEVICE).to(dtype)


def exact(model: str, batch: int, scale: float) -> torch.Tensor:
    """In fp32 on the reference, without graphs."""
    with ops.using("reference"):
        if model != "PT-1B":
            return runs.our_run(priors.ours(DEVICE, model), batch, scale, DEVICE, places.steps(64))
        schedule, tokens = DiffusersSchedule("UnCLIPScheduler", **priors.UNCLIP), priors.PT_1B["num_embeddings"]
        pipeline = PriorPipeline(pt_prior(torch.float32), schedule, graphs=False)
        given = batch, tokens, DEVICE, scale, "reference"
        return runs.by_pipeline(pipeline, *given, steps=places.steps(25))


def details(model: str, batch: int, scale: float, **others) -> dict:
    steps = 25 if model == "PT-1B" else 64
    found = dict(model=model, batch=batch, cond_scale=scale, steps=places.steps(steps), dtype=NAME)
    return found | (dict(tokens=priors.PT_1B["num_embeddings"]) if model == "PT-1B" else {}) | others


def bytes_read(model: str) -> int:
    """Weights, in all steps of a run."""
    net = pt_prior(DTYPE) if model == "PT-1B" else priors.ours(DEVICE, model).net
    steps = places.steps(25) if model == "PT-1B" else places.steps(64) - 1
    return priors.step_weights(net) * DTYPE.itemsize * steps


def provider(model: str) -> str:
    return "PriorPipeline" if model == "PT-1B" else f"sampler-{NAME}"


def ours(model: str) -> None:
    for batch in map(priors.batch_size, BATCHES):
        run = pt_run(batch) if model == "PT-1B" else d2_run(model, batch)
        for scale in places.scales(*SCALES[model]):
            worst = check(run(scale), exact(model, batch, scale))
            if kernel_cache.filling():
                continue
            with turn():
                times = [seconds(functools.partial(run, scale), DEVICE) for _ in range(ROUNDS)]
                share = floor_share(times, bytes_read(model), DEVICE)
            judged = places.REAL and batch == 1 and scale == (runs.SCALE if model == "PT-1B" else 1.0)
            goals = dict(p50=priors.GOALS[model]["seconds"]) if judged else None
            figures = dict(worst_cosine=worst, share=share, goals=goals, compile=False)
            record("sample", provider(model), times, **details(model, batch, scale), **figures)
    a_step(model)


def a_step(model: str) -> None:
    """One step at batch 1 beside one read of the weights that it needs."""
    run, count, weights, tokens = priors.step_of(model, DTYPE, DEVICE, compile=False)
    run()
    if kernel_cache.filling():
        return
    read = weights * DTYPE.itemsize
    with turn():
        times = [s / count for s in op_seconds(lambda _: run(), [None], DEVICE)]
        share = floor_share(times, read, DEVICE)
    goals = dict(share=priors.GOALS[model]["share"]) if places.REAL else None
    figures = dict(bytes=read, flops=2 * weights * tokens, share=share, goals=goals, compile=False)
    record("step", f"sampler-{NAME}", [s * 1e3 for s in times], "ms", model=model, batch=1, dtype=NAME, **figures)


def peer(model: str, batch: int) -> None:
    goals_of, batch = {s: by[batch] for s, by in priors.GOALS[model]["ratios"].items()}, priors.batch_size(batch)
    start = time.perf_counter()
    if model == "PT-1B":
        from fastprior import accelerate_prior

        theirs = runs.stock(DEVICE).to(DTYPE)
        run = pt_run(batch, accelerate_prior(copy.deepcopy(theirs)))
        theirs.forward = torch.compile(theirs.forward, mode="reduce-overhead")
        tokens, name = priors.PT_1B["num_embeddings"], "diffusers compiled"

        def peer_run(scale, steps=None):
            return runs.in_diffusers(theirs, batch, tokens, DEVICE, scale, DTYPE)
    else:
        run = d2_run(model, batch)
        theirs, name = runs.compiled_peer(DEVICE, model, NAME), "peer compiled"

        def peer_run(scale, steps=None):
            return runs.peer_run(theirs, batch, scale, DEVICE, steps or places.steps(64))

    for scale in places.scales(*SCALES[model]):
        got = peer_run(scale, 4)
        compile_s = time.perf_counter() - start
        case = details(model, batch, scale)
        record("compile", name, [compile_s], **case)
        if model != "PT-1B":
            wanted = runs.peer_run(priors.peers(DEVICE, model), batch, scale, DEVICE, 4)
            assert torch.cosine_similarity(got, wanted).median() > 0.99, "the compiled peer is not the peer"
        run(scale)
        times, mine = [], []
        with turn():
            for number in range(min(ROUNDS, 4) + 1):
                once, own = (seconds(functools.partial(function, scale), DEVICE) for function in (peer_run, run))
                if number:  # the first warms up
                    times.append(once)
                    mine.append(own)
        ratio = statistics.median(a / b for a, b in zip(times, mine))
        record("sample", name, times, **case)
        goals = dict(ratio=goals_of[scale]) if places.REAL else None
        figures = dict(ratio=ratio, goals=goals, compile=False)
        record("ratio to compiled peer", provider(model), [ratio], "x", **case, **figures)
        start = time.perf_counter()


def drop_in(batch: int) -> None:
    """In fp32, 64 steps, by graphs (as by default from a shape's second run) and eagerly; of the peer's steps a few."""
    batch, steps, few = priors.batch_size(batch), max(places.steps(64), 5), 10 if places.REAL else 3
    mine, theirs = priors.pair(DEVICE)
    eager = copy.deepcopy(mine)
    mine.graphs, eager.graphs = True, False
    for scale in places.scales(1.0, 3.0):
        got, wanted = runs.our_run(eager, batch, scale, DEVICE, few), runs.peer_run(theirs, batch, scale, DEVICE, few)
        error = ((got - wanted).abs().max() / wanted.abs().max()).item()
        assert error <= 1e-3, f"not the peer's result: {error}"
        calls = {
            "drop-in": functools.partial(runs.our_run, mine, batch, scale, DEVICE, steps),
            "drop-in, eager": functools.partial(runs.our_run, eager, batch, scale, DEVICE, steps),
        }
        assert torch.equal(*(call() for call in calls.values())), "graphs give other bits than launches"
        theirs_s, times = [], {name: [] for name in calls}
        with turn():
            for _ in range(min(ROUNDS, 3)):
                once = seconds(functools.partial(runs.peer_run, theirs, batch, scale, DEVICE, few), DEVICE)
                theirs_s.append(once * (steps - 1) / (few - 1))
                for name, call in calls.items():
                    times[name].append(seconds(call, DEVICE))
        case = details("D2-small", batch, scale, dtype="float32")
        record("sample", "peer eager", theirs_s, **case, peer_evaluations=few - 1)
        for name, own in times.items():
            ratio = statistics.median(a / b for a, b in zip(theirs_s, own))
            record("sample", name, own, **case, ratio=ratio, max_error=error)


def compiled() -> None:
    start = time.perf_counter()
    run, plain = d2_run("D2-small", 1, compile=True), d2_run("D2-small", 1)
    case = details("D2-small", 1, 1.0)
    record("compile", f"sampler-{NAME}", [time.perf_counter() - start], **case)
    worst = check(run(1.0), exact("D2-small", 1, 1.0))
    with turn():
        times = {
            name: [seconds(functools.partial(function, 1.0), DEVICE) for _ in range(ROUNDS)]
            for name, function in (("compiled", run), ("plain", plain))
        }
        share = floor_share(times["compiled"], bytes_read("D2-small"), DEVICE)
    over = statistics.median(times["plain"]) / statistics.median(times["compiled"])
    print(f"! torch.compile makes a run of D2-small {over:.2f} times as fast as the same graphs without")
    goals = dict(p50=priors.GOALS["D2-small"]["seconds"]) if places.REAL else None
    record("sample", f"sampler-{NAME}", times["compiled"], **case, worst_cosine=worst, share=share, goals=goals)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("ours", "peer", "drop-in", "compiled"))
    parser.add_argument("arguments", nargs="*")
    options = parser.parse_args()
    if places.INTERPRETED:
        priors.shrink()
        torch.compile = functools.partial(torch.compile, backend="eager")
    functions = {"ours": ours, "peer": peer, "drop-in": drop_in, "compiled": compiled}
    arguments = [int(word) if word.isdecimal() else word for word in options.arguments]
    with places.as_on_gpu(), places.few_steps():
        functions[options.what](*arguments)


if __name__ == "__main__":
    main()

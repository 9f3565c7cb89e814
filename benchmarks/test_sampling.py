"""A whole 64-step DDIM run, prefill included, against dalle2-pytorch with the same weights and seeds.

Compilation and the null table are made before the clock starts; compile seconds are records of their own. Each round
times the peer first and us right after, so both see the same machine. At batch 8 and 64 the peer makes a few of its 63
evaluations and the rest is multiplied (`peer_evaluations` in the record), unless --full-peer is given.
"""

import copy
import functools
import statistics
import time

import priors
import pytest
import torch
from priors import D2, pair, text
from runs import SEED, compiled_peer, our_run, peer_run
from timing import cpu_peak, floor_bandwidth, floor_share, op_seconds

import fastprior
from fastprior.kernels import ops
from fastprior.models import snapshot
from fastprior.prior.loop import CachedSteps
from fastprior.serving.measure import read_bandwidth, seconds
from fastprior.serving.prior_sampler import PriorSampler

STEPS = priors.steps(64)
# floors to clear on 2 CPU cores: (dtype, cond_scale) -> batch -> how many times faster than the peer
CPU_GOALS = {
    ("float32", 1.0): {1: 3.5, 8: 12, 64: 18},
    ("float32", 3.0): {1: 7, 8: 24, 64: 36},
    ("bfloat16", 1.0): {1: 12, 8: 30, 64: 40},
}
PEER_STEPS = {1: STEPS, 8: priors.steps(10), 64: 3}
ROUNDS = {1: 3, 8: 3, 64: 2}


def skip_on_cpu(device, wanted: bool = False) -> None:
    """Only D2-small is measured there, steps of 8 bits where they pay, and of the peer compiled a part."""
    if not wanted and not priors.as_on_gpu(device):
        pytest.skip("would take many minutes on the CPU")


@functools.cache
def sampler(
    model: str, dtype: str, device, batch: int, samples_per_prompt: int = 1, backend: str | None = None
) -> tuple[PriorSampler, float]:
    """A warm sampler, and the seconds its compilation took. `backend`: see `ops.using`, which its runs need too."""
    ours, _ = pair(device, model)
    torch._dynamo.reset()
    built = PriorSampler(
        ours,
        batch_sizes=(batch,),
        timesteps=STEPS,
        dtype=torch.bfloat16 if dtype == "int8" else getattr(torch, dtype),
        quantise="int8" if dtype == "int8" else None,
        samples_per_prompt=samples_per_prompt,
        solver="ddim",
    )
    with ops.using(backend):
        return built, built.warmup()[batch]


@functools.cache
def reference(model: str, batch: int, cond_scale: float, device) -> torch.Tensor:
    """What every provider must give: our fp32 eager run, which is checked against the peer's below."""
    return our_run(pair(device, model)[0], batch, cond_scale, device)


def check(out: torch.Tensor, model: str, batch: int, cond_scale: float, device, dtype: str) -> float:
    """Speed counts only for the right result. Returns the worst cosine."""
    wanted = reference(model, batch, cond_scale, device)
    cosine = torch.cosine_similarity(out.float(), wanted)
    if dtype == "float32":
        assert (out - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    else:
        assert cosine.median() >= 0.999, cosine
    return cosine.min().item()


@pytest.mark.parametrize("provider", ["drop-in", "sampler-float32", "sampler-bfloat16", "sampler-int8"])
@pytest.mark.parametrize("cond_scale", [1.0, 3.0])
@pytest.mark.parametrize("batch", [1, 8, 64])
@pytest.mark.parametrize("model", D2)
def test_sampling(benchmark, record, device, request, model, provider, cond_scale, batch):
    skip_on_cpu(device, model == "D2-small" and (batch == 1 or provider != "sampler-int8"))
    ours, peer = pair(device, model)
    peer_steps = STEPS if request.config.getoption("--full-peer") else PEER_STEPS[batch]
    rounds = request.config.getoption("--rounds") or ROUNDS[batch]
    batch, at_batch_1 = priors.batch_size(batch), batch == 1
    dtype = "float32" if provider == "drop-in" else provider.removeprefix("sampler-")
    details = dict(model=model, batch=batch, cond_scale=cond_scale, steps=STEPS, dtype=dtype)
    if provider == "drop-in":
        our_run(ours, batch, cond_scale, device)

        def run():
            return our_run(ours, batch, cond_scale, device)
    else:
        built, compile_s = sampler(model, dtype, device, batch)
        record("compile", provider, [compile_s], **details)

        def run():
            generator = torch.Generator(device).manual_seed(SEED)
            return built(**text(batch, device), cond_scale=cond_scale, generator=generator)

    cosine = check(run(), model, batch, cond_scale, device, dtype)
    theirs, mine = [], []

    def time_peer():
        once = seconds(lambda: peer_run(peer, batch, cond_scale, device, peer_steps), device)
        theirs.append(once * (STEPS - 1) / (peer_steps - 1))

    benchmark.pedantic(lambda: mine.append(seconds(run, device)), setup=time_peer, rounds=rounds)
    ratio = statistics.median(a / b for a, b in zip(theirs, mine))
    read = priors.step_weights(ours.net) * getattr(torch, dtype).itemsize * (STEPS - 1)
    figures = dict(ratio=ratio, worst_cosine=cosine, share=floor_share(mine, read, device))
    if not priors.as_on_gpu(device):
        goal = CPU_GOALS.get((dtype, cond_scale), {}).get(batch)
        figures["goals"] = dict(ratio=goal) if goal else None
    elif at_batch_1 and cond_scale == 1 and provider == "sampler-bfloat16":
        figures["goals"] = dict(p50=priors.GOALS[model]["seconds"])
    record("sample", "peer eager", theirs, **details | dict(dtype="float32", peer_evaluations=peer_steps - 1))
    record("sample", provider, mine, **details, **figures)
    benchmark.extra_info.update(figures)


@pytest.mark.parametrize("cond_scale", [1.0, 3.0])
@pytest.mark.parametrize("batch", [1, 8, 64])
@pytest.mark.parametrize("model", D2)
def test_compiled_peer(benchmark, record, device, request, model, batch, cond_scale):
    """The peer under torch.compile, the other bar: on a GPU in bf16 too, with CUDA graphs.

    There our own network as compiled PyTorch, replayed as a CUDA graph as well, is a third one.
    """
    skip_on_cpu(device, model == "D2-small" and batch < 64 and cond_scale == 1)
    whole = priors.as_on_gpu(device)
    goal, batch = priors.GOALS[model]["ratios"][cond_scale][batch], priors.batch_size(batch)
    dtype = "bfloat16" if whole else "float32"
    peer = compiled_peer(device, model, dtype)
    peer_steps = STEPS if whole else 10
    start = time.perf_counter()
    got = peer_run(peer, batch, cond_scale, device, 4)
    compile_s = time.perf_counter() - start
    wanted = peer_run(pair(device, model)[1], batch, cond_scale, device, 4)
    if dtype == "float32":
        assert torch.allclose(got, wanted, atol=1e-3)
    assert torch.cosine_similarity(got, wanted).median() > 0.99
    details = dict(model=model, batch=batch, cond_scale=cond_scale, steps=STEPS)
    record("compile", "peer compiled", [compile_s], **details, dtype=dtype)
    # provider -> (dtype, backend)
    samplers = {"sampler-bfloat16": ("bfloat16", None)}
    samplers |= {"reference compiled": ("bfloat16", "reference")} if whole else {"sampler-float32": ("float32", None)}
    built = {
        name: (sampler(model, own, device, batch, backend=backend)[0], backend)
        for name, (own, backend) in samplers.items()
    }

    def run(name):
        run, backend = built[name]
        generator = torch.Generator(device).manual_seed(SEED)
        with ops.using(backend):
            return run(**text(batch, device), cond_scale=cond_scale, generator=generator)

    for name, (own, _) in samplers.items():
        check(run(name), model, batch, cond_scale, device, own)
    times = {name: [] for name in ("peer compiled", *built)}

    def round_():
        once = seconds(lambda: peer_run(peer, batch, cond_scale, device, peer_steps), device)
        times["peer compiled"].append(once * (STEPS - 1) / (peer_steps - 1))
        for name in built:
            times[name].append(seconds(lambda name=name: run(name), device))

    round_()  # building one sampler made dynamo forget the others
    for samples in times.values():
        samples.clear()
    benchmark.pedantic(round_, rounds=request.config.getoption("--rounds") or 3)
    record("sample", "peer compiled", times["peer compiled"], **details, dtype=dtype)
    for name, (own, _) in samplers.items():
        ratio = statistics.median(a / b for a, b in zip(times["peer compiled"], times[name]))
        goals = dict(ratio=goal) if whole and name == "sampler-bfloat16" else None
        benchmark.extra_info[f"{name}_ratio_to_compiled_peer"] = round(ratio, 2)
        read = priors.step_weights(pair(device, model)[0].net) * getattr(torch, own).itemsize * (STEPS - 1)
        figures = dict(ratio=ratio, share=floor_share(times[name], read, device), goals=goals)
        record("ratio to compiled peer", name, [ratio], "x", **details, dtype=own, **figures)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", priors.GOALS)
def test_share_of_the_floor(benchmark, record, device, request, model, dtype):
    """One step at batch 1 against one read of the weights it needs, at this machine's measured bandwidth."""
    skip_on_cpu(device, model == "D2-small")
    torch._dynamo.reset()
    backends = {f"sampler-{dtype}": None}
    backends |= {"reference compiled": "reference"} if priors.as_on_gpu(device) else {}
    made, bandwidths, steps = {}, [], {name: [] for name in backends}
    for name, backend in backends.items():
        with ops.using(backend):  # runs are prepared for one
            made[name] = priors.step_of(model, getattr(torch, dtype), device)
    _, _, weights, tokens = made[f"sampler-{dtype}"]
    read = weights * getattr(torch, dtype).itemsize

    def round_():
        bandwidths.append(floor_bandwidth(device) if device.type == "cuda" else read_bandwidth(device))
        for name, backend in backends.items():
            run, count, *_ = made[name]
            with ops.using(backend):
                steps[name] += [s / count for s in op_seconds(lambda _, run=run: run(), [None], device)]

    benchmark.pedantic(round_, rounds=request.config.getoption("--rounds") or 9)
    floor = read / statistics.median(bandwidths)
    details = dict(model=model, batch=1, dtype=dtype, bytes=read, flops=2 * weights * tokens)
    record("read bandwidth", "torch.sum" if device.type == "cpu" else "copy", [b / 1e9 for b in bandwidths], "GB/s")
    for name, samples in steps.items():
        share = floor / statistics.median(samples)
        judged = priors.as_on_gpu(device) and name == "sampler-bfloat16"
        goals = dict(share=priors.GOALS[model]["share"]) if judged else None
        record(
            "step", name, [s * 1e3 for s in samples], "ms", **details, floor_ms=floor * 1e3, share=share, goals=goals
        )
        benchmark.extra_info[f"{name}: share of the floor"] = round(share, 3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_best_of_4(benchmark, record, device, request, dtype):
    """Four candidates of one prompt against one sample: goal 1.3x the time."""
    one, four = (sampler("D2-small", dtype, device, 1, count)[0] for count in (1, 4))
    times = {1: [], 4: []}

    def round_():
        for count, run in ((1, one), (4, four)):
            times[count].append(seconds(lambda run=run: run(**text(1, device)), device))

    round_()  # building one sampler made dynamo forget the other
    for samples in times.values():
        samples.clear()
    benchmark.pedantic(round_, rounds=request.config.getoption("--rounds") or 7)
    ratio = statistics.median(b / a for a, b in zip(times[1], times[4]))
    details = dict(model="D2-small", batch=1, cond_scale=1.0, steps=STEPS, dtype=dtype)
    record("best of 4", f"sampler-{dtype}", times[4], **details, ratio_to_one=ratio, goals=dict(ratio_to_one=1.3))
    benchmark.extra_info.update(ratio_to_one=round(ratio, 3), goal=1.3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_default_run(benchmark, record, device, request, dtype):
    """The default run of a PriorSampler at batch 1, against 63 evaluations of its solver and the peer's 64-step DDIM.

    All of them take turns. Of the peer, which is eager, there are the run in fp32, as everywhere, and the one in bf16,
    under autocast.
    """
    skip_on_cpu(device, True)
    ours, peer = pair(device, "D2-small")
    torch._dynamo.reset()
    options, long = dict(batch_sizes=(1,), dtype=getattr(torch, dtype)), priors.steps(63)
    default = PriorSampler(ours, **options)
    table = default.plan.table
    same = dict(solver=table.solver, spacing=table.spacing)
    samplers = {"default": default, "long": PriorSampler(ours, timesteps=long, **options, **same)}

    def run(name: str) -> torch.Tensor:
        return samplers[name](**text(1, device), generator=torch.Generator(device).manual_seed(SEED))

    def run_peer(in_bf16: bool) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=in_bf16):
            return peer_run(peer, 1, 1.0, device, STEPS)

    generator = torch.Generator(device).manual_seed(SEED)
    exact = dict(timesteps=len(table), cond_scale=1.0, generator=generator, progress=False, **same)
    cosine = torch.cosine_similarity(
        run("default"), ours.p_sample_loop((1, ours.image_embed_dim), text(1, device), **exact)
    )
    assert cosine.item() >= (0.9999 if dtype == "float32" else 0.999), cosine
    runs = {name: functools.partial(run, name) for name in samplers}
    runs |= {"peer eager": functools.partial(run_peer, False), "peer eager, bf16": functools.partial(run_peer, True)}
    times = {name: [] for name in runs}

    def round_():
        for name, once in runs.items():
            times[name].append(seconds(once, device))

    round_()  # building one sampler made dynamo forget the other
    for samples in times.values():
        samples.clear()
    benchmark.pedantic(round_, rounds=request.config.getoption("--rounds") or 5)
    details = dict(model="D2-small", batch=1, cond_scale=1.0)
    figures = {
        name: statistics.median(b / a for a, b in zip(times["default"], times[other]))
        for name, other in (
            ("ratio", "peer eager"),
            ("ratio_to_16_bits", "peer eager, bf16"),
            ("ratio_to_long", "long"),
        )
    }
    goals = dict(ratio_to_long=3.5) | (dict(ratio_to_16_bits=100.0) if dtype == "bfloat16" else {})
    record("default run", "peer eager", times["peer eager"], **details, steps=STEPS, dtype="float32")
    record("default run", "peer eager, autocast", times["peer eager, bf16"], **details, steps=STEPS, dtype="bfloat16")
    record("default run", f"sampler-{dtype}", times["long"], **details, **same, evaluations=long, dtype=dtype)
    run_figures = dict(evaluations=len(table), dtype=dtype, worst_cosine=cosine.item(), **figures, goals=goals)
    record("default run", f"sampler-{dtype}", times["default"], **details, **same, **run_figures)
    benchmark.extra_info.update(figures)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch", [1, 8])
def test_prefill(benchmark, record, device, request, batch, dtype):
    """The prefix alone: what a run takes before its first step."""
    skip_on_cpu(device, True)
    prior, batch = copy.deepcopy(pair(device, "D2-small")[0]), priors.batch_size(batch)
    net, given = prior.net.to(getattr(torch, dtype)), text(batch, device)
    steps = CachedSteps(net, prior.sampling_plan(STEPS, 1.0, "ddim"))
    times = []

    @torch.no_grad()
    def prefill():
        with ops.sharing(), snapshot.running(net):  # as samplers do
            return steps.prefill(given, 1)

    prefill()
    benchmark.pedantic(
        lambda: times.append(seconds(prefill, device)), rounds=request.config.getoption("--rounds") or 15
    )
    *layers, (last, _) = net.causal_transformer.layers  # of which the last gives keys and values alone
    weights = sum(p.numel() for layer in (*layers, last.to_kv) for p in layer.parameters() if p.ndim == 2)
    flops, details = 2 * batch * net.prefix_tokens * weights, {}
    rate = flops / statistics.median(times)
    if device.type == "cpu":  # where bf16 is multiplied as fp32, unless there are instructions for it
        details = dict(share=rate / cpu_peak(), goals=dict(share=0.7 if dtype == "float32" else 0.6))
    record("prefill", f"sampler-{dtype}", times, model="D2-small", batch=batch, dtype=dtype, flops=flops, **details)
    benchmark.extra_info["TFLOP/s"] = round(rate / 1e12, 3)


def test_ddpm_1000_steps(benchmark, record, device):
    """The whole schedule at batch 1: the same embedding as the peer after 1000 steps, and how much sooner."""
    ours, peer = pair(device)
    wanted, steps = {}, priors.steps(1000)
    theirs = seconds(lambda: wanted.update(out=peer_run(peer, 1, 1.0, device, steps)), device)
    mine = []

    def run():
        mine.append(seconds(lambda: wanted.update(ours=our_run(ours, 1, 1.0, device, steps)), device))

    benchmark.pedantic(run, rounds=1)
    error = ((wanted["ours"] - wanted["out"]).abs().max() / wanted["out"].abs().max()).item()
    assert error <= 1e-4
    details = dict(model="D2-small", batch=1, cond_scale=1.0, steps=steps, dtype="float32")
    record("sample", "peer eager", [theirs], **details)
    record("sample", "drop-in", mine, **details, ratio=theirs / mine[0], max_error=error)
    benchmark.extra_info.update(ratio_to_peer=round(theirs / mine[0], 2), max_error_of_scale=error)


@pytest.mark.parametrize("model, millions", [("D2-small", 100.9), ("D2-large", 248.3), ("PT-1B", 1009.8)])
def test_models_have_the_size_they_claim(benchmark, model, millions):
    """Weights that a step reads; D2-small is the published example configuration."""
    if priors.quick:
        pytest.skip("they are tiny")

    def make():
        with torch.device("meta"):
            return priors.pt_prior("meta") if model == "PT-1B" else fastprior.DiffusionPriorNetwork(**D2[model])

    assert abs(priors.step_weights(benchmark.pedantic(make, rounds=1)) / 1e6 - millions) < 0.1

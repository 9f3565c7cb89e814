"""The grid barrier and the chain of products that measures it: results, the counter, what is compiled, and messages.

In the interpreter programs run one after the other, so that a barrier has one program there. That several meet is shown
by the counter, and by the instructions that a device would be given.
"""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from fastprior.kernels import reference
from fastprior.kernels.gpu import launch
from fastprior.kernels.gpu.barrier import (
    MODES,
    MODES_FROM_90,
    arrive,
    check_resident,
    matvec_chain_fwd,
    resident_programs,
    wait,
)
from helpers.kernel_checks import DEVICE, DTYPES, check, guarded, random
from helpers.processes import compiling

NEEDS_DEVICE = pytest.mark.skipif(DEVICE == "cpu", reason="needs a device")
NEEDS_90 = pytest.mark.skipif(
    DEVICE == "cpu" or torch.cuda.get_device_capability() < (9, 0), reason="needs compute capability 9.0"
)
MODES_HERE = [pytest.param(mode, marks=NEEDS_90) if mode == "dependent launches" else mode for mode in MODES]
H100 = SimpleNamespace(
    multi_processor_count=132,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
    shared_memory_per_multiprocessor=228 * 1024,
)


def make(phases: int, dim: int, dtype: torch.dtype) -> dict[str, Tensor]:
    return dict(x=random(dim), weights=random(phases, dim, dim, dtype=dtype, scale=dim**-0.5))


def run(x: Tensor, weights: Tensor, mode: str, programs: int, arrived: Tensor | None = None) -> Tensor:
    with guarded():
        out = launch.empty(weights.shape[:2], x)
        arrived = torch.zeros((), dtype=torch.int32, device=x.device) if arrived is None else arrived
        matvec_chain_fwd(x, weights, out, arrived, programs, mode)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("phases, dim", [(1, 1), (2, 16), (3, 40), (4, 130), (5, 520)], ids=str)
@pytest.mark.parametrize("mode", MODES_HERE)
def test_results(mode, phases, dim, dtype):
    inputs = make(phases, dim, dtype)
    programs = 1 if DEVICE == "cpu" and mode.startswith("barrier") else 7
    got = run(**inputs, mode=mode, programs=programs)
    chained = mode != "independent"
    exact = reference.matvec_chain(inputs["x"].double(), inputs["weights"].double(), chained=chained)
    check(got, exact, reference.matvec_chain(**inputs, chained=chained))


def test_the_comparison_rejects_a_phase_that_did_not_wait():
    inputs = make(3, 40, torch.float16)
    plain = reference.matvec_chain(**inputs)
    exact = reference.matvec_chain(inputs["x"].double(), inputs["weights"].double())
    x = torch.cat((plain[0, :33], torch.full_like(plain[0, 33:], float("nan"))))  # a program's rows are still missing
    early = reference.matvec_chain(x, inputs["weights"][1:])
    stale = reference.matvec_chain(inputs["x"].roll(1), inputs["weights"])
    for wrong in (torch.cat((plain[:1], early)), stale, -plain, reference.matvec_chain(**inputs, chained=False)):
        with pytest.raises(AssertionError, match="error"):
            check(wrong, exact, plain)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode.startswith("barrier")])
@pytest.mark.parametrize("programs", [1, pytest.param(64, marks=NEEDS_DEVICE)])
def test_the_counter_needs_no_reset(mode, programs):
    arrived = torch.zeros((), dtype=torch.int32, device=DEVICE)
    for phases in (3, 2, 1, 4):  # an odd number turns the sign for the next launch; two ahead has one phase more then
        inputs = make(phases, 130, torch.float16)
        got = run(**inputs, mode=mode, programs=programs, arrived=arrived)
        exact = reference.matvec_chain(inputs["x"].double(), inputs["weights"].double())
        check(got, exact, reference.matvec_chain(**inputs))
        assert arrived.item() in (0, -(2**31))


@triton.jit
def _arrivals_kernel(arrived_ptr, seen_ptr, order_ptr, programs):
    program = tl.load(order_ptr + tl.program_id(0))
    arrive(arrived_ptr, program, programs)
    tl.store(seen_ptr + tl.program_id(0), tl.load(arrived_ptr))


@pytest.mark.skipif(DEVICE != "cpu", reason="needs programs that run one after the other")
@pytest.mark.parametrize("programs", [1, 2, 7, 132])
def test_the_sign_turns_with_the_last_arrival_in_any_order(programs):
    arrived, seen = torch.zeros((), dtype=torch.int32), torch.zeros(programs, dtype=torch.int32)
    for epoch in range(4):
        before = arrived.item()
        assert before == (0, -(2**31))[epoch % 2]
        order = torch.randperm(programs, generator=torch.Generator().manual_seed(epoch)).int()
        _arrivals_kernel[(programs,)](arrived, seen, order, programs)
        turned = (seen ^ before) < 0
        assert turned.tolist() == [False] * (programs - 1) + [True]


@triton.jit
def _rounds_kernel(arrived_ptr, epoch_ptr, counter_ptr, rounds):
    epoch = tl.load(arrived_ptr)
    for number in range(rounds):
        arrive(arrived_ptr, tl.program_id(0), tl.num_programs(0))
        epoch = wait(arrived_ptr, epoch, tl.num_programs(0))
        tl.store(epoch_ptr + number, epoch)
        tl.store(counter_ptr + number, tl.load(arrived_ptr))


def test_the_epoch_turns_with_the_counter():
    """An epoch that fell behind would let every other barrier pass, or none."""
    arrived, epochs, counters = (torch.zeros(n, dtype=torch.int32, device=DEVICE) for n in (1, 5, 5))
    _rounds_kernel[(1,)](arrived, epochs, counters, 5)
    assert epochs.tolist() == counters.tolist() == [-(2**31), 0, -(2**31), 0, -(2**31)]


COMPILE = """
import json
from fastprior.kernels.gpu import launch
import compilations
import resources
from cases import barrier_cases

found = []
for arch in resources.ARCHITECTURES:
    with launch.recording() as recorded:
        for case in barrier_cases(arch):
            case()
    for variant in dict.fromkeys(recorded):
        compiled = compilations.compile_variant(variant, arch)
        given = dict(variant.constants, arch=arch, num_warps=variant.num_warps, ptx=compiled.asm["ptx"])
        found.append(compilations.measure(compiled) | given)
print(json.dumps(found))
"""
WEIGHTS, VECTOR = r"ld\.global\.L1::evict_first", r"ld\.global\.cg"
ARRIVE, WAIT = r"(?:red|atom)\.global\.gpu\.(?:release|acq_rel)\.add", r"ld\.acquire\.gpu\.global"
BARRIER = r"(?:bar|barrier)\.sync"
LAUNCH_NEXT, AFTER_LAST = r"griddepcontrol\.launch_dependents", r"griddepcontrol\.wait"


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    done = compiling("-c", COMPILE)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def order(ptx: str, *instructions: str) -> str:
    """The given instructions in the order in which they stand, a letter each from `a`, runs of one as one."""
    found = re.finditer("|".join(f"({instruction})" for instruction in instructions), ptx)
    return re.sub(r"(.)\1+", r"\1", "".join("abcdefgh"[match.lastindex - 1] for match in found))


@pytest.mark.slow
def test_every_mode_compiles_and_fits(compiled):
    for arch in (80, 90, 100):
        records = [record for record in compiled if record["arch"] == arch]
        # the first of the dependent launches waits for what came before, and has options of its own
        assert len(records) == (len(MODES) - len(MODES_FROM_90) if arch == 80 else len(MODES) + 1)
        for record in records:
            if record["BARRIER"]:
                resources = record["registers"], record["shared"], record["num_warps"]
                check_resident(132, *resources, H100)  # one on each multiprocessor
            if record["DEPENDENT"]:  # and the next launch fits beside this one
                assert record["registers"] * record["num_warps"] * 32 * 2 <= 65536


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [0, 1, 2])
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_a_barrier_releases_then_acquires_and_weights_that_are_ahead_come_between(compiled, arch, ahead):
    chosen = [r["ptx"] for r in compiled if (r["arch"], r["BARRIER"], r["AHEAD"]) == (arch, True, ahead)]
    if arch == 80 and ahead == 2:
        assert not chosen
        return
    (ptx,) = chosen
    # a weights, b vector, c result, d threads meet, e arrive, f wait; a phase's own sum meets in shared memory
    seen = order(ptx, WEIGHTS, VECTOR, r"st\.global", BARRIER, ARRIVE, WAIT)
    start, result = len(seen) - len(seen.lstrip("a")), seen.index("c")
    cycle = seen[result:] + seen[start:result]  # the body of a loop may begin anywhere in it
    assert cycle.startswith("cdeafd" if ahead else "cdefd"), seen
    assert order(ptx, WEIGHTS, VECTOR).startswith("ab"), seen
    assert seen.count("c") == seen.count("e") == seen.count("f") == max(ahead, 1)
    assert len(re.findall(r"mov\.u32\s+seen, %tid\.x", ptx)) == max(ahead, 1)  # one thread polls


@pytest.mark.slow
@pytest.mark.parametrize("arch", [90, 100])
def test_a_dependent_launch_reads_weights_before_it_waits_and_the_vector_after(compiled, arch):
    (ptx,) = {r["ptx"] for r in compiled if r["arch"] == arch and r["DEPENDENT"]}
    assert order(ptx, LAUNCH_NEXT, WEIGHTS, AFTER_LAST, VECTOR) == "abcd"


@pytest.mark.parametrize(
    "registers, shared, num_warps, each",
    [(32, 0, 4, 16), (120, 2048, 16, 1), (65, 2048, 16, 1), (64, 2048, 16, 2), (255, 0, 4, 2), (16, 114 * 1024, 1, 1),
     (16, 113 * 1024, 1, 2), (16, 0, 1, 32)],
)  # fmt: skip
def test_how_many_programs_fit(registers, shared, num_warps, each):
    assert resident_programs(registers, shared, num_warps, H100) == 132 * each


def test_more_programs_than_fit_are_refused_with_the_numbers():
    check_resident(132, 120, 2048, 16, H100)
    with pytest.raises(ValueError, match="programs=133; .* 132 fit on 132 multi.* 120 registers .* 2048 bytes .* 16 w"):
        check_resident(133, 120, 2048, 16, H100)


@pytest.mark.skipif(DEVICE != "cpu", reason="needs the interpreter")
def test_the_interpreter_refuses_a_barrier_of_several_programs():
    with pytest.raises(ValueError, match="programs=2; a barrier takes one in the interpreter"):
        run(**make(2, 16, torch.float16), mode="barrier", programs=2)


@NEEDS_DEVICE
def test_the_device_refuses_more_programs_than_fit():
    with pytest.raises(ValueError, match="programs=8192; a barrier needs all of them at once"):
        run(**make(1, 8192, torch.float16), mode="barrier", programs=8192)


def test_messages():
    inputs = make(2, 16, torch.float16)
    with pytest.raises(ValueError, match="mode='fast'; it must be one of 'independent', 'launches'"):
        run(**inputs, mode="fast", programs=1)
    with pytest.raises(ValueError, match=r"x has shape \(9,\); it must be \(16,\)"):
        run(random(9), inputs["weights"], mode="launches", programs=1)
    with pytest.raises(ValueError, match=r"weights has strides \(256, 1, 16\); it must be contiguous"):
        run(inputs["x"], inputs["weights"].mT, mode="launches", programs=1)

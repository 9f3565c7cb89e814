"""What judges a step by its compiled code: the rules of early launches, the walk through machine code, the model."""

import json
import re

import pytest
import torch

pytest.importorskip("triton")
import program
import ptx
import step_model
from machine_code import parse
from meta_runs import DEPTHS
from step_trace import STEPS, Launch, Operation, trace
from walk import begin, walk

from helpers.processes import PROOF, compiling

RECORDS = sorted(step_model.RECORDS.glob("step-model-triton-*.json"))
NAMES = ["x_ptr", "w_ptr", "out_ptr", None]


def kernel(*lines: str) -> str:
    """A kernel in PTX whose registers %rd1, %rd2 and %rd3 hold its three pointers, and %r4 a number."""
    loads = [f"ld.param.b64 %rd{n + 1}, [f_param_{n}];" for n in range(3)] + ["ld.param.b32 %r4, [f_param_3];"]
    return ".visible .entry f(\n.param .u64 f_param_0\n)\n{\n.reg .pred %p<9>;\n" + "\n".join([*loads, *lines]) + "\n}"


WAIT, READ_W, READ_X = "griddepcontrol.wait;", "ld.global.v4.b32 {%r5, %r6, %r7, %r8}, [%rd2 + 16];", (
    "ld.global.cg.b32 %r9, [ %rd1 + 0 ];"
)  # fmt: skip
STORE = "st.global.b32 [ %rd3 + 0 ], { %r9 };"
RULES = {  # lines, what is read before the wait, how many stores come before it, whether it always waits
    "weights, wait, vector": ((READ_W, WAIT, READ_X, STORE, "ret;"), {"w_ptr"}, 0, True),
    "the vector first": ((READ_W, READ_X, WAIT, STORE, "ret;"), {"w_ptr", "x_ptr"}, 0, True),
    "a store first": ((STORE, WAIT, "ret;"), set(), 1, True),
    "an atomic first": (("atom.global.gpu.acq_rel.add.u32 %r5, [%rd3 + 0], 1;", WAIT, "ret;"), {"out_ptr"}, 1, True),
    "a copy to shared memory": (("cp.async.cg.shared.global [ %r5 + 0 ], [ %rd2 + 0 ], 0x10, %r4;", WAIT, "ret;"),
                                {"w_ptr"}, 0, True),
    "an address that was computed": (("mul.wide.s32 %rd5, %r4, 4;", "add.s64 %rd6, %rd1, %rd5;",
                                      "ld.global.b32 %r5, [%rd6];", WAIT, "ret;"), {"x_ptr"}, 0, True),
    "one that was loaded": (("ld.global.b64 %rd7, [%rd2];", "ld.global.b32 %r5, [%rd7 + 0];", WAIT, "ret;"),
                            {"w_ptr", ptx.UNKNOWN}, 0, True),
    "a choice of arguments": (("mov.b64 %rd5, f_param_0;", "mov.b64 %rd6, f_param_1;",
                               "selp.b64 %rd7, %rd5, %rd6, %p1;", "ld.param.b64 %rd8, [%rd7];",
                               "ld.global.b32 %r5, [%rd8];", WAIT, "ret;"),
                              {"x_ptr", "w_ptr"}, 0, True),
    "a way around the wait": (("@%p1 bra $L1;", WAIT, "$L1:", READ_X, STORE, "ret;"), {"x_ptr"}, 1, False),
    "a read on one of two ways": (("@%p1 bra $L1;", READ_X, "$L1:", WAIT, STORE, "ret;"), {"x_ptr"}, 0, True),
    "a wait under a guard": ((f"@%p1 {WAIT}", READ_X, "ret;"), {"x_ptr"}, 0, False),
    "a block that lies behind": (("bra.uni $L2;", "$L1:", WAIT, STORE, "ret;", "$L2:", READ_X, "bra.uni $L1;"),
                                 {"x_ptr"}, 0, True),
    "a loop before it": (("$L1:", READ_W, "@%p1 bra $L1;", WAIT, READ_X, "ret;"), {"w_ptr"}, 0, True),
    "shared memory": (("st.shared.b32 [%r5], %r6;", "ld.shared.b32 %r7, [%r5];", WAIT, "ret;"), set(), 0, True),
    "comments": (("// st.global.b32 [%rd3], %r1;", WAIT, "ret;"), set(), 0, True),
}  # fmt: skip


@pytest.mark.parametrize("lines, reads, stores, waits", RULES.values(), ids=RULES)
def test_what_comes_before_a_wait(lines, reads, stores, waits):
    text = kernel(*lines)
    assert ptx.loads_before_wait(text, NAMES) == reads
    assert len(ptx.stores_before_wait(text)) == stores
    assert ptx.waits(text) == waits


def test_what_a_kernel_reads_and_writes():
    text = kernel(READ_W, WAIT, READ_X, STORE, "ret;")
    assert ptx.reads(text, NAMES) == {"x_ptr", "w_ptr"} and ptx.writes(text, NAMES) == {"out_ptr"}
    assert ptx.loads_before_wait(kernel(READ_W, READ_X, "ret;"), NAMES) == {"x_ptr", "w_ptr"}  # it never waits


def code(*lines: tuple) -> list:
    """Machine code: each line is an instruction, and of its control bits `stall`, `sets` and `waits` for counters."""
    text = []
    for number, line in enumerate(lines):
        words, control = (line, {}) if isinstance(line, str) else line
        mask = sum(1 << counter for counter in control.get("waits", ()))
        bits = control.get("stall", 1) | 1 << 4 | control.get("sets", 7) << 5 | 7 << 8 | mask << 11
        text += [f"        /*{16 * number:04x}*/   {words} ;   /* 0x{0:016x} */", f"   /* 0x{bits << 41:016x} */"]
    return parse("\n".join(text))


SIGNATURE = (("x_ptr", "*fp32"), ("BLOCK", "constexpr"), ("count", "i32"), ("w_ptr", "*bf16"))
X, COUNT, W = "c[0x0][0x210]", "c[0x0][0x218]", "c[0x0][0x220]"


def followed(lines: tuple, fixed: set[str] = frozenset({"w_ptr"}), threads: int = 32, **integers) -> program.Program:
    state = begin(SIGNATURE, dict(count=3) | integers, threads)
    found = program.run(walk(code(*lines), state), frozenset(fixed), threads // 32, 1)
    assert not state.guessed
    return found


def loop(*body) -> tuple:
    start = "IMAD.MOV.U32 R0, RZ, RZ, RZ", f"LDC.64 R2, {X}", "ULDC.64 UR4, c[0x0][0x208]"
    turn = "VIADD R0, R0, 0x1", f"ISETP.GE.AND P0, PT, R0, {COUNT}, PT", "@!P0 BRA 0x30", "EXIT"
    return (*start, *body, *turn)


LOAD = "LDG.E.128 R4, desc[UR4][R2.64]", dict(sets=0)
USE = "FADD R8, R4, R4", dict(waits=(0,))


@pytest.mark.parametrize("count", [1, 3, 40])
def test_a_loop_turns_as_often_as_its_integers_say(count):
    found = followed(loop(LOAD, USE), count=count)
    assert found.loads == {frozenset({"x_ptr"}): [0, 16 * 32 * count]} and found.products == count
    assert found.trips == count  # each load is asked for when the one before was waited for
    assert count * program.L2_CLOCKS < found.clocks < count * (program.L2_CLOCKS + 20) + 60
    assert followed(loop(LOAD), count=count).trips == 1


def test_loads_that_are_asked_for_together_are_one_trip():
    two = "LDG.E.128 R12, desc[UR4][R2.64+0x10]", dict(sets=1)
    both = "FADD R8, R4, R12", dict(waits=(0, 1))
    assert followed(loop(LOAD, two, both), count=1).trips == 1
    assert followed(loop(LOAD, USE, two, both), count=1).trips == 2


def test_copies_to_shared_memory_are_waited_for_by_groups():
    copy = "LDGSTS.E.BYPASS.128 [R9], desc[UR4][R2.64]", ("LDGDEPBAR", dict(sets=0))
    assert followed(loop(*copy, ("DEPBAR.LE SB0, 0x0", {})), count=6).trips == 6
    assert followed(loop(*copy, ("DEPBAR.LE SB0, 0x2", {})), count=6).trips == 2  # three groups are under way


@pytest.mark.parametrize("few, threads", [(8, 8), (0x100, 64)])
def test_masked_threads_read_nothing(few, threads):
    mask = "S2R R1, SR_TID.X", f"ISETP.LT.AND P1, PT, R1, {few:#x}, PT"
    found = followed((f"LDC.64 R2, {W}", *mask, "@P1 LDG.E R4, desc[UR4][R2.64]", "EXIT"), threads=64)
    assert found.loads == {frozenset({"w_ptr"}): [0, 4 * threads]}


def test_a_wait_parts_what_is_asked_for():
    weights = "LDG.E.128 R12, desc[UR4][R6.64]", dict(sets=1)
    product = "HMMA.16816.F32.BF16 R12, R12, R4, RZ", dict(waits=(0, 1))
    start = f"LDC.64 R2, {X}", f"LDC.64 R6, {W}", "PREEXIT", weights
    found = followed((*start, "ACQBULK", LOAD, USE, product, "BAR.SYNC.DEFER_BLOCKING 0x0", "EXIT"))
    x, w = frozenset({"x_ptr"}), frozenset({"w_ptr"})
    assert found.waits and found.loads == {w: [512, 0], x: [0, 512]} and found.asked[w] == 1 and found.stores == 0
    assert (found.early_trips, found.trips, found.barriers, found.tensor) == (1, 1, 1, 1)
    assert found.release < 0 and found.prologue < program.L2_CLOCKS  # it asks, and does not wait
    # its weights are there, for all that a program can tell; who needs them waits for the vector first
    assert program.L2_CLOCKS <= found.first <= found.last < found.clocks < program.DRAM_CLOCKS
    early = followed((*start, ("STG.E desc[UR4][R2.64], R9", {}), "ACQBULK", "EXIT"))
    assert early.stores == 1
    late = followed((*start, LOAD, USE, product, "EXIT"))
    assert not late.waits and late.loads[w] == [0, 512] and late.clocks > program.DRAM_CLOCKS


def test_what_is_not_known_goes_on_below():
    lines = f"LDC.64 R2, {X}", ("ATOMG.E.ADD.STRONG.GPU PT, R5, desc[UR4][R2.64], R5", dict(sets=0)), (
        "ISETP.NE.U32.AND P2, PT, R5, 0x2, PT", dict(waits=(0,))), "@P2 EXIT", LOAD, USE, "EXIT"  # fmt: skip
    state = begin(SIGNATURE, dict(count=1), 32)
    found = program.run(walk(code(*lines), state), frozenset(), 1, 1)
    assert state.guessed == {0x30} and found.trips == 2 and found.products == 1


ARITHMETIC = {  # an instruction that writes R0, of R1 = 100 and R2 = -3, and what it writes
    "IMAD R0, R1, R2, R1": -200,
    "IADD3 R0, R1, -R2, 0x5": 108,
    "LEA R0, R1, R2, 0x2": 397,
    "LEA.HI R0, R2, R1, RZ, 0x1": 101,
    "SHF.R.S32.HI R0, RZ, 0x1, R2": -2,
    "SHF.R.U32.HI R0, RZ, 0x1f, R2": 1,
    "SHF.L.U32 R0, R1, 0x1e, RZ": 0,
    "LOP3.LUT R0, R1, 0x7, RZ, 0xc0, !PT": 4,
    "LOP3.LUT R0, R1, 0x3, R2, 0xfe, !PT": -1,
    "SEL R0, R1, R2, !PT": -3,
    "VIMNMX R0, R1, R2, PT": -3,
    "VIADDMNMX R0, R1, R2, 0x60, !PT": 97,
    "SGXT R0, R1, 0x7": -28,
    "IABS R0, R2": 3,
    "IADD3.X R0, R1, ~R2, RZ, P0, !PT": 102 + 1,  # P0 from 0 - 0, which carries
    "IMAD.X R0, R1, 0x1, R2, P0": 98,
    "IMAD.HI.U32 R0, R2, R1, RZ": 99,
    "HFMA2.MMA R0, -RZ, RZ, 0, 5.9604644775390625e-08": 1,
    "F2I.FTZ.U32.TRUNC.NTZ R0, R3": 7,
}


@pytest.mark.parametrize("line, wanted", ARITHMETIC.items(), ids=ARITHMETIC)
def test_arithmetic(line, wanted):
    start = "IMAD.MOV.U32 R1, RZ, RZ, 0x64", "VIADD R2, RZ, -0x3", "IMAD.MOV.U32 R3, RZ, RZ, 0x40e00000"
    start += ("IADD3 R4, P0, RZ, -R5, RZ",) if "P0" in line else ()
    start = ("IMAD.MOV.U32 R5, RZ, RZ, RZ", *start)
    state = begin((), {}, 4)
    list(walk(code(*start, line, "EXIT"), state))
    assert int(state.values["R0"]) == wanted % 2**32


def judged(**changes) -> step_model.Judged:
    done = dict(waits=True, prologue=200.0, clocks=1000.0, first=300.0, last=300.0, release=-150.0) | changes
    own = {name: done.pop(name) for name in ("before", "after", "registers", "dependent") if name in done}
    measured = dict(registers=own.get("registers", 64), shared=1024, spilled=0, tensor_cores="")
    resident = 65536 // (measured["registers"] * 256)
    reads = own.get("before", 0.0), own.get("after", 0.0)
    return step_model.Judged(
        measured, program.Program(**done), 132, 8, own.get("dependent", True), resident, *reads, (), 0, 0, ()
    )


def seconds(*nodes) -> float:
    return step_model.timeline(nodes)[-1] / len(nodes)


def test_the_time_of_launches_one_after_the_other():
    alone = dict(waits=False, prologue=0.0, dependent=False, release=None)
    clocks = 1000 / program.CLOCK
    assert seconds(*[judged(**alone)] * 4) == pytest.approx(step_model.ORDINARY_SECONDS + clocks)
    assert seconds(*[judged()] * 4) == pytest.approx(step_model.DEPENDENT_SECONDS + clocks)
    operation = Operation("aten::add", 43 * 10**6, ())
    assert seconds(operation) == pytest.approx(step_model.ORDINARY_SECONDS + 10e-6)


def test_the_time_of_launches_that_memory_holds_up():
    """Weights are read while the launch before runs, if there is room for both; never faster than memory gives."""
    read = 43e6  # 10 us
    assert seconds(*[judged(before=read)] * 4) == pytest.approx(10e-6)
    hidden, crowded = judged(before=5e6), judged(before=5e6, registers=200)
    assert seconds(*[hidden] * 4) == pytest.approx(seconds(*[judged()] * 4))
    assert seconds(*[crowded] * 4) > seconds(*[hidden] * 4) + 0.3e-6
    late = seconds(*[judged(after=read)] * 4)
    assert late > 10e-6 + step_model.DEPENDENT_SECONDS
    slow = judged(before=2e6, prologue=9000.0)
    assert seconds(*[slow] * 4) > 9000 / program.CLOCK / 2  # two at once


LAUNCHES = """
import json
import torch, triton, triton.language as tl
from cases import meta
from fastprior.kernels.gpu import launch
import step_model

@triton.jit
def _first_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), 1.0)

@triton.jit
def _second_kernel(x_ptr, w_ptr, out_ptr, count, each, AT: tl.constexpr, WAIT: tl.constexpr, BLOCK: tl.constexpr):
    k = tl.arange(0, BLOCK)
    tl.extra.cuda.gdc_launch_dependents()
    w = tl.load(w_ptr + k)
    if AT == "early":
        w += tl.load(x_ptr + k)
    elif AT == "store":
        tl.store(out_ptr + k, w)
    if WAIT:
        tl.extra.cuda.gdc_wait()
    for turn in range(tl.cdiv(count, each)):
        w += tl.load(x_ptr + turn * BLOCK + k)
    tl.store(out_ptr + k, w)

def step(at="", wait=True, count=7, each=3):
    x, w, out = meta(4096), meta(256), meta(256)
    def run():
        launch.launch(_first_kernel, (1,), x, BLOCK=256, num_warps=2, num_stages=1)
        launch.launch(_second_kernel, (1,), x, w, out, count, each, AT=at, WAIT=wait, BLOCK=256, num_warps=2,
                      num_stages=1, dependent=True)
    return step_model.judge_step(run)["launches"][1]

found = {name: step(*args)["broken"] for name, args in dict(
    right=(), early=("early",), store=("store",), never=("", False)).items()}
turns = {}
for count, each in ((7, 3), (6, 3), (1, 5), (100, 7)):
    line = step("", True, count, each)
    turns[f"{count}/{each}"] = line["products"], line["trips"], line["early_bytes"], line["guessed"]
print(json.dumps([found, turns]))
"""


@pytest.mark.slow
def test_launches_that_break_a_rule_are_found(tmp_path):
    (tmp_path / "ruled.py").write_text(LAUNCHES)
    done = compiling(str(tmp_path / "ruled.py"))
    assert done.returncode == 0, done.stderr[-3000:]
    found, turns = json.loads(done.stdout)
    assert found["right"] == []
    assert found["early"] == ["reads before its wait what the step writes: x_ptr"]
    assert [text.split(":")[0] for text in found["store"]] == ["writes before its wait"] * len(found["store"]) != []
    assert "it can end without a wait" in found["never"]
    # a division is followed to its end: four numbers of a thread are added in each turn
    wanted = {"7/3": 3, "6/3": 2, "1/5": 1, "100/7": 15}
    assert {name: line[0] // 4 for name, line in turns.items()} == wanted
    assert all(line[2:] == [1024, 0] for line in turns.values()), turns
    assert turns["100/7"][1] > turns["1/5"][1]


@pytest.mark.parametrize(
    "model, a_layer, last, around", [("D2-small", 4, 4, 2), ("D2-large", 5, 5, 2), ("PT-1B", 5, 5, 3)]
)
def test_steps_of_dependent_launches_are_kernels_alone(model, a_layer, last, around):
    """A layer is four where attention and projection are one; around them are the entry, the head and the solver."""
    run, steps = STEPS["dependent launches"](model)
    nodes = trace(run)
    assert all(isinstance(node, Launch) for node in nodes)
    assert [node.dependent for node in nodes] == [False] + [True] * (len(nodes) - 1)
    assert len(nodes) == steps * (a_layer * (DEPTHS[model] - 1) + last + around)


CHAIN = """
import json
import torch
from cases import meta
from fastprior.kernels.gpu import barrier
import step_model

def run(mode):
    x, out, arrived = meta(1664), meta(40, 1664), meta(dtype=torch.int32)
    weights = meta(40, 1664, 1664, dtype=torch.bfloat16)
    found = step_model.judge_step(lambda: barrier.matvec_chain_fwd(x, weights, out, arrived, 132, mode))
    return found["step_us"], found["floor_us"], found["launches"][-1]

print(json.dumps({mode: run(mode) for mode in ("launches", "dependent launches")}))
"""


@pytest.mark.slow
def test_dependent_launches_of_the_chain_of_products():
    done = compiling("-c", CHAIN)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    (plain, floor, _), (early, _, line) = found["launches"], found["dependent launches"]
    assert floor < early < plain
    assert line["broken"] == line["narrow"] == [] and line["guessed"] == 0
    assert (line["early_trips"], line["late_bytes"]) == (1, 0)
    assert 1 <= line["trips"] <= 2  # some versions of the assembler ask for the vector in two parts
    assert line["early_bytes"] == 1664 * 1664 * 2 // 128  # of 128 programs, one on each multiprocessor
    assert line["early_loads"] * 16 * 32 * line["num_warps"] >= line["early_bytes"]


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_record_is_of_the_model_of_now_and_breaks_no_rule(path):
    record = json.loads(path.read_text())
    assert record["constants"] == json.loads(json.dumps(step_model.constants()))
    kinds = {(step["model"], step["step"]) for step in record["steps"]}
    assert kinds == {(model, name) for model in step_model.MODELS for name in step_model.STEPS}
    for step in record["steps"]:
        assert step["floor_us"] < step["step_us"]
        assert sum(line["count"] for line in step["launches"]) + sum(step["operations"].values()) == step["nodes"]
        for line in step["launches"]:
            assert line["broken"] == [], line
        text = step_model.show(step)
        assert f"{step['step_us']:.0f} us" in text and len(text.splitlines()) > len(step["launches"]) + 1


def test_there_is_a_record_for_each_version_that_resources_are_recorded_for():
    versions = {re.search(r"triton-(.+)\.", path.name)[1] for path in step_model.RECORDS.glob("resources/*.jsonl")}
    assert {path.stem.removeprefix("step-model-triton-") for path in RECORDS} == versions


AGREES = """
import json, sys
import step_model
from step_trace import STEPS, Launch, trace, written
import ptx

found = {}
for name, make in STEPS.items():
    run, steps = make("D2-small")
    nodes = trace(run)
    launches = [node for node in nodes if isinstance(node, Launch)]
    by_step = written(nodes, lambda node: ptx.writes(step_model.compiled(node.variant)[2], node.pointers))
    for node in (launches[-1], launches[-3]):  # two that are short
        line = step_model.identify(node.variant, 90) | step_model.columns(step_model.judge(node, by_step))
        found.setdefault(name, []).append(line | dict(key=step_model.key(node.variant, 90)))
print(json.dumps(found))
"""


@pytest.mark.slow
def test_the_record_says_what_is_compiled():
    if not step_model.DEFAULT_RECORD.exists():
        pytest.skip(f"there is no {step_model.DEFAULT_RECORD.name}: python {PROOF / 'step_model.py'} --record")
    record = json.loads(step_model.DEFAULT_RECORD.read_text())
    done = compiling("-c", AGREES)
    assert done.returncode == 0, done.stderr[-3000:]
    recorded = {step["step"]: step["launches"] for step in record["steps"] if step["model"] == "D2-small"}
    for name, lines in json.loads(done.stdout).items():
        for line in lines:
            same = [{key: one[key] for key in line} for one in recorded[name] if one["key"] == line["key"]]
            assert line in same, line


def test_a_tensor_that_shares_memory_with_another_is_known_by_it():
    whole = torch.empty(4, 4, device="meta")
    assert step_model.storage(whole[1:].t()) == step_model.storage(whole) != step_model.storage(whole.clone())

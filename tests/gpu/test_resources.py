"""Every configuration that the wrappers can choose compiles, fits its chip and keeps its limits: without a GPU."""

import functools
import json
import os
import random

import compilations
import pytest
import resources
import torch
from cases import meta

from fastprior.kernels.arguments import LinearArgs
from fastprior.kernels.gpu import attend_project, attention, barrier, decode, launch, linear, norm, skinny_linear, step
from fastprior.kernels.reference import NormArgs, StepArgs
from helpers.processes import PROOF, compiling

RECORDS = sorted(resources.RECORDS.glob("*.jsonl"))


@pytest.fixture(scope="module")
def checked():
    return compiling(str(PROOF / "resources.py"))


@pytest.mark.slow
def test_every_launch_compiles_and_fits(checked):
    assert checked.returncode == 0, checked.stdout[-5000:] + checked.stderr[-2000:]
    columns, *rows = (line.split("\t") for line in checked.stdout.splitlines() if "\t" in line)
    lines = [dict(zip(columns, row)) for row in rows]
    assert {int(line["arch"]) for line in lines} == set(resources.ARCHITECTURES)
    kernels = {line["kernel"] for line in lines}
    for module in (attend_project, attention, barrier, decode, linear, norm, skinny_linear, step):
        own = {name for name in vars(module) if name.endswith("_kernel")}
        assert own and own <= kernels, f"{own - kernels} is never compiled"


@pytest.mark.slow
def test_every_launch_keeps_its_limits(checked):
    if not resources.DEFAULT_RECORD.exists():
        pytest.skip(" ".join(checked.stdout.splitlines()[-2:]))  # names the file, and the command that makes it
    assert "PROBLEM" not in checked.stdout
    assert "not judged" not in checked.stdout


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_record_spills_what_is_known_and_nothing_else_is_known(path):
    version, record = path.stem.removeprefix("triton-"), resources.read_record(path)
    assert len(record) == len(path.read_text().splitlines()), "two lines are of one variant"
    for line in record.values():
        limit = max(resources.known_spill(line, version), resources.OWN_ACCORD if line["registers"] < 240 else 0)
        assert line["spilled"] <= limit, line
    for spill in resources.SPILLS_KNOWN:
        spilled = [line["spilled"] for line in record.values() if spill.is_of(line)]
        assert max(spilled, default="no kernel") == spill.limits.get(version, 0), spill


def measured(**changes) -> dict:
    line = dict(kernel="_some_kernel", arch=90, pointers="fp32*2", constants="BLOCK=64", num_warps=4, num_stages=1)
    return line | dict(registers=100, shared=1024, spilled=0, tensor_cores="", key="now") | changes


def record_of(**changes) -> dict:
    line = measured(**changes)
    return {tuple(line[name] for name in resources.IDENTITY): line}


SPILLING = dict(registers=255, spilled=64)
REPORTED = {  # what was measured, what the record says, and the problem
    "clean": ({}, record_of(), ""),
    "better than the record": ({}, record_of(registers=120, spilled=16, key="before"), ""),
    "spill": (SPILLING, record_of(key="before"), "spills registers: 64 bytes"),
    "spill that was recorded": (SPILLING, record_of(**SPILLING), "SPILLS_KNOWN and OWN_ACCORD let it spill 0"),
    "spill without a record": (SPILLING, None, ""),
    "little spilled where little was": (dict(spilled=16), record_of(spilled=16, key="before"), ""),
    "little spilled where nothing was": (dict(spilled=16), record_of(key="before"), "16 bytes, recorded 0"),
    "little spilled by a new kernel": (dict(spilled=16), {}, ""),
    "spill by a new kernel": (SPILLING, {}, "spills registers"),
    "fewer programs": (dict(registers=160), record_of(key="before"), "for 3 programs a multiprocessor, recorded 4"),
    "more registers, no fewer programs": (dict(registers=104), record_of(registers=97, key="before"), ""),
    "wrong record": ({}, record_of(registers=99), "the record is wrong: registers 100, recorded 99"),
    "too large": (dict(shared=2**18), None, "shared memory beyond"),
    "no tensor cores": (dict(tensor_cores=compilations.MISSED), None, "does not use the tensor cores"),
}


@pytest.mark.parametrize("changes, record, text", REPORTED.values(), ids=REPORTED)
def test_what_is_reported(changes, record, text):
    found = resources.problem(measured(**changes), record, judged=record is not None)
    assert text in found and bool(text) == bool(found)


@pytest.mark.parametrize("recorded, text", [(64, ""), (56, "64 bytes, recorded 56")])
def test_a_known_spill_is_let_pass_where_it_is_recorded(monkeypatch, recorded, text):
    known = resources.Spill("_some_kernel", ("fp32",), "BLOCK", {resources.VERSION: 64}, "a reason")
    monkeypatch.setattr(resources, "SPILLS_KNOWN", (known,))
    found = resources.problem(measured(**SPILLING), record_of(registers=255, spilled=recorded, key="before"))
    assert text in found and bool(text) == bool(found)


@pytest.mark.slow
def test_a_kernel_that_spills_or_misses_the_tensor_cores_is_reported(tmp_path):
    (tmp_path / "bad.py").write_text("""
import json, sys
import triton, triton.language as tl
from fastprior.kernels.gpu import launch
import resources
from cases import meta

@triton.jit
def greedy(x_ptr, y_ptr, BLOCK: tl.constexpr):  # 512 numbers a thread, all of them needed after the last is there
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, x * tl.sum(x, axis=0))

@triton.jit
def large(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, tl.dot(x, tl.trans(x), input_precision="ieee"))

with launch.recording() as recorded:
    for kernel, block in ((greedy, 16384), (large, 32)):
        launch.launch(kernel, (1,), meta(block), meta(block), num_warps=1, num_stages=1, BLOCK=block)
lines = resources.check([(variant, 90) for variant in recorded], judged=True)
print(json.dumps([line["problem"] for line in lines]))
""")
    done = compiling(str(tmp_path / "bad.py"))
    spills, misses = json.loads(done.stdout or done.stderr)
    assert spills.startswith("spills registers: ")
    assert misses == "has a dot product and does not use the tensor cores"


KERNEL = '''
import triton, triton.language as tl

NUMBER = tl.constexpr(2)

@triton.jit
def _twice(x):
    return x * NUMBER

@triton.jit
def _copy_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """A copy."""
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, _twice(tl.load(x_ptr + at)))
'''
CHECK = """
import importlib, json, linecache, sys
from pathlib import Path
from fastprior.kernels.gpu import launch
import compilations
import resources
from cases import meta

def job(source, block=64):
    Path(folder, "copied.py").write_text(source)
    sys.modules.pop("copied", None)
    importlib.invalidate_caches()
    linecache.clearcache()
    with launch.recording() as recorded:
        kernel = importlib.import_module("copied")._copy_kernel
        launch.launch(kernel, (1,), meta(block), meta(block), num_warps=1, num_stages=1, BLOCK=block)
    return recorded[0], 90

def check(*arguments, **options):
    (line,) = resources.check(*arguments, **options)
    return line

folder = sys.argv[1]
sys.path.insert(0, folder)
sys.dont_write_bytecode = True  # what is imported is the file as it is now
source = Path(folder, "source.py").read_text()
path = Path(folder, "kept.json")
plain = job(source)
keys = dict(
    plain=resources.key(*plain),
    again=resources.key(*job(source)),
    comments=resources.key(*job(source.replace("A copy", "Copies").replace("NUMBER =", "# of times\\nNUMBER ="))),
    callee=resources.key(*job(source.replace("x * NUMBER", "NUMBER * x"))),
    value=resources.key(*job(source.replace("constexpr(2)", "constexpr(3)"))),
    constant=resources.key(*job(source, block=128)),
    arch=resources.key(plain[0], 80),
)
first = check([plain], None, compilations.Kept(path))
again = check([job(source)], None, compilations.Kept(path))
changed = check([job(source.replace("x * NUMBER", "x * x"))], None, compilations.Kept(path))
full = check([job(source)], None, compilations.Kept(path), full=True)
origins = dict(first=first["origin"], again=again["origin"], changed=changed["origin"], full=full["origin"])

def record(**changes):
    line = {name: first[name] for name in (*resources.IDENTITY, *resources.MEASURED, "key")} | changes
    resources.write_record(Path(folder, "record.jsonl"), [line])
    return resources.read_record(Path(folder, "record.jsonl"))

in_sample = next(day for day in range(1000) if resources.sampled(first["key"], day))
beside = next(day for day in range(1000) if not resources.sampled(first["key"], day))
wrong = record(registers=first["registers"] + 1)
found = {}
for name, lines, day, kept in (
    ("right", record(), beside, None), ("right, in the sample", record(), in_sample, None),
    ("wrong, in the sample", wrong, in_sample, None), ("wrong, kept", wrong, beside, compilations.Kept(path)),
    ("of before", record(key="before"), beside, None),
):
    line = check([plain], lines, kept, day=day)
    found[name] = line["origin"], line["problem"].split(":")[0]
print(json.dumps([keys, origins, found]))
"""


@pytest.mark.slow
def test_what_did_not_change_is_not_compiled_again(tmp_path):
    (tmp_path / "source.py").write_text(KERNEL)
    done = compiling("-c", CHECK, str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    keys, origins, found = json.loads(done.stdout)
    plain = keys.pop("plain")
    assert {name for name, key in keys.items() if key == plain} == {"again", "comments"}
    assert origins == dict(first="compiled", again="cache", changed="compiled", full="compiled")
    assert found == {
        "right": ["record", ""],
        "right, in the sample": ["compiled", ""],
        "wrong, in the sample": ["compiled", "the record is wrong"],
        "wrong, kept": ["cache", "the record is wrong"],
        "of before": ["compiled", ""],
    }


def test_the_sample_takes_each_line_in_its_turn():
    keys = [f"{number:016x}" for number in range(1000)]
    assert all(0.02 < sum(resources.sampled(key, day) for key in keys) / len(keys) < 0.08 for day in range(10))
    assert all(any(resources.sampled(key, day) for day in range(365)) for key in keys)


KEPT = {"a": dict(zip(compilations.MEASURED, (32, 0, 0, ""))), "b": dict(zip(compilations.MEASURED, (64, 8, 0, "")))}


@pytest.mark.parametrize("content", ["", '{"a": [32, 0, 0', "[]", '{"a": [1]}', '{"a": 1}', "\xff"], ids=repr)
def test_a_file_of_results_that_is_not_whole_is_made_again(tmp_path, content):
    path = tmp_path / "kept.json"
    path.write_bytes(content.encode("latin1"))
    kept = compilations.Kept(path)
    assert kept.measured == {}
    kept.add(KEPT)
    assert compilations.Kept(path).measured == KEPT
    assert os.listdir(tmp_path) == ["kept.json"]


def test_processes_that_write_at_once_leave_the_results_of_both(tmp_path):
    one, other = compilations.Kept(tmp_path / "new" / "kept.json"), compilations.Kept(tmp_path / "new" / "kept.json")
    one.add({"a": KEPT["a"]})
    other.add({"b": KEPT["b"]})
    assert compilations.Kept(tmp_path / "new" / "kept.json").measured == KEPT


def configuration(variant: launch.Variant) -> tuple:
    """What the launchers choose by shape: tiles, warps and stages, for elements of this size. Flags are not part."""
    tiles = tuple((name, value) for name, value in variant.constants if name.startswith("BLOCK") or name == "ROWS")
    first = next(kind for _, kind in variant.signature if kind.startswith("*"))
    return variant.kernel.__name__, first in ("*fp32",), tiles, variant.num_warps, variant.num_stages


def any_launch(draw: random.Random) -> None:
    """One call of some launcher, with any shape, dtype and options."""
    dtype, rows, dim = draw.choice(launch.FLOATS), draw.randint(1, 300), draw.randint(1, 4096)
    heads, dim_head, flag = draw.randint(1, 40), draw.randint(16, 128), draw.random() < 0.5
    kind = draw.choice(["norm", "step", "linear", "decode", "attention"])
    x, gain = meta(rows, dim, dtype=dtype), meta(dim)
    if kind == "norm":
        options = dict(eps=1e-5, stable=flag, rms=draw.random() < 0.5, l2=draw.random() < 0.5)
        args = NormArgs(x, gain, gain if flag else None, None, x if flag else None, **options, dtype=dtype)
        norm.layer_norm_fwd(args)
        needs = dict(need_dx=True, need_dgain=flag, need_dbias=False)
        norm.layer_norm_bwd(NormArgs(x, gain, **options), x, None, **needs)
    elif kind == "step":
        table, index, state = meta(9, 6), meta(dtype=torch.int64), meta(rows, dim)
        clamp = draw.choice([None, "range", "l2"])
        step.diffusion_step_fwd(StepArgs(state, x, None, meta(), state, state, table, index, clamp))
    elif kind == "linear":
        rows, outputs = draw.randint(1, 64), 2 * draw.randint(1, 9000)
        dim = draw.randint(1, 9000)
        weight = meta(outputs, dim, dtype=dtype)
        gain = meta(dim) if rows <= linear.MAX_NORM_ROWS and flag else None
        activation = draw.choice([None, "gelu", "swiglu"])
        linear.linear_fwd(LinearArgs(meta(rows, dim, dtype=dtype), weight, norm_gain=gain, activation=activation))
    elif kind == "decode":
        suffix, prefix, cached = draw.randint(1, 8), draw.randint(1, 2048), draw.choice(launch.FLOATS)
        kv_heads = draw.choice([1, heads])
        q, k = meta(rows, suffix, heads, dim_head, dtype=dtype), meta(rows, suffix, kv_heads, dim_head, dtype=dtype)
        cache = meta(rows, prefix, kv_heads, dim_head, dtype=cached)
        decode.decode_attention_fwd(q, k, k, cache, cache, None, None, None, None, 1.0, flag)
    else:
        batch, keys, kv_heads = draw.randint(1, 64), draw.randint(1, 2048), draw.choice([1, heads])
        seq = draw.choice([keys, draw.randint(1, keys)])
        q, k = meta(batch, seq, heads, dim_head, dtype=dtype), meta(batch, keys, kv_heads, dim_head, dtype=dtype)
        bias = meta(seq, heads, keys, dtype=dtype) if flag else None
        seed = meta(dtype=torch.int64) if draw.random() < 0.5 else None
        given = q, k, k, None, None, None, bias, None, None, seed, 1.0, flag, draw.random() < 0.5, -1e4, 0.1
        args = attention.AttentionArgs(*given)
        out, stats = attention.attention_fwd(args)
        attention.attention_bwd(args, out, out, stats, bias is not None)


@functools.cache
def reached(arch: int) -> set[tuple]:
    return {configuration(variant) for variant in resources.variants(arch)}


def test_the_cases_reach_every_configuration_that_a_call_can_choose():
    """But for skinny linears, whose configurations are as many as there are shapes."""
    draw = random.Random(0)
    for number in range(1500):
        with launch.recording() as recorded:
            any_launch(draw)
        recorded = [variant for variant in recorded if variant.kernel is not skinny_linear._skinny_linear_fwd_kernel]
        missing = {configuration(variant) for variant in recorded} - reached(90)
        assert not missing, f"call {number} launches what no case compiles: {missing}"


@pytest.mark.parametrize("arch", [80, 100])
def test_the_other_architectures_get_the_same_configurations(arch):
    chain = {one for one in reached(90) if one[0] == "_matvec_chain_fwd_kernel"}  # some of its modes begin with 9.0
    assert reached(arch) - chain == reached(90) - chain


@pytest.mark.skipif(not launch.interpreted(), reason="needs the interpreter")
def test_an_interpreting_process_says_that_it_cannot_compile():
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        next(resources.check([]))

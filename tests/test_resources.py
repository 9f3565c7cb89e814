"""Every configuration that the wrappers can choose compiles, fits its chip and does not spill: without a GPU."""

import json
import os
import random
import subprocess
import sys

import pytest
import torch
from fastprior.kernels.cases import meta

from fastprior.kernels import attention, barrier, decode, launch, linear, norm, resources, step


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastprior.kernels.resources", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_every_launch_compiles_and_fits(tmp_path):
    done = run("--record", str(tmp_path / "records.jsonl"))
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert {record["arch"] for record in records} == set(resources.ARCHITECTURES)
    kernels = {record["kernel"] for record in records}
    for module in (attention, barrier, decode, linear, norm, step):
        own = {name for name in vars(module) if name.endswith("_kernel")}
        assert own and own <= kernels, f"{own - kernels} is never compiled"


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
        norm.layer_norm_fwd(x, gain, gain if flag else None, None, x if flag else None, **options, dtype=dtype)
        needs = dict(need_dx=True, need_dgain=flag, need_dbias=False)
        norm.layer_norm_bwd(x, None, x, gain, None, **options, **needs)
    elif kind == "step":
        table, index, state = meta(9, 6), meta(dtype=torch.int64), meta(rows, dim)
        clamp = draw.choice([None, "range", "l2"])
        step.diffusion_step_fwd(state, x, None, meta(), state, state, table, index, clamp, 1.0, None, None)
    elif kind == "linear":
        rows, outputs = draw.randint(1, 64), 2 * draw.randint(1, 9000)
        dim = draw.randint(1, 9000)
        weight = meta(outputs, dim, dtype=dtype)
        gain = meta(dim) if rows <= linear.MAX_NORM_ROWS and flag else None
        activation = draw.choice([None, "gelu", "swiglu"])
        linear.linear_fwd(meta(rows, dim, dtype=dtype), weight, norm_gain=gain, activation=activation)
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
        out, stats = attention.attention_fwd(*given)
        attention.attention_bwd(out, out, stats, bias is not None, *given)


def test_the_cases_reach_every_configuration_that_a_call_can_choose():
    covered = {configuration(variant) for variant in resources.variants(90)}
    draw = random.Random(0)
    for number in range(1500):
        with launch.recording() as recorded:
            any_launch(draw)
        missing = {configuration(variant) for variant in recorded} - covered
        assert not missing, f"call {number} launches what no case compiles: {missing}"


@pytest.mark.parametrize("arch", [80, 100])
def test_the_other_architectures_get_the_same_configurations(arch):
    wanted = {configuration(variant) for variant in resources.variants(90)}
    assert {configuration(variant) for variant in resources.variants(arch)} == wanted


def test_a_kernel_that_spills_or_misses_the_tensor_cores_is_reported(tmp_path):
    (tmp_path / "bad.py").write_text("""
import json, sys
import triton, triton.language as tl
from fastprior.kernels import launch, resources
from fastprior.kernels.cases import meta

@triton.jit
def greedy(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    total = x
    for i in range(4):
        total += tl.sort(x * i) + tl.flip(x)
    tl.store(y_ptr + at, total * x)

@triton.jit
def large(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, tl.dot(x, tl.trans(x), input_precision="ieee"))

problems = []
for kernel, block in ((greedy, 2048), (large, 32)):
    with launch.recording() as recorded:
        launch.launch(kernel, (1,), meta(block), meta(block), num_warps=1, num_stages=1, BLOCK=block)
    problems.append(resources.compile_variant(recorded[0], 90)["problem"])
print(json.dumps(problems))
""")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(tmp_path / "bad.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert json.loads(done.stdout) == ["spills registers", "has a dot product and does not use the tensor cores"]


@pytest.mark.skipif(not launch.interpreted(), reason="needs the interpreter")
def test_an_interpreting_process_says_that_it_cannot_compile():
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        next(resources.compile_all())

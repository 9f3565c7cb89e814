"""Launches: on the device of their tensors, as they are recorded, and under the driver of a GPU that is not there."""

import ast
import contextlib
import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")
import stand_in
import triton
import triton.language as tl

from fastprior.kernels import ops
from fastprior.kernels.gpu import launch, norm
from fastprior.kernels.reference import NormArgs
from helpers.at_once import at_once
from helpers.processes import compiling


class Kernel:
    """Notes the current device of its launches, and their options."""

    arg_names = "x_ptr", "count", "BLOCK"

    def __init__(self, current):
        self.current, self.launched = current, []

    def __getitem__(self, grid):
        return lambda *args, **options: self.launched.append((self.current[-1], grid, options))


@pytest.fixture
def devices(monkeypatch):
    """The current CUDA device and those before, of a machine that has several."""
    current = [0]

    @contextlib.contextmanager
    def device(chosen):
        current.append(chosen.index)
        try:
            yield
        finally:
            current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", device)
    return current


@pytest.mark.parametrize("number", [0, 1])
def test_kernels_are_launched_on_the_device_of_their_tensors(number, devices):
    kernel = Kernel(devices)
    with FakeTensorMode():
        x = torch.empty(8, device=f"cuda:{number}")
    launch.launch(kernel, (2,), x, 8, num_warps=4, num_stages=1, dependent=True, BLOCK=8)
    assert kernel.launched == [(number, (2,), dict(num_warps=4, num_stages=1, launch_pdl=True, BLOCK=8))]
    assert devices == [0], "the current device is what it was"


META = torch.device("meta")


def flags_of(call) -> list[tuple]:
    """What is recorded of a call's launches beside warps and stages, and whether they were to wait."""

    @triton.jit
    def _some_kernel(x_ptr, DEPENDENT: tl.constexpr):
        pass

    def one(chained=True, **flags):
        x = torch.empty(8, device="meta")
        flags |= dict(num_warps=1, num_stages=1)
        launch.launch(_some_kernel, (1,), x, chained=chained, DEPENDENT=launch.in_chain(), **flags)

    with launch.recording() as recorded:
        call(one)
    return [
        (dict(variant.flags).get("launch_pdl", False), dict(variant.constants)["DEPENDENT"]) for variant in recorded
    ]


def test_launches_of_a_chain_depend_on_the_one_before():
    """The first waits for all that was launched before, as any launch does; all wait by themselves."""

    def call(one):
        one()
        with launch.chain(META):
            one(), one(), one()
        one()
        with launch.chain(META):
            one(), one()

    chain = [(False, True), (True, True), (True, True)]
    assert flags_of(call) == [(False, False), *chain, (False, False), *chain[:2]]


def test_launches_of_a_chain_that_cannot_depend():
    """They do not begin early, and those behind them still may: these wait for them."""

    def call(one):
        with launch.chain(META):
            one(chained=False), one(), one(chained=False), one(), one(chained=False, dependent=True)

    flags = [dependent for dependent, _ in flags_of(call)]
    assert flags == [False, False, False, True, True]


def test_a_chain_within_a_chain_begins_anew():
    def call(one):
        with launch.chain(META):
            one()
            with launch.chain(META):
                one(), one()
            one()

    assert flags_of(call) == [(False, True), (False, True), (True, True), (True, True)]
    assert not launch.in_chain()


def test_a_chain_ends_with_its_block_and_is_of_one_thread():
    seen = []
    with pytest.raises(ZeroDivisionError), launch.chain(META):
        assert launch.in_chain()
        at_once(lambda _: seen.append(launch.in_chain()), range(2))
        raise ZeroDivisionError
    assert not launch.in_chain() and seen == [False, False]


@pytest.mark.parametrize("capability, can", [((8, 0), False), ((8, 9), False), ((9, 0), True), ((10, 0), True)])
def test_launches_depend_where_the_device_can(capability, can, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    def call(one):
        with launch.chain(torch.device("cuda:0")):
            one(), one()

    assert flags_of(call) == ([(False, True), (True, True)] if can else [(False, False)] * 2)
    assert launch.can_depend(META) and not launch.can_depend(torch.device("cpu"))


def test_every_launch_goes_through_the_one_that_sees_to_it():
    """No module of kernels launches by itself: it would forget the device, and what is done instead of launches."""
    for path in Path(launch.__file__).parent.glob("*.py"):
        if path.name == "launch.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            subscripted = isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
            assert not subscripted or not ast.unparse(node.func.value).endswith("_kernel"), (
                f"{path}: {ast.unparse(node)}"
            )


def run(script: str, *arguments: str) -> list:
    """What a script prints, in a process where kernels are compiled: not in the interpreter."""
    done = compiling("-c", script, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


COMPARE = """
import json, types
import triton.compiler
from triton.backends.compiler import GPUTarget

# what would be compiled is noted, and not compiled
triton.compiler.compile = lambda src, target=None, options=None, **_: types.SimpleNamespace(src=src, options=options)
from fastprior.kernels.gpu import launch
import compilations
import resources
from cases import cases
from stand_in import standing_in

def said(source, options, backend):
    attributes = {place: value for place, value in source.attrs.items() if value}
    return source.fn, source.signature, source.constants, attributes, backend.parse_options(options).hash()

compared, different = [], []
for arch in resources.ARCHITECTURES:
    backend = triton.compiler.make_backend(GPUTarget("cuda", arch, 32))
    for case in cases(arch):
        launched = []
        with launch.recording() as recorded:
            case()
        with standing_in(arch, lambda kernel, compiled: launched.append(compiled)):
            case()
        for variant, compiled in zip(recorded, launched, strict=True):
            checked = said(compilations.source_of(variant), compilations.options_of(variant), backend)
            compared.append(variant.kernel.__name__)
            if checked != said(compiled.src, compiled.options, backend):
                different.append([arch, resources.describe(variant), variant.kernel.__name__])
print(json.dumps([sorted(set(compared)), different]))
"""


@pytest.mark.slow
def test_what_is_launched_is_what_is_checked():
    """For every kernel and case: the same types, constants, alignments and options."""
    kernels, different = run(COMPARE)
    assert len(kernels) == 15, kernels
    assert not different


LINEARS = """
import json, re
import torch
from fastprior.kernels.arguments import LinearArgs
from fastprior.kernels.gpu import linear
from stand_in import standing_in

def t(*shape, dtype=torch.bfloat16):
    return torch.zeros(shape, dtype=dtype)

found = []
def note(kernel, compiled):
    ahead, _ = re.split(r"ld\\.global\\.cg", compiled.asm["ptx"], maxsplit=1)  # of the row, which others wrote
    wide = re.findall(r"ld\\.global\\S*\\.v4\\.b32|cp\\.async\\.cg\\.shared\\.global\\S* .*0x10", ahead)
    found.append((len(wide), len(re.findall(r"ld\\.global\\S*\\.b16", compiled.asm["ptx"]))))

stream, gain, wide = t(3, 768, dtype=torch.float32), t(768), t(3072)
with standing_in(90, note):
    for args in (
        LinearArgs(stream, t(768, 768), beside=t(128, 768), norm_gain=gain, dtype=torch.bfloat16),
        LinearArgs(t(3, 768), t(768, 768)),
        LinearArgs(t(3, 768), t(6144, 768), stream=stream, stream_gain=gain, norm_gain=gain, activation="swiglu"),
        LinearArgs(t(3, 3072), t(768, 3072), norm_gain=wide, residual=stream),
    ):
        linear.linear_fwd(args)
print(json.dumps(found))
"""


@pytest.mark.slow
def test_linears_of_a_step_fetch_their_weights_by_16_bytes_ahead():
    """The four of a layer of D2-small: where a launch knows less of its arguments, loads are of 2 bytes, and late."""
    tiles = (8 * 768, 256), (8 * 768, 256), (48 * 768, 256), (8 * 3072, 512)  # weights of a program, and its threads
    for (wide, single), (weights, threads) in zip(run(LINEARS), tiles, strict=True):
        assert wide >= weights * 2 / (16 * threads)
        assert single <= 8  # of gains, and of the first number of each row


CHAIN = """
import json
import warnings
import torch
from fastprior.kernels.gpu.barrier import matvec_chain_fwd
from stand_in import standing_in

found = []
x, out, arrived = torch.zeros(64), torch.zeros(2, 64), torch.zeros((), dtype=torch.int32)
with standing_in(90, lambda kernel, compiled: found.append(compiled.metadata)):
    for mode in ("barrier", "dependent launches"):
        matvec_chain_fwd(x, torch.zeros(2, 64, 64), out, arrived, 16, mode)
print(json.dumps([[one.launch_cooperative_grid, one.launch_pdl] for one in found]))
"""


@pytest.mark.slow
def test_kinds_of_launches_are_compiled_as_such():
    """On CPU tensors too: only the interpreter has one program at a time."""
    assert run(CHAIN) == [[True, False], [False, False], [False, True]]


@pytest.mark.skipif(not launch.interpreted(), reason="needs the interpreter")
def test_an_interpreting_process_cannot_stand_in():
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"), stand_in.standing_in():
        pass


@pytest.mark.skipif(not launch.interpreted(), reason="needs the interpreter")
def test_an_interpreter_that_cannot_run_says_which_numpy_it_needs(monkeypatch):
    def fail(*args):
        raise triton.runtime.errors.InterpreterError("TypeError('only 0-dimensional arrays …')")

    monkeypatch.setattr(launch, "_probe", {(1,): fail})
    launch.interpreter_fault.cache_clear()
    try:
        with pytest.raises(
            launch.InterpreterFault, match=r"Triton .* and numpy .*0-dimensional.*3.6 needs numpy < 2.4"
        ):
            norm.layer_norm(NormArgs(torch.ones(2, 4)))
    finally:
        launch.interpreter_fault.cache_clear()


def test_what_is_recorded_honours_how_a_kernel_specialises():
    @triton.jit(do_not_specialize=["count", "rows"])
    def _some_kernel(x_ptr, y_ptr, count, rows, stride, width, scale, missing_ptr, BLOCK: tl.constexpr):
        pass

    x = torch.empty(4, 64, dtype=torch.int8, device="meta")
    with launch.recording() as recorded:
        for args in ((x, x[0, 1:], 16, 1, 1, 32, 1.0, None), (x, x[1], 1, 16, 2**31, 0, 1.0, None)):
            launch.launch(_some_kernel, (1,), *args, num_warps=1, num_stages=1, BLOCK=16)
    first, second = recorded
    kinds = dict(first.signature)
    assert kinds == dict(
        x_ptr="*i8", y_ptr="*i8", count="i32", rows="i32", stride="constexpr", width="i32", scale="fp32",
        missing_ptr="constexpr", BLOCK="constexpr",
    )  # fmt: skip
    assert dict(first.constants) == dict(BLOCK=16, missing_ptr=None, stride=1)
    assert first.divisible == ("x_ptr", "width")
    assert dict(second.signature)["stride"] == "i64" and second.divisible == ("x_ptr", "y_ptr", "stride", "width")


def test_cuda_without_triton_is_said(monkeypatch):
    monkeypatch.setattr(ops, "HAS_TRITON", False)
    on_cuda = SimpleNamespace(is_cuda=True, dtype=torch.float32)  # which no tensor here can be
    with ops.using(None), pytest.warns(RuntimeWarning, match="triton is not installed"):
        assert not ops.on_triton(on_cuda)
    with ops.using("reference"), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not ops.on_triton(on_cuda)

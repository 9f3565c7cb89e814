"""What reaches the CPU kernels, what is left to PyTorch, and what they refuse."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fastprior.kernels import ops
from fastprior.kernels.arguments import LinearArgs
from fastprior.kernels.cpu import attention as cpu_attention
from fastprior.kernels.cpu import blocks as cpu_blocks
from fastprior.kernels.cpu import library as cpu_library
from fastprior.kernels.cpu import linear as cpu_linear
from fastprior.models.dalle2 import layers
from helpers.cpu_cases import (
    BF16,
    FP32,
    NEEDS_KERNELS,
    OPTIONS,
    block_arguments,
    count_calls,
    make,
    make_blocks,
    make_decode,
    make_tokens,
    make_transformer,
    prior_step,
    random,
    step,
    through_reference,
)
from helpers.priors import relative_error

pytestmark = NEEDS_KERNELS


@pytest.fixture
def calls(monkeypatch):
    return count_calls(monkeypatch)


# what reaches the kernels


class Adapter(layers.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def hook(transformer):
    transformer.layers[1][0].to_kv.register_forward_hook(lambda module, args, y: y * 2)


def hook_attention_output(transformer):
    transformer.layers[1][0].to_out.register_forward_hook(lambda module, args, y: y * 2)


def hook_feed_forward(transformer):
    transformer.layers[1][1].register_forward_pre_hook(lambda module, args: (args[0] * 0,))


def adapt(transformer):
    transformer.layers[2][1][5].__class__ = Adapter


def other_eps(transformer):
    transformer.layers[0][1][0].eps = 1.0


def hook_head(transformer):
    transformer.project_out.register_forward_hook(lambda module, args, y: y * 2)


def hook_last_norm(transformer):
    transformer.norm.register_forward_hook(lambda module, args, y: y * 2)


@pytest.mark.parametrize("change", [hook_head, hook_last_norm], ids=lambda change: change.__name__)
def test_a_head_that_is_not_plain_is_called(calls, change):
    transformer, (prefix, x) = make_transformer(), make_tokens()
    before = step(transformer, prefix, x)
    change(transformer)
    calls["run_blocks"] = 0
    assert relative_error(step(transformer, prefix, x), 2 * before) < 1e-5 and calls["run_blocks"] == 2


@pytest.mark.parametrize(
    "change", [hook, hook_attention_output, hook_feed_forward, adapt, other_eps], ids=lambda change: change.__name__
)
def test_what_is_not_plain_is_called(calls, change):
    transformer, (prefix, x) = make_transformer(), make_tokens()
    before = step(transformer, prefix, x)
    change(transformer)
    calls["run_blocks"] = 0
    got = step(transformer, prefix, x)
    assert calls["run_blocks"] == 0 and relative_error(got, before) > 1e-3
    assert relative_error(got, through_reference(step, transformer, prefix, x)) < 1e-5


class Lora(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def replace_linear(blocks):
    blocks[1].attn1.to_v.__class__ = Lora


def replace_eps(blocks):
    blocks[2].norm3.eps = 1.0


@pytest.mark.parametrize("change", [replace_linear, replace_eps], ids=lambda change: change.__name__)
def test_what_is_not_plain_in_a_prior_transformer_is_called(calls, change):
    blocks, (prefix, x) = make_blocks(), make_tokens()
    before = prior_step(blocks, prefix, x)
    change(blocks)
    calls["run_blocks"] = 0
    got = prior_step(blocks, prefix, x)
    assert calls["run_blocks"] == 0 and relative_error(got, before) > 1e-3
    assert relative_error(got, through_reference(prior_step, blocks, prefix, x)) < 1e-5


def run_linear(**changes):
    inputs = make(3, 40, 52, options=("norm_gain", "bias")) | changes
    return ops.linear(**inputs)


def run_decode(**changes):
    return ops.decode_attention(**make_decode() | changes)


def run_step(dtype=FP32, samples=2, grad=False, training=False, frozen=False, **tokens):
    transformer, (prefix, x) = make_transformer().to(dtype).train(training), make_tokens(samples=samples, **tokens)
    transformer.layers.requires_grad_(not frozen)
    with torch.set_grad_enabled(grad):
        return transformer.step(x.to(dtype), transformer.prefill(prefix.to(dtype), 3))


@torch.no_grad()
def run_wide_prefill(tokens):
    """Of heads whose own keys take 1 KiB each on a thread's stack."""
    return make_transformer(dim_head=256, heads=1, depth=1).prefill(random(1, tokens, 40), 3).k


INT8, MOST = random(5, 8).to(torch.int8), cpu_blocks.most_tokens(FP32)


LEFT = {  # to PyTorch: which kernel, and a call
    "fp64": ("linear", lambda: ops.linear(random(3, 8).double(), random(5, 8).double())),
    "fp16": ("linear", lambda: ops.linear(random(3, 8).half(), random(5, 8).half())),
    "fp64-residual": ("linear", lambda: ops.linear(random(3, 8), random(5, 8), residual=random(3, 5).double())),
    "many-rows": ("linear", lambda: run_linear(x=random(cpu_library.most_rows(FP32) + 1, 52))),
    "no-rows": ("linear", lambda: run_linear(x=random(0, 52))),
    "gradient-of-x": ("linear", lambda: run_linear(x=random(3, 52).requires_grad_())),
    "gradient-of-bias": ("linear", lambda: run_linear(bias=random(40).requires_grad_())),
    "gradient-of-beside": ("linear", lambda: run_linear(bias=None, beside=random(40, 52).requires_grad_())),
    "gradient-of-norm-bias": ("linear", lambda: run_linear(norm_bias=random(52).requires_grad_())),
    "transposed-weight": ("linear", lambda: run_linear(weight=random(52, 40).t())),
    "transposed-beside": ("linear", lambda: run_linear(bias=None, beside=random(52, 40).t())),
    "int8-of-fp16": ("linear", lambda: ops.linear(random(3, 8).half(), INT8, scale=random(5))),
    "gradient-of-q": ("decode_attention", lambda: run_decode(q=random(2, 3, 4, 16).requires_grad_())),
    "gradient-of-mask": ("decode_attention", lambda: run_decode(mask=random(2, 9).requires_grad_())),
    "dropout": ("decode_attention", lambda: run_decode(dropout=0.5)),
    "wide-heads": ("decode_attention", lambda: ops.decode_attention(**make_decode(dim_head=257))),
    "many-own-keys": ("decode_attention", lambda: ops.decode_attention(**make_decode(suffix=1025, seq=1, dim_head=64))),
    "gradient-of-a-step": ("run_blocks", lambda: run_step(grad=True)),
    "gradient-of-the-bias": ("run_blocks", lambda: run_step(grad=True, frozen=True)),
    "step-in-training": ("run_blocks", lambda: run_step(training=True)),
    "step-of-many-rows": ("run_blocks", lambda: run_step(samples=MOST // 6 + 1, prefix=MOST + 1)),
    "step-of-many-own-keys": ("run_blocks", lambda: run_wide_prefill(257)),
    "step-in-fp64": ("run_blocks", lambda: run_step(torch.float64)),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT)
def test_what_is_left_to_pytorch(calls, case):
    kernel, call = LEFT[case]
    call()
    assert calls[kernel] == 0


TAKEN = dict(linear=run_linear, decode_attention=run_decode, run_blocks=run_step)


@pytest.mark.parametrize("kernel", TAKEN)
def test_the_door(calls, kernel):
    """The same calls reach the kernels where nothing forbids it: the counts above are of something."""
    taken = TAKEN[kernel]()
    count = calls[kernel]
    with ops.using("reference"):
        plain = TAKEN[kernel]()
    assert calls[kernel] == count > 0 and relative_error(taken, plain) < 1e-5
    if kernel != "decode_attention":  # which has no linear for autocast to cast
        with torch.autocast("cpu", BF16):
            TAKEN[kernel]()
        assert calls[kernel] == count


def test_the_most_own_keys(calls):
    tokens = min(256, cpu_blocks.most_tokens(FP32))
    got = run_wide_prefill(tokens)
    assert calls["run_blocks"] == 1 and relative_error(got, through_reference(run_wide_prefill, tokens)) < 1e-5


@pytest.mark.slow
def test_the_environment_forbids_them():
    program = """
import torch
from fastprior.kernels import ops
from fastprior.kernels.cpu import library as cpu_library
ops.linear(torch.ones(2, 8), torch.ones(3, 8))
assert cpu_library._loaded is None
"""
    subprocess.run([sys.executable, "-c", program], check=True, env=os.environ | dict(FASTPRIOR_KERNELS="reference"))


def followed_by_fake_tensors(x):
    with FakeTensorMode() as mode:
        fake = ops.linear(mode.from_tensor(x), mode.from_tensor(random(5, 8)))
    assert fake.shape == (3, 5) and fake.dtype == FP32


def followed_by_jvp(x):
    weight, along = random(5, 8), random(3, 8, seed=9)
    got, tangent = torch.func.jvp(lambda x: ops.linear(x, weight), (x,), (along,))
    torch.testing.assert_close((got, tangent), (x @ weight.t(), along @ weight.t()))
    with torch.autograd.forward_ad.dual_level():
        dual = ops.linear(torch.autograd.forward_ad.make_dual(x, along), weight)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, along @ weight.t())


def followed_by_vmap(x):
    weight = random(5, 8)
    torch.testing.assert_close(torch.func.vmap(lambda x: ops.linear(x, weight))(x), x @ weight.t())


@pytest.mark.filterwarnings("ignore")
def followed_by_traces(x):
    weight = random(5, 8)
    for trace in (lambda f: torch.jit.trace(f, (x,), check_trace=False), lambda f: make_fx(f)(x)):
        torch.testing.assert_close(trace(lambda x: ops.linear(x, weight))(x * 2), x @ weight.t() * 2)


def followed_by_a_subclass(x):
    class Scaled(torch.Tensor):  # as quantised weights are: what it is of lies elsewhere
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs or {})

    weight = random(5, 8).as_subclass(Scaled)
    assert cpu_linear.linear_where_taken(LinearArgs(x, weight)) is None
    assert cpu_linear.linear_where_taken(LinearArgs(x, random(5, 8))) is not None


FOLLOWED = followed_by_fake_tensors, followed_by_jvp, followed_by_vmap, followed_by_traces, followed_by_a_subclass


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("check_it", FOLLOWED, ids=lambda f: f.__name__)
def test_what_follows_operations_sees_pytorchs(check_it):
    check_it(random(3, 8))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend):
    torch._dynamo.reset()
    inputs = make(5, 40, 52, options=OPTIONS["all-swiglu"])
    transformer, (prefix, x) = make_transformer(normformer=True), make_tokens()
    decode = make_decode(width=6, bias=True, mask=True)

    def all_of_it(inputs, decode, x, cache):
        alone = cache._replace(blocks=None)  # a trace looks at each module then
        steps = transformer.step(x, cache), transformer.step(x, alone)
        return ops.linear(**inputs), ops.decode_attention(**decode), steps

    with torch.no_grad():
        cache = transformer.prefill(prefix, 3)
        graphs = []
        if backend == "aot_eager":

            def backend(graph, example):
                graphs.append(graph)
                return graph

        got = torch.compile(all_of_it, fullgraph=True, backend=backend)(inputs, decode, x, cache)
        torch.testing.assert_close(got, all_of_it(inputs, decode, x, cache), rtol=1e-5, atol=5e-6)
    for graph in graphs:
        names = {str(node.target) for node in graph.graph.nodes}
        assert {"fastprior.cpu_linear.default", "fastprior.cpu_decode.default", "fastprior.cpu_blocks.default"} <= names


@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("options", ["all-gelu", "all-swiglu"])
def test_op_linear(options, dtypes):
    inputs = make(3, 40, 52, dtypes, OPTIONS[options])
    names = "x", "weight", "bias", "beside", "scale", "stream", "stream_gain", "norm_gain", "norm_bias"
    arguments = *(inputs.get(name) for name in names), 1e-5, inputs["activation"], inputs["residual"], BF16
    torch.library.opcheck(torch.ops.fastprior.cpu_linear.default, arguments)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_op_decode(dtype):
    given = make_decode(seq=2, width=6, bias=True, mask=True, dtype=dtype)
    tensors = [given[name] for name in ("q", "k", "v", "prefix_k", "prefix_v")]
    arguments = *tensors, given["scale"], *given["rotary"], True, given["bias"], given["mask"]
    torch.library.opcheck(torch.ops.fastprior.cpu_decode.default, arguments)


def test_op_blocks():
    x, blocks, *prefix, outputs, (cos, sin), bias = block_arguments().values()
    arguments = x, blocks.table, *prefix, outputs, blocks.shape, 1.0, cos, sin, True, bias, None, "swiglu", 1e-5
    torch.library.opcheck(torch.ops.fastprior.cpu_blocks.default, arguments)


# shapes that C would read out of bounds


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(weight=random(6, 7)), "weight has shape (6, 7); it must be (6, 8)"),
        (dict(beside=random(6, 7)), "beside has shape (6, 7); it must be (6, 8)"),
        (dict(bias=random(5)), "bias has shape (5,); it must be (6,)"),
        (dict(bias=random(6), beside=random(2, 8)), "bias has shape (6,); it must be (8,)"),
        (dict(weight=random(6, 8).to(torch.int8), scale=random(5)), "scale has shape (5,); it must be (6,)"),
        (dict(norm_gain=random(7)), "norm_gain has shape (7,); it must be (8,)"),
        (dict(norm_gain=random(8), norm_bias=random(7)), "norm_bias has shape (7,); it must be (8,)"),
        (dict(stream=random(1, 8), stream_gain=random(8)), "stream has shape (1, 8); it must be (2, 8)"),
        (dict(stream=random(2, 8), stream_gain=random(7)), "stream_gain has shape (7,); it must be (8,)"),
        (dict(stream=random(2, 8)), "stream and stream_gain must be given together"),
        (dict(residual=random(2, 5)), "residual has shape (2, 5); it must be (2, 6)"),
        (dict(residual=random(2, 6), activation="swiglu"), "residual has shape (2, 6); it must be (2, 3)"),
        (dict(weight=random(5, 8), activation="swiglu"), "'swiglu' needs one weight"),
        (dict(beside=random(2, 8), activation="swiglu"), "'swiglu' needs one weight"),
        (dict(x=random(70000, 8)), "x has 70000 rows; they must be 1 to"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_messages_of_linear(change, message):
    with pytest.raises(ValueError) as raised:
        cpu_linear.linear(LinearArgs(**dict(x=random(2, 8), weight=random(6, 8)) | change))
    assert message in str(raised.value)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(k=random(2, 3, 1, 15)), "k has shape (2, 3, 1, 15); it must be (2, 3, 1, 16)"),
        (dict(v=random(2, 2, 1, 16)), "v has shape (2, 2, 1, 16); it must be (2, 3, 1, 16)"),
        (dict(q=random(2, 4, 4, 16)), "4 tokens of queries; they must be 1 to 3"),
        (dict(q=random(3, 3, 4, 16), k=random(3, 3, 1, 16), v=random(3, 3, 1, 16)), "3 rows of 4 heads"),
        (dict(prefix_k=random(2, 9, 1, 8)), "prefix_v has shape (2, 9, 1, 16); it must be (2, 9, 1, 8)"),
        (dict(prefix_k=random(2, 9, 1, 8), prefix_v=random(2, 9, 1, 8)), "prefix_k has shape (2, 9, 1, 8)"),
        (dict(prefix_v=random(2, 8, 1, 16)), "prefix_v has shape (2, 8, 1, 16); it must be (2, 9, 1, 16)"),
        (dict(bias=random(3, 3, 12)), "bias has shape (3, 3, 12); it must be (3, 4, 12)"),
        (dict(bias=random(3, 4, 11)), "bias has shape (3, 4, 11); it must be (3, 4, 12)"),
        (dict(bias=random(2, 1, 12)), "bias has shape (2, 1, 12); it must be (3, 1, 12)"),
        (dict(mask=random(1, 9)), "mask has shape (1, 9); it must be (2, 9)"),
        (dict(rotary=(random(2, 16), random(2, 16))), "cos has shape (2, 16); it must be (3, 16)"),
        (dict(rotary=(random(3, 18), random(3, 18))), "cos has shape (3, 18); it must be (3, 16)"),
        (dict(rotary=(random(3, 7), random(3, 7))), "cos has shape (3, 7); it must be (3, 6)"),
        (dict(rotary=(random(3, 16), random(3, 14))), "sin has shape (3, 14); it must be (3, 16)"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_messages_of_decode(change, message):
    with pytest.raises(ValueError) as raised:
        cpu_attention.decode_attention(**make_decode() | change)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    "change, of_block, message",
    [
        (dict(outputs=4), {}, "4 tokens of queries; they must be 1 to 3"),
        (dict(outputs=-1), {}, "-1 tokens of queries; they must be 1 to 3"),
        (dict(x=random(4, 3, 39)), {}, "x has shape (4, 3, 39); it must be (4, 3, 40)"),
        (dict(x=random(3, 3, 40)), {}, "3 rows of 3 heads"),
        (dict(x=random(24000, 3, 40)), {}, "x has 72000 rows; they must be 1 to"),
        (dict(x=random(4, 2, 40)), {}, "bias has shape (3, 3, 10); it must be (2, 3, 9)"),
        (dict(prefix_k=random(1, 2, 7, 1, 12)), {}, "prefix_k has shape (1, 2, 7, 1, 12); it must be (2, 2, 7, 1, 12)"),
        (dict(prefix_v=random(1, 2, 7, 1, 12)), {}, "prefix_v has shape (1, 2, 7, 1, 12)"),
        (dict(mask=random(2, 6)), {}, "mask has shape (2, 6); it must be (2, 7)"),
        ({}, dict(heads=4), "q has shape (36, 40); it must be (48, 40)"),
        ({}, dict(k=random(12, 40)), "k has shape (12, 40); it must be (24, 40)"),
        ({}, dict(v=random(12, 40)), "k has shape (24, 40); it must be (12, 40)"),
        ({}, dict(out=random(40, 35)), "out has shape (40, 35); it must be (40, 36)"),
        ({}, dict(expand=random(319, 40)), "expand has shape (319, 40); it must be (320, 40)"),
        ({}, dict(contract=random(39, 160)), "contract has shape (39, 160); it must be (40, 160)"),
        ({}, dict(q_scale=random(35)), "q_scale has shape (35,); it must be (36,)"),
        ({}, dict(expand_bias=random(160)), "expand_bias has shape (160,); it must be (320,)"),
        ({}, dict(norm_gain=random(39)), "norm_gain has shape (39,); it must be (40,)"),
        ({}, dict(out_gain=random(39)), "out_gain has shape (39,); it must be (40,)"),
        ({}, dict(inner_gain=random(40)), "inner_gain has shape (40,); it must be (160,)"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_messages_of_blocks(change, of_block, message):
    with pytest.raises(ValueError) as raised:
        cpu_blocks.run_blocks(**block_arguments(**of_block) | change)
    assert message in str(raised.value)

"""Another thread replaces what tensors hold while C is called with them: C reads what they held, and nothing else."""

import threading
import time

import pytest
import torch
from torch import nn

from fastprior import PriorSampler
from fastprior.kernels import ops
from fastprior.kernels.arguments import LinearArgs
from fastprior.kernels.cpu import blocks as cpu_blocks
from fastprior.kernels.cpu import calls as cpu_calls
from fastprior.kernels.cpu import library as cpu_library
from fastprior.kernels.cpu import run as cpu_run
from helpers.cpu_cases import (
    DECODE_OPTIONS,
    NEEDS_KERNELS,
    OPTIONS,
    block_arguments,
    make,
    make_decode,
    make_transformer,
)
from helpers.priors import make_prior, make_text

pytestmark = [NEEDS_KERNELS, pytest.mark.usefixtures("lenient")]


def replace(t: torch.Tensor) -> None:
    """Other numbers, fewer of them, in a place around which there is nothing but NaN: nobody may look at those."""
    fewer = (max(1, t.shape[0] // 2), *t.shape[1:])
    around = torch.full((t.numel() * 3,), torch.nan) if t.is_floating_point() else torch.full((t.numel() * 3,), 99)
    t.data = around.to(t.dtype)[t.numel() :][: torch.Size(fewer).numel()].view(fewer)


class Switch:
    """Moments at which Python gives another thread its turn: between checks and addresses, and before C is called."""

    def __init__(self, monkeypatch, tensors):
        self.tensors, self.times, self.rubbish = [t for t in tensors if torch.is_tensor(t)], 0, []
        for module, name in ((cpu_calls, "check_shapes"), (cpu_library, "run")):
            monkeypatch.setattr(module, name, self.behind(getattr(module, name), module is cpu_library))

    def behind(self, function, first: bool):
        def call(*args, **kwargs):
            if first:
                self.now()
            result = function(*args, **kwargs)
            self.now()
            return result

        return call

    def now(self) -> None:
        self.times += 1
        if self.times < 4:
            for t in self.tensors:
                replace(t)
            # whatever had its memory is overwritten
            self.rubbish += [torch.full((64 * size,), torch.nan) for size in range(1, 64) for _ in range(3)]


def parameters(inputs: dict) -> dict:
    """The tensors, each one that may get other data, as those of modules; int8 is of buffers."""
    return {
        name: nn.Parameter(t.clone(), requires_grad=False) if torch.is_tensor(t) else t for name, t in inputs.items()
    }


@pytest.mark.parametrize("options", ["all-swiglu", "all-gelu"])
@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "int8"])
def test_linear(monkeypatch, dtypes, options):
    inputs = parameters(make(2, 12, 40, dtypes, OPTIONS[options]))
    expected = ops.linear(**inputs)
    switch = Switch(monkeypatch, inputs.values())
    for got, wanted in zip(ops.linear(**inputs), expected):
        assert torch.equal(got, wanted)
    assert switch.times > 2


@pytest.mark.parametrize("options", DECODE_OPTIONS)
def test_decode_attention(monkeypatch, options):
    given = parameters(make_decode(**DECODE_OPTIONS[options]))
    rotary = given["rotary"] = given["rotary"] and tuple(map(nn.Parameter, given["rotary"]))
    with torch.no_grad():
        expected = ops.decode_attention(**given)
        switch = Switch(monkeypatch, (*given.values(), *(rotary or ())))
        assert torch.equal(ops.decode_attention(**given), expected)
    assert switch.times > 2


def test_run_blocks(monkeypatch):
    given = block_arguments()
    expected = ops.run_blocks(**given)
    given |= parameters({name: t for name, t in given.items() if torch.is_tensor(t)})
    switch = Switch(monkeypatch, (*given.values(), *given["rotary"]))
    assert torch.equal(ops.run_blocks(**given), expected)
    assert switch.times > 2


def prepared(transformer):
    transformer = transformer.requires_grad_(False)
    how = dict(heads=3, kv_heads=1, dim_head=12, scale=1.0, cosine=True, activation="swiglu", eps=1e-5)
    return ops.prepare_blocks(transformer._blocks(), owner=transformer, **how)


def test_prepare_blocks(monkeypatch):
    """Blocks stay what they were when they were prepared, also long after the weights have gone."""
    transformer = make_transformer(depth=2, normformer=True)
    given = block_arguments() | dict(blocks=prepared(transformer))
    expected = ops.run_blocks(**given)
    with monkeypatch.context() as patch:
        switch = Switch(patch, transformer.parameters())
        blocks = prepared(transformer)
    assert switch.times and blocks is not None
    del given["blocks"]
    assert torch.equal(ops.run_blocks(**given, blocks=blocks), expected)


def sample(prior, text):
    return prior.p_sample_loop(
        (2, 32), text, timesteps=4, cond_scale=2.0, progress=False, generator=torch.Generator().manual_seed(0)
    )


def test_run(monkeypatch):
    """All that a step reads, when it is prepared, and between the steps."""
    prior, text, seen, switches = make_prior(), make_text(2, 32), [], []
    prepare = cpu_run.prepare_run

    def noticed(*args, **kwargs):
        seen[:] = [t for t in (*args, *kwargs.values(), *(kwargs["rotary"] or ())) if torch.is_tensor(t)]
        if monkeypatched:
            switches.append(Switch(monkeypatch, seen))
        return prepare(*args, **kwargs)

    monkeypatch.setattr(ops, "prepare_run", noticed)
    monkeypatched = False
    expected = sample(prior, text)
    query = prior.net.learned_query
    assert len(seen) >= 8 and any(t.data_ptr() == query.data_ptr() and t.shape == query.shape for t in seen)
    monkeypatched = True
    assert torch.equal(sample(prior, text), expected)
    assert switches[0].times > 2


def test_an_operation_that_was_traced_looks_again(monkeypatch):
    """Guards of a trace were asked a moment before; those of the whole trace see it at the next call."""
    inputs = parameters(make(2, 12, 40, "fp32", OPTIONS["all-swiglu"]))
    args = LinearArgs(**inputs)
    expected = torch.ops.fastprior.cpu_linear(*args)[0]
    with monkeypatch.context() as patch:
        Switch(patch, inputs.values())
        assert torch.equal(torch.ops.fastprior.cpu_linear(*args)[0], expected)
    args.weight.data = torch.randn(12, 40, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"cpu_linear was traced with other tensors.* torch.float64 \(12, 40\)"):
        torch.ops.fastprior.cpu_linear(*args)


@pytest.mark.slow
def test_a_storm():
    """Equal weights take the place of each other while two threads call C; PyTorch's own operations would crash."""
    given = block_arguments()
    transformer, linear = (
        make_transformer(depth=2, normformer=True),
        parameters(make(2, 97, 40, "bf16", OPTIONS["norm"])),
    )
    whole = ops.run_blocks(**given | dict(blocks=prepared(transformer)))
    single, wrong, done = ops.linear(**linear), [], threading.Event()
    replaced = [*transformer.parameters(), *filter(torch.is_tensor, linear.values())]

    def swap():
        copies = [t.data for t in replaced]
        while not done.is_set():
            for t, kept in zip(replaced, copies):
                t.data = kept.clone()

    def call():
        while time.monotonic() < end:
            if not torch.equal(ops.run_blocks(**given | dict(blocks=prepared(transformer))), whole):
                wrong.append("blocks")
            if not torch.equal(ops.linear(**linear), single):
                wrong.append("linear")

    end, threads = time.monotonic() + 1.5, [threading.Thread(target=call) for _ in range(2)]
    swapper = threading.Thread(target=swap)
    for thread in (*threads, swapper):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    swapper.join()
    assert not wrong


@pytest.mark.slow
def test_a_sampler_whose_weights_are_replaced(monkeypatch):
    """As `test_run`, of all weights, as C is about to read them."""
    prior, text = make_prior(), make_text(1, 32)
    sampler = PriorSampler(prior, timesteps=3, compile=False, batch_sizes=(1,))
    call = lambda: sampler(**text, generator=torch.Generator().manual_seed(0))  # noqa: E731
    expected, blocks = call(), cpu_blocks.prepare_blocks
    with monkeypatch.context() as patch:
        switch = Switch(patch, ())

        def noticed(weights, *args, head=None, **kwargs):
            switch.tensors = [t for block in (*weights, *([head] if head else [])) for t in block if t is not None]
            return blocks(weights, *args, head=head, **kwargs)

        patch.setattr(ops, "prepare_blocks", noticed)
        got = call()
    assert switch.times > 2 and torch.equal(got, expected)

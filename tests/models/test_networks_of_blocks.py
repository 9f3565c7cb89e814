"""Blocks in networks of others: what is cast, copied and kept on the fast paths, and the bias that knows its table."""

import contextlib

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastprior.dalle2_pytorch as ours
from fastprior.kernels import ops
from fastprior.models.dalle2.layers import Attention, RelPosBias, RotaryEmbedding
from helpers.priors import relative_error
from helpers.tracing import Trace, kept_for_backward

SHAPE = dict(dim=1664, heads=32, dim_head=52)  # of brain decoding
SEQ = 513
CAST = "_to_copy"


def is_n_by_n(t: torch.Tensor) -> bool:
    """Whether a tensor has a number for each query, key and head."""
    return t.numel() >= SEQ * (SEQ + 1) * SHAPE["heads"] and SEQ + 1 in t.shape


class TwoLayers(nn.Module):
    def __init__(self, blocks, dim, heads, dim_head, normformer=False, causal=False):
        super().__init__()
        self.bias = blocks.RelPosBias(heads=heads)
        rotary = blocks.RotaryEmbedding(dim=min(32, dim_head))
        self.layers = nn.ModuleList(
            nn.ModuleList([
                blocks.Attention(dim=dim, heads=heads, dim_head=dim_head, causal=causal, rotary_emb=rotary),
                blocks.FeedForward(dim=dim, post_activation_norm=normformer),
            ])
            for _ in range(2)
        )  # fmt: skip

    def forward(self, x):
        bias = self.bias(x.shape[1], x.shape[1] + 1, device=x.device)
        for attention, feed_forward in self.layers:
            x = attention(x, attn_bias=bias) + x
            x = feed_forward(x) + x
        return x


@contextlib.contextmanager
def traced(backend: str, blocks=ours, autocast: bool = False, batch: int = 1, **options):
    """The network, the trace of forward and of backward, and what autograd kept; of tensors that have no memory."""
    pytest.importorskip("triton")
    with FakeTensorMode(), ops.using(backend):
        net = TwoLayers(blocks, **SHAPE | options)
        x = torch.randn(batch, SEQ, SHAPE["dim"]).requires_grad_()
        with Trace() as forward, kept_for_backward() as kept, torch.autocast("cpu", enabled=autocast):
            out = net(x)
        with Trace() as backward:
            out.sum().backward()
        yield net, forward, backward, kept


def casts(trace: Trace, net: nn.Module) -> list[tuple[int, ...]]:
    """Shapes of the tensors of all tokens that were cast."""
    weights = {tuple(p.shape) for p in net.parameters()}
    cast = [
        tuple(results[0].shape) for _, _, results in trace.of(CAST) if results[0].numel() >= SEQ * SHAPE["dim_head"]
    ]
    return [shape for shape in cast if shape not in weights]


@pytest.mark.slow
@pytest.mark.parametrize("normformer", [False, True])
def test_kernels_under_autocast_cast_weights_alone(normformer):
    with traced("triton", autocast=True, normformer=normformer) as (net, forward, backward, _):
        assert casts(forward, net) == []
        # into 16 bits: of each sum with the stream, the gradient for the block; and back: that of each linear's operand
        stream = (1, SEQ, SHAPE["dim"])
        assert set(casts(backward, net)) <= {stream} and len(casts(backward, net)) <= 10
        copies = backward.of("clone", "cat")
        assert all(results[0].numel() <= 2 * SEQ * SHAPE["dim_head"] for _, _, results in copies)  # keys beside values


@pytest.mark.slow
def test_kernels_neither_read_nor_keep_a_bias():
    """It is made, for whoever asks for its numbers; no operation takes it, and nothing of its size is kept."""
    with traced("triton") as (_, forward, backward, _):
        large = [name for name, taken, _ in forward.calls if any(map(is_n_by_n, taken))]
        assert set(large) <= {"transpose.int", "permute.default", "clone.default", "prim.device.default"}
        assert not any(is_n_by_n(t) for _, taken, results in backward.calls for t in (*taken, *results))


@pytest.mark.slow
def test_what_kernels_keep_is_less_than_half_of_what_the_peer_keeps(peer):
    import dalle2_pytorch.dalle2_pytorch as theirs

    sizes = {}
    for backend, blocks in ("triton", ours), ("reference", theirs):
        with traced(backend, blocks, autocast=True, batch=8) as (net, _, _, kept):
            weights = {p.untyped_storage()._cdata for p in net.parameters()}
            sizes[blocks] = sum(s.nbytes() for s in kept if s._cdata not in weights)
    assert sizes[ours] < sizes[theirs] / 2


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True])
def test_plain_attention_copies_and_casts_no_logits(autocast):
    """The bias is laid out once, as every layer reads it; 16 bits would be less exact, and take longer."""
    with traced("reference", autocast=autocast) as (_, forward, backward, _):
        copies = [
            name
            for trace in (forward, backward)
            for name, _, results in trace.of("clone", "copy_", CAST, "cat", "masked_fill", "where")
            if is_n_by_n(results[0])
        ]
    assert copies == ["clone.default"]


def test_plain_attention_under_autocast_is_that_of_fp32():
    torch.manual_seed(0)
    q, (k, v) = torch.randn(2, 9, 3, 16).bfloat16(), torch.randn(2, 2, 9, 1, 16).bfloat16()
    bias = torch.randn(9, 3, 9)
    options = dict(scale=16.0, cosine=True, bias=bias)
    with ops.using("reference"):
        wanted = ops.attention(q, k, v, **options)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(ops.attention(q, k, v, **options), wanted)


def test_a_foreign_norm_takes_the_stream_as_it_is_under_autocast():
    """Autocast casts behind a norm; what is not ours must not get rounded numbers before."""
    seen = []

    class Norm(nn.LayerNorm):
        def forward(self, x):
            seen.append(x.dtype)
            return super().forward(x)

    attention, feed_forward = Attention(32, dim_head=16, heads=2), ours.FeedForward(32)
    attention.norm, feed_forward[0] = Norm(32), Norm(32)
    with torch.autocast("cpu", torch.bfloat16):
        feed_forward(attention(torch.randn(1, 5, 32)) + torch.randn(1, 5, 32))
    assert seen == [torch.float32] * 2


# the bias that knows its table


def block_and_bias(heads: int = 2):
    torch.manual_seed(0)
    return Attention(32, dim_head=16, heads=heads, rotary_emb=RotaryEmbedding(16)), RelPosBias(heads=heads)


@pytest.fixture
def given(monkeypatch):
    """What attention was given as a bias by the blocks, "table" or "dense"; and it runs as the reference does."""
    kinds, attention = [], ops.attention

    def note(*args, **options):
        kinds.append("table" if options.get("buckets") is not None else "dense")
        return attention(*args, **options)

    monkeypatch.setattr(ops, "attention", note)
    pytest.importorskip("triton")
    return kinds


def results(attention: Attention, table: RelPosBias, change=lambda bias: bias, seq: int = 5) -> list[torch.Tensor]:
    """Of a block that takes a bias that was changed: its output and gradients."""
    draw = torch.Generator().manual_seed(1)
    x, cotangent = torch.randn(2, 2, seq, 32, generator=draw)
    out = attention(x, attn_bias=change(table(seq, seq + 1)))
    inputs = table.relative_attention_bias.weight, attention.null_kv, attention.to_q.weight
    return [out.detach(), *torch.autograd.grad(out, inputs, cotangent, allow_unused=True)]


def halved(bias):
    with torch.no_grad():
        bias.mul_(0.5)
    return bias


def hooked(bias):
    bias.register_hook(lambda grad: grad * 2)
    return bias


def kept(bias):
    bias.retain_grad()
    return bias


CHANGES = {
    "as it is": (lambda bias: bias, "table"),
    "changed in place": (halved, "dense"),
    "changed through a view": (lambda bias: (halved(bias.transpose(0, 1)), bias)[1], "dense"),
    "multiplied": (lambda bias: bias * 2, "dense"),
    "detached": (lambda bias: bias.detach(), "dense"),
    "detached in place": (lambda bias: bias.clone().detach_(), "dense"),
    "with a hook": (hooked, "dense"),
    "with a gradient of its own": (kept, "dense"),
}


@pytest.mark.slow
@pytest.mark.parametrize("change, kind", CHANGES.values(), ids=CHANGES)
def test_a_bias_stands_for_its_table_while_nobody_touches_it(change, kind, given):
    blocks = block_and_bias()
    with ops.using("triton"):
        found = results(*blocks, change)
    assert given == [kind]
    with ops.using("reference"):
        wanted = results(*blocks, change)
    for mine, other in zip(found, wanted):
        assert (mine is None and other is None) or relative_error(mine, other) < 1e-5

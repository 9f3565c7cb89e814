"""Building blocks of the causal prior transformer, with the parameter names that trained checkpoints use."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprior.kernels import ops, reference
from fastprior.kernels.reference import AttentionArgs, Rotary
from fastprior.models import patches
from fastprior.models.linears import dtype_of, operand_dtype, projected, scales_of
from fastprior.models.patches import are_called_as_they_are, touched

Linear = nn.Linear  # the name by which pickles of whole models, written before, know linears


def l2norm(t: Tensor) -> Tensor:
    """Scale the last dimension to Euclidean length 1."""
    return F.normalize(t, dim=-1)


class LayerNorm(nn.Module):
    """LayerNorm with a gain `g` and no bias, statistics in fp32.

    `eps` is 1e-5, and 1e-3 for 16-bit input to an fp32 module (autocast), as DALLE2-pytorch trains. A module that was
    itself cast to 16 bits keeps 1e-5: it stands in for the fp32 module, whose result 1e-3 would move.
    With `stable=True` each row is first divided by its signed maximum (see `kernels.ops.layer_norm`).
    """

    def __init__(self, dim: int, eps: float = 1e-5, fp16_eps: float = 1e-3, stable: bool = False):
        super().__init__()
        self.eps, self.fp16_eps, self.stable = eps, fp16_eps, stable
        self.g = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, *, after: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """The norm of x (..., dim), plus `after`, in `dtype`: see `kernels.ops.layer_norm`."""
        return ops.layer_norm(x, self.g, eps=self.eps_of(x), stable=self.stable, after=after, dtype=dtype)

    def eps_of(self, x: Tensor) -> float:
        """The eps for x."""
        autocast = x.element_size() < self.g.element_size() and x.element_size() == 2
        return self.fp16_eps if autocast else self.eps


def normed(norm: nn.Module, x: Tensor, *, after: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """`after + norm(x)` in a dtype; whatever stands in the place of a `LayerNorm` is called with x alone."""
    if type(norm) is LayerNorm and are_called_as_they_are(norm):
        return norm(x, after=after, dtype=dtype)
    y = norm(x if type(norm) is LayerNorm or dtype is None else x.to(dtype))
    y = y if after is None else y + after
    return y if dtype is None else y.to(dtype)


def operand(norm: nn.Module, x: Tensor, linear: nn.Module, owner: nn.Module) -> Tensor:
    """The norm of the residual stream x, in the dtype of a linear's product."""
    dtype = operand_dtype(linear, owner, x) if type(norm) is LayerNorm else dtype_of(linear, owner)
    return normed(norm, x, dtype=dtype)


class SinusoidalPosEmb(nn.Module):
    """Embed real-valued times (batch,) as (batch, dim) sines and cosines; computed in fp32."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise TypeError(f"SinusoidalPosEmb: x has dtype {x.dtype}; it must be a floating point tensor")
        half = self.dim // 2
        rate = torch.arange(half, device=x.device, dtype=torch.float32).mul(-math.log(10000) / (half - 1)).exp()
        angles = x.float()[:, None] * rate
        return torch.cat((angles.sin(), angles.cos()), dim=-1).to(x.dtype)


class MLP(nn.Module):
    """`depth` SiLU layers of width `expansion_factor * dim_out`, then a linear to `dim_out`."""

    def __init__(self, dim_in: int, dim_out: int, *, expansion_factor: float = 2.0, depth: int = 2, norm: bool = False):
        super().__init__()
        hidden = int(expansion_factor * dim_out)
        layers = [
            nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.LayerNorm(hidden) if norm else nn.Identity())
            for width in [dim_in, *[hidden] * depth][:depth]
        ]
        self.net = nn.Sequential(*layers, nn.Linear(hidden, dim_out))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.to(dtype_of(self.net, self)))


class TableOfBias(NamedTuple):
    """What a position bias was made of, for kernels, which then need not read it; see `kernels.ops.attention`.

    Attributes:
        table: (num_buckets, heads), a copy of its own: what the weights were.
        buckets: (distances,) int64.
        version: of the bias when it was made.
    """

    table: Tensor
    buckets: Tensor
    version: int

    def stands_for(self, bias: Tensor) -> bool:
        """Whether the bias is what it was, and nobody waits for a gradient of its own."""
        if bias._version != self.version or bias.requires_grad != self.table.requires_grad:
            return False
        return not bias.retains_grad and not bias._backward_hooks


class RelPosBias(nn.Module):
    """T5's relative position bias (Raffel et al. 2020): one learned number per head and distance bucket.

    The key at column 0 is the null key, so the buckets of the real keys are shifted by one; trained weights rely on it.
    """

    def __init__(self, heads: int = 8, num_buckets: int = 32, max_distance: int = 128):
        super().__init__()
        self.num_buckets, self.max_distance = num_buckets, max_distance
        self.relative_attention_bias = nn.Embedding(num_buckets, heads)

    def buckets(self, distances: int, device=None) -> Tensor:
        """The bucket of each distance from 0: (distances,) int64."""
        distance = torch.arange(distances, device=device)
        exact = self.num_buckets // 2
        scale = (self.num_buckets - exact) / math.log(self.max_distance / exact)
        far = exact + (torch.log(distance.clamp(min=1).float() / exact) * scale).long()
        return torch.where(distance < exact, distance, far.clamp(max=self.num_buckets - 1))

    def forward(self, i: int, j: int, *, device=None) -> Tensor:
        """The bias of queries 0..i-1 to keys 0..j-1: (heads, i, j).

        Attention that runs as a Triton kernel takes its table instead, as long as the tensor is not changed.
        """
        table = self.table(device)
        buckets = self.buckets(i, table.device)
        kept = ops.on_triton(table) and not torch.compiler.is_compiling() and not torch.is_inference_mode_enabled()
        table = table.clone() if kept else table
        bias = self._expanded(table, buckets, i, j).permute(1, 0, 2)
        if kept:
            bias.made_of = TableOfBias(table, buckets, bias._version)
        return bias

    def rows(self, start: int, end: int, keys: int, device=None) -> Tensor:
        """The bias of queries start..end-1 to keys 0..keys-1: (end - start, heads, keys)."""
        table = self.table(device)
        return self._expanded(table, self.buckets(end, table.device), end - start, keys)

    @staticmethod
    def _expanded(table: Tensor, buckets: Tensor, queries: int, keys: int) -> Tensor:
        """`reference.expand_bias`, laid out as plain attention reads it: once, and not in every layer."""
        bias = reference.expand_bias(table, buckets, queries, keys)
        return bias if ops.on_triton(table) else bias.contiguous()

    def table(self, device=None) -> Tensor:
        """The bias of each bucket: (num_buckets, heads); whatever stands in the place of its embedding is called."""
        embedding = self.relative_attention_bias
        if type(embedding) is nn.Embedding and are_called_as_they_are(embedding):
            return embedding.weight
        return embedding(torch.arange(self.num_buckets, device=device))


class RotaryEmbedding(nn.Module):
    """Rotary position embedding on interleaved pairs of the first `dim` features (RoFormer, Su et al. 2021).

    `freqs` (dim / 2) is a parameter, as in the rotary-embedding-torch package, so that state dicts agree; it is
    trained only with `learned_freq=True`. Angles are computed in fp32 whatever the dtype of the input.
    """

    def __init__(self, dim: int, custom_freqs: Tensor | None = None, theta: float = 10000, learned_freq: bool = False):
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"RotaryEmbedding: dim={dim}; it must be even and at least 2")
        freqs = 1.0 / theta ** (torch.arange(0, dim, 2).float() / dim) if custom_freqs is None else custom_freqs
        self.freqs = nn.Parameter(freqs, requires_grad=learned_freq)

    def table(self, start: int, end: int, dim_head: int) -> Rotary:
        """cos and sin at positions start..end-1 for `kernels.reference.rotate`: (end - start, width), fp32."""
        angles = torch.arange(start, end, device=self.freqs.device)[:, None] * self.freqs.float()
        still = 0, dim_head // 2 * 2 - 2 * angles.shape[-1]  # features that are not rotated
        cos = torch.stack((angles.cos(), angles.cos()), dim=-1).flatten(-2)
        sin = torch.stack((-angles.sin(), angles.sin()), dim=-1).flatten(-2)
        return F.pad(cos, still, value=1.0), F.pad(sin, still)

    def rotate_queries_or_keys(self, t: Tensor, seq_dim: int = -2, offset: int = 0) -> Tensor:
        """Rotate t (..., seq, dim_head), or (..., seq, heads, dim_head) with `seq_dim=-3`, by its position."""
        cos, sin = self.table(offset, offset + t.shape[seq_dim], t.shape[-1])
        if seq_dim == -3:
            cos, sin = cos[:, None], sin[:, None]
        return reference.rotate(t, cos, sin).to(t.dtype)


class SwiGLU(nn.Module):
    """`kernels.reference.swiglu` as a module."""

    def forward(self, x: Tensor) -> Tensor:
        return reference.swiglu(x)


class FeedForward(nn.Sequential):
    """LayerNorm, linear, SwiGLU, optional LayerNorm (NormFormer, Shleifer et al. 2021), dropout, linear."""

    def __init__(self, dim: int, mult: float = 4, dropout: float = 0.0, post_activation_norm: bool = False):
        inner = int(mult * dim)
        super().__init__(
            LayerNorm(dim),
            nn.Linear(dim, inner * 2, bias=False),
            SwiGLU(),
            LayerNorm(inner) if post_activation_norm else nn.Identity(),
            nn.Dropout(dropout),
            nn.Linear(inner, dim, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        patches.found()  # for `projected`: a block may be called without its network
        norm, expand, *others = self
        x = projected(expand, operand(norm, x, expand, self))
        if ops.on_triton(x) and self._is_gated(*others[:2]):
            inner_norm = others[1]
            gain, eps = (None, 0.0) if type(inner_norm) is nn.Identity else (inner_norm.g, inner_norm.eps_of(x))
            x, others = ops.swiglu_norm(x, gain, eps), others[2:]
        for module in others:
            x = projected(module, x)
        return x

    @staticmethod
    def _is_gated(*modules: nn.Module) -> bool:
        """Whether these are a `SwiGLU` and the norm behind it, or none, as they were written."""
        if [type(module) for module in modules] not in ([SwiGLU, LayerNorm], [SwiGLU, nn.Identity]):
            return False
        return not getattr(modules[1], "stable", False) and are_called_as_they_are(*modules)

    def fused(self, x: Tensor, stream: Tensor, stream_gain: Tensor) -> Tensor:
        """`y + self(y)` of `y = stream + norm(x) * stream_gain`, without dropout, by two kernels."""
        norm, expand, _, inner_norm, _, contract = self
        h, stream = ops.linear(
            x, expand.weight, activation="swiglu", scale=scales_of(expand)[0], stream=stream, stream_gain=stream_gain,
            norm_gain=norm.g, eps=norm.eps, dtype=dtype_of(expand, self),
        )  # fmt: skip
        gain = None if isinstance(inner_norm, nn.Identity) else inner_norm.g
        return ops.linear(
            h, contract.weight, scale=scales_of(contract)[0], norm_gain=gain, eps=norm.eps, residual=stream
        )


class NormedLinear(nn.Sequential):
    """A linear and the norm of its result."""

    def forward(self, x: Tensor, after: Tensor | None = None) -> Tensor:
        linear, norm = self
        return normed(norm, projected(linear, x), after=after)


class Attention(nn.Module):
    """Many query heads over one key/value head, with a learned null key and value in front.

    Args:
        dim: width of the tokens.
        dim_head, heads: width and number of the query heads.
        dropout: on the attention weights, in training.
        causal: token i sees the null key and tokens 0..i.
        rotary_emb: anything with `rotate_queries_or_keys`; the null key is not rotated.
        cosine_sim: l2-normalise queries and keys; logits are then `cosine_sim_scale * cos(q, k)`.
        dot_scale: the factor on q·k without `cosine_sim`. Default 1 / dim_head, which is what DALLE2-pytorch ≥ 1.4.3
            computes; weights from before 1.4.3 need the textbook dim_head ** -0.5.
    """

    def __init__(
        self,
        dim: int,
        *,
        dim_head: int = 64,
        heads: int = 8,
        dropout: float = 0.0,
        causal: bool = False,
        rotary_emb: nn.Module | None = None,
        cosine_sim: bool = True,
        cosine_sim_scale: float = 16,
        dot_scale: float | None = None,
    ):
        super().__init__()
        self.heads, self.causal, self.cosine_sim = heads, causal, cosine_sim
        self.scale = cosine_sim_scale if cosine_sim else (1 / dim_head if dot_scale is None else dot_scale)
        self.norm = LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.null_kv = nn.Parameter(torch.randn(2, dim_head))
        self.to_q = nn.Linear(dim, dim_head * heads, bias=False)
        self.to_kv = nn.Linear(dim, dim_head * 2, bias=False)
        self.rotary_emb = rotary_emb
        self.qkv_scale: Tensor | None = None  # of both projections, where they are quantised
        self.to_out = NormedLinear(nn.Linear(dim_head * heads, dim, bias=False), LayerNorm(dim))

    @property
    def dropout_rate(self) -> float:
        """Chance of dropping an attention weight now."""
        return self.dropout.p if isinstance(self.dropout, nn.Dropout) and self.dropout.training else 0.0

    def strangers(self) -> list[object]:
        """The rotation and the dropout, where it is not enough to know their table and their rate.

        Such a rotation is called with queries and keys, such a dropout with the attention weights.
        """
        rotary, dropout = self.rotary_emb, self.dropout
        found = [] if rotary is None or type(rotary) is RotaryEmbedding else [rotary]
        found += [] if type(dropout) in (nn.Dropout, nn.Identity) else [dropout]
        found += touched([module for module in (rotary, dropout) if isinstance(module, nn.Module)])
        return found + [rotary] * ("rotate_queries_or_keys" in getattr(rotary, "__dict__", ()))

    def normed(self, x: Tensor) -> Tensor:
        """The input of the projections: the norm of the residual stream, in the dtype of their product."""
        return operand(self.norm, x, self.to_q, self)

    def queries(self, h: Tensor) -> Tensor:
        """Raw queries of normed tokens (batch, seq, dim): (batch, seq, heads, dim_head)."""
        return projected(self.to_q, h).unflatten(-1, (self.heads, -1))

    def keys_values(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Raw keys and values of normed tokens (batch, seq, dim): two (batch, seq, 1, dim_head)."""
        return projected(self.to_kv, h).unsqueeze(-2).chunk(2, dim=-1)

    def projections(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Raw queries, keys and values of the residual stream (batch, seq, dim), with heads as above."""
        h = self.normed(x)
        return self.queries(h), *self.keys_values(h)

    def fused_projections(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`projections` by one kernel, with the norm before."""
        y = ops.linear(
            x, self.to_q.weight, beside=self.to_kv.weight, scale=self.qkv_scale, norm_gain=self.norm.g,
            eps=self.norm.eps, dtype=dtype_of(self.to_q, self),
        )  # fmt: skip
        return y.unflatten(-1, (-1, self.null_kv.shape[-1])).split((self.heads, 1, 1), dim=-2)

    def forward(self, x: Tensor, mask: Tensor | None = None, attn_bias: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            x: (batch, seq, dim).
            mask: (batch, seq) bool, False for keys that must not be seen; the null key always is.
            attn_bias: (heads, seq, seq + 1), added to the logits.
        Returns:
            (batch, seq, dim).
        """
        patches.found()  # for `projected`, `attend`, as above
        h, rotary = self.normed(x), None
        q, (k, v) = self.queries(h), self.keys_values(h)
        foreign = patches.is_patched() or bool(self.strangers())
        if self.rotary_emb is not None and not foreign:
            rotary = self.rotary_emb.table(0, x.shape[1], q.shape[-1])
        elif self.rotary_emb is not None:
            rotate = self.rotary_emb.rotate_queries_or_keys
            q, k = (rotate(reference.at_least_fp32(t).transpose(1, 2)).transpose(1, 2) for t in (q, k))
        return self.attend(q, k, v, rotary, dict(**self._bias(attn_bias, x), causal=self.causal), mask=mask)

    def _bias(self, given: Tensor | None, x: Tensor) -> dict:
        """A bias (heads, seq, seq + 1) for tokens x as `attend` takes it: by its table, where kernels run."""
        if given is None:
            return {}
        known, seq = getattr(given, "made_of", None), x.shape[1]
        if known is not None and given.shape == (self.heads, seq, seq + 1) and ops.on_triton(x):
            if known.stands_for(given):
                return dict(bias=known.table, buckets=known.buckets)
        return dict(bias=given.transpose(0, 1))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, rotary: Rotary | None, bias: dict, *, mask=None, residual=None
    ) -> Tensor:
        """Attention of raw queries, keys and values, and the output projection; `residual` is added to it.

        `bias` holds `bias`, `buckets` and `causal` of `kernels.ops.attention`.
        """
        if rotary is not None and rotary[0].requires_grad:  # learned frequencies: kernels give them no gradient
            q, k = (reference.rotate(t, *(table[-t.shape[1] :, None] for table in rotary)) for t in (q, k))
            rotary = None
        options = dict(scale=self.scale, cosine=self.cosine_sim, **bias)
        if not patches.is_patched() and not self.strangers():
            null_kv, dropout = self.null_kv[:, None], self.dropout_rate
            out = ops.attention(q, k, v, rotary=rotary, null_kv=null_kv, dropout=dropout, mask=mask, **options)
        else:
            cos, sin = rotary or (None, None)
            given = AttentionArgs(q, k, v, self.null_kv[:, None], cos, sin, mask=mask, dropout=self.dropout, **options)
            out = reference.attention(given)
        linear = self.to_out[0] if type(self.to_out) is NormedLinear else self.to_q
        return self.projected(out.to(operand_dtype(linear, self, out)), residual)

    def projected(self, out: Tensor, residual: Tensor | None) -> Tensor:
        """What attention gives, behind the output projection and its norm; `residual` is added to it."""
        if type(self.to_out) is NormedLinear and are_called_as_they_are(self.to_out):
            return self.to_out(out, after=residual)
        out = self.to_out(out)
        return out if residual is None else out + residual


patches.watch(LayerNorm, SinusoidalPosEmb, MLP, RelPosBias, SwiGLU, FeedForward, NormedLinear)
patches.watch(Attention, kind=patches.WHOLE)
patches.watch(RotaryEmbedding, names=("rotate_queries_or_keys",), kind=patches.WHOLE)

"""Building blocks of the causal prior transformer, with the parameter names that trained checkpoints use."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprior.kernels import reference as ops


def l2norm(t: Tensor) -> Tensor:
    """Scale the last dimension to Euclidean length 1."""
    return F.normalize(t, dim=-1)


def at_least_fp32(t: Tensor) -> Tensor:
    """16-bit tensors as fp32: logits of scale 16 in bf16 are wrong by several percent."""
    return t.float() if t.element_size() < 4 else t


class LayerNorm(nn.Module):
    """LayerNorm with a gain `g` and no bias, statistics in fp32.

    `eps` is 1e-5, and 1e-3 for 16-bit input to an fp32 module (autocast), as DALLE2-pytorch trains. A module that was
    itself cast to 16 bits keeps 1e-5: it stands in for the fp32 module, whose result 1e-3 would move.
    With `stable=True` each row is first divided by its signed maximum (see `kernels.reference.layer_norm`).
    """

    def __init__(self, dim: int, eps: float = 1e-5, fp16_eps: float = 1e-3, stable: bool = False):
        super().__init__()
        self.eps, self.fp16_eps, self.stable = eps, fp16_eps, stable
        self.g = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        autocast = x.element_size() < self.g.element_size() and x.element_size() == 2
        eps = self.fp16_eps if autocast else self.eps
        return ops.layer_norm(x, self.g, eps, self.stable)


class Linear(nn.Linear):
    """nn.Linear that is fast for few rows too, see `kernels.reference.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


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
        widths = [dim_in] + [hidden] * depth
        hidden_layers = [
            nn.Sequential(nn.Linear(i, o), nn.SiLU(), nn.LayerNorm(o) if norm else nn.Identity())
            for i, o in itertools.pairwise(widths)
        ]
        self.net = nn.Sequential(*hidden_layers, nn.Linear(hidden, dim_out))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.to(self.net[-1].weight.dtype))


class RelPosBias(nn.Module):
    """T5's relative position bias (Raffel et al. 2020): one learned number per head and distance bucket.

    The key at column 0 is the null key, so the buckets of the real keys are shifted by one; trained weights rely on it.
    """

    def __init__(self, heads: int = 8, num_buckets: int = 32, max_distance: int = 128):
        super().__init__()
        self.num_buckets, self.max_distance = num_buckets, max_distance
        self.relative_attention_bias = nn.Embedding(num_buckets, heads)

    def _buckets(self, rows: Tensor, cols: Tensor) -> Tensor:
        distance = (rows[:, None] - cols[None, :]).clamp(min=0)
        exact = self.num_buckets // 2
        scale = (self.num_buckets - exact) / math.log(self.max_distance / exact)
        far = exact + (torch.log(distance.clamp(min=1).float() / exact) * scale).long()
        return torch.where(distance < exact, distance, far.clamp(max=self.num_buckets - 1))

    def forward(self, i: int, j: int, *, device=None) -> Tensor:
        """The bias of queries 0..i-1 to keys 0..j-1: (heads, i, j)."""
        return self.rows(0, i, j, device).permute(1, 0, 2)

    def rows(self, start: int, end: int, keys: int, device=None) -> Tensor:
        """The bias of queries start..end-1 to keys 0..keys-1: (end - start, heads, keys)."""
        buckets = self._buckets(torch.arange(start, end, device=device), torch.arange(keys, device=device))
        return self.relative_attention_bias(buckets).transpose(1, 2)


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

    def table(self, start: int, end: int, dim_head: int) -> tuple[Tensor, Tensor]:
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
        return ops.rotate(t, cos, sin).to(t.dtype)


class SwiGLU(nn.Module):
    """`x * silu(gate)` of the two halves of the last dimension (GLU Variants, Shazeer 2020)."""

    def forward(self, x: Tensor) -> Tensor:
        x, gate = x.chunk(2, dim=-1)
        return x * F.silu(gate)


class FeedForward(nn.Sequential):
    """LayerNorm, linear, SwiGLU, optional LayerNorm (NormFormer, Shleifer et al. 2021), dropout, linear."""

    def __init__(self, dim: int, mult: float = 4, dropout: float = 0.0, post_activation_norm: bool = False):
        inner = int(mult * dim)
        super().__init__(
            LayerNorm(dim),
            Linear(dim, inner * 2, bias=False),
            SwiGLU(),
            LayerNorm(inner) if post_activation_norm else nn.Identity(),
            nn.Dropout(dropout),
            Linear(inner, dim, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        norm, expand, activation, inner_norm, dropout, contract = self
        h = activation(expand(norm(x).to(expand.weight.dtype)))
        return contract(dropout(inner_norm(h)))


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
        self.to_q = Linear(dim, dim_head * heads, bias=False)
        self.to_kv = Linear(dim, dim_head * 2, bias=False)
        self.rotary_emb = rotary_emb
        self.to_out = nn.Sequential(Linear(dim_head * heads, dim, bias=False), LayerNorm(dim))

    def normed(self, x: Tensor) -> Tensor:
        """The input of the projections: the norm of the residual stream, in the weights' dtype."""
        return self.norm(x).to(self.to_q.weight.dtype)

    def queries(self, h: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """Queries ready for the dot product, of normed tokens (batch, seq, dim): (batch, seq, heads, dim_head)."""
        q = at_least_fp32(self.to_q(h)).unflatten(-1, (self.heads, -1))
        if rotary is not None:
            q = ops.rotate(q, *(t[:, None] for t in rotary))
        if self.cosine_sim:
            q = l2norm(q)
        return q * self.scale

    def keys_values(self, h: Tensor, rotary: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Keys and values of normed tokens (batch, seq, dim), without the null ones: two (batch, seq, dim_head)."""
        k, v = at_least_fp32(self.to_kv(h)).chunk(2, dim=-1)
        if rotary is not None:
            k = ops.rotate(k, *rotary)
        return l2norm(k) if self.cosine_sim else k, v

    def with_null(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put the null key and value in front of (batch, seq, dim_head) keys and values."""
        null_k, null_v = self.null_kv.to(k.dtype)
        if self.cosine_sim:
            null_k = l2norm(null_k)
        return tuple(torch.cat((null.expand(len(t), 1, -1), t), dim=1) for null, t in ((null_k, k), (null_v, v)))

    def forward(self, x: Tensor, mask: Tensor | None = None, attn_bias: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            x: (batch, seq, dim).
            mask: (batch, seq) bool, False for keys that must not be seen; the null key always is.
            attn_bias: (heads, seq, seq + 1), added to the logits.
        Returns:
            (batch, seq, dim).
        """
        h = self.normed(x)
        seq = x.shape[1]
        if self.rotary_emb is None or isinstance(self.rotary_emb, RotaryEmbedding):
            rotary = self.rotary_emb and self.rotary_emb.table(0, seq, self.null_kv.shape[-1])
            q, (k, v) = self.queries(h, rotary), self.keys_values(h, rotary)
        else:
            q = at_least_fp32(self.to_q(h)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            k, v = at_least_fp32(self.to_kv(h)).chunk(2, dim=-1)
            q, k = (self.rotary_emb.rotate_queries_or_keys(t) for t in (q, k))
            q, k = (l2norm(q), l2norm(k)) if self.cosine_sim else (q, k)
            q = q.transpose(1, 2) * self.scale
        bias = None if attn_bias is None else attn_bias.transpose(0, 1)
        if self.causal:
            bias = causal_bias(bias, 0, seq, self.heads, x.device)
        mask = None if mask is None else F.pad(mask, (1, 0), value=True)
        return self.attend(q, *self.with_null(k, v), None if bias is None else bias.flatten(0, 1), mask)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None = None) -> Tensor:
        out = ops.attention(q, k, v, bias, mask, self.dropout.p if self.training else 0.0)
        return self.to_out(out.to(self.to_q.weight.dtype))


def causal_bias(bias: Tensor | None, start: int, end: int, heads: int, device) -> Tensor:
    """`bias` (end - start, heads, end + 1) with -inf where query i may not see a key: beyond column i + 1."""
    hidden = torch.arange(end + 1, device=device) > torch.arange(start, end, device=device)[:, None] + 1
    if bias is None:
        bias = torch.zeros(1, heads, 1, device=device)
    return bias.masked_fill(hidden[:, None, :], -math.inf)


class KVCache(NamedTuple):
    """What a step needs of the prefix: keys and values (depth, prompts, prefix + 1, dim_head), the null ones first, and
    the suffix's attention bias (suffix * heads, prefix + 1 + suffix) and rotary table (suffix, width)."""

    k: Tensor
    v: Tensor
    bias: Tensor
    rotary: tuple[Tensor, Tensor] | None


class CausalTransformer(nn.Module):
    """Causal transformer with one relative position bias for all layers, and a prefix cache.

    `forward` runs a whole sequence. `prefill` runs a prefix once and `step` any number of suffixes after it: because
    attention is causal, the prefix's keys and values do not depend on what follows.
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        dim_head: int = 64,
        heads: int = 8,
        ff_mult: float = 4,
        norm_in: bool = False,
        norm_out: bool = True,
        attn_dropout: float = 0.0,
        ff_dropout: float = 0.0,
        final_proj: bool = True,
        normformer: bool = False,
        rotary_emb: bool = True,
        cosine_sim: bool = True,
        dot_scale: float | None = None,
    ):
        super().__init__()
        self.init_norm = LayerNorm(dim) if norm_in else nn.Identity()
        self.rel_pos_bias = RelPosBias(heads=heads)
        self.heads = heads
        rotary = RotaryEmbedding(dim=min(32, dim_head)) if rotary_emb else None
        attention = dict(
            dim=dim, causal=True, dim_head=dim_head, heads=heads, dropout=attn_dropout, rotary_emb=rotary,
            cosine_sim=cosine_sim, dot_scale=dot_scale,
        )  # fmt: skip
        self.layers = nn.ModuleList(
            nn.ModuleList([
                Attention(**attention),
                FeedForward(dim=dim, mult=ff_mult, dropout=ff_dropout, post_activation_norm=normformer),
            ])
            for _ in range(depth)
        )  # fmt: skip
        self.norm = LayerNorm(dim, stable=True) if norm_out else nn.Identity()
        self.project_out = Linear(dim, dim, bias=False) if final_proj else nn.Identity()

    def _bias(self, start: int, end: int, device) -> Tensor:
        return causal_bias(self.rel_pos_bias.rows(start, end, end + 1, device), start, end, self.heads, device)

    def _rotary(self, start: int, end: int) -> tuple[Tensor, Tensor] | None:
        attn = self.layers[0][0]
        return attn.rotary_emb and attn.rotary_emb.table(start, end, attn.null_kv.shape[-1])

    def _head(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return x if isinstance(self.project_out, nn.Identity) else self.project_out(x.to(self.project_out.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Run all of x (batch, seq, dim), dtype fp32 or wider (fp16 and bf16 are taken too): (batch, seq, dim)."""
        x = self.init_norm(x)
        bias = self.rel_pos_bias(x.shape[1], x.shape[1] + 1, device=x.device)
        for attn, ff in self.layers:
            x = attn(x, attn_bias=bias) + x
            x = ff(x) + x
        return self._head(x)

    def last(self, x: Tensor) -> Tensor:
        """`forward(x)[:, -1]`, (batch, dim), with only the last token computed where no other is needed."""
        seq = x.shape[1]
        x = self.init_norm(x)
        bias, rotary = self._bias(0, seq, x.device).flatten(0, 1), self._rotary(0, seq)
        for index, (attn, ff) in enumerate(self.layers):
            h = attn.normed(x)
            kv = attn.with_null(*attn.keys_values(h, rotary))
            if index == len(self.layers) - 1:
                x, h, bias = x[:, -1:], h[:, -1:], bias[-self.heads :]
                rotary = rotary and tuple(t[-1:] for t in rotary)
            x = attn.attend(attn.queries(h, rotary), *kv, bias) + x
            x = ff(x) + x
        return self._head(x[:, -1])

    def prefill(self, x: Tensor, suffix: int) -> KVCache:
        """Run the prefix x (prompts, prefix, dim) and return what `suffix` tokens after it need."""
        prefix = x.shape[1]
        x = self.init_norm(x)
        bias, rotary = self._bias(0, prefix, x.device).flatten(0, 1), self._rotary(0, prefix)
        cache = []
        for index, (attn, ff) in enumerate(self.layers):
            h = attn.normed(x)
            cache.append(attn.with_null(*attn.keys_values(h, rotary)))
            if index < len(self.layers) - 1:
                x = attn.attend(attn.queries(h, rotary), *cache[-1], bias) + x
                x = ff(x) + x
        end = prefix + suffix
        k, v = (torch.stack(t) for t in zip(*cache))
        return KVCache(k, v, self._bias(prefix, end, x.device).flatten(0, 1).to(k.dtype), self._rotary(prefix, end))

    def step(self, x: Tensor, cache: KVCache) -> Tensor:
        """The output of the last of the suffix tokens x (rows, suffix, dim) behind the cached prefix: (rows, dim).

        `rows` is a multiple of the cache's prompts; the rows of one prompt lie together.
        """
        x = self.init_norm(x)
        bias, rotary = cache.bias, cache.rotary
        for index, (attn, ff) in enumerate(self.layers):
            h = attn.normed(x)
            k, v = attn.keys_values(h, rotary)
            if index == len(self.layers) - 1:
                x, h, bias = x[:, -1:], h[:, -1:], bias[-self.heads :]
                rotary = rotary and tuple(t[-1:] for t in rotary)
            out = ops.decode_attention(attn.queries(h, rotary), cache.k[index], cache.v[index], k, v, bias)
            x = attn.to_out(out.to(h.dtype)) + x
            x = ff(x) + x
        return self._head(x[:, -1])

"""Building blocks of the causal prior transformer, with the parameter names that trained checkpoints use."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprior.kernels import ops, reference
from fastprior.kernels.reference import Rotary
from fastprior.row_layout import RowLayout


def l2norm(t: Tensor) -> Tensor:
    """Scale the last dimension to Euclidean length 1."""
    return F.normalize(t, dim=-1)


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

    def forward(self, x: Tensor, *, after: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """The norm of x (..., dim), plus `after`, in `dtype`: see `kernels.reference.layer_norm`."""
        autocast = x.element_size() < self.g.element_size() and x.element_size() == 2
        eps = self.fp16_eps if autocast else self.eps
        return ops.layer_norm(x, self.g, eps=eps, stable=self.stable, after=after, dtype=dtype)


class Linear(nn.Linear):
    """nn.Linear that is fast for few rows too, see `kernels.reference.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


class QuantisedLinear(nn.Module):
    """A linear of few rows whose weight is int8 or float8_e4m3fn, with a scale for each row of it; no gradients.

    Args:
        linear: whose weight it takes; `update` takes it again.
        dtype: of the quantised weight.

    Attributes:
        product_dtype: that of the linear, and of results.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype):
        super().__init__()
        self.source, self.bias, self.product_dtype = (linear,), linear.bias, linear.weight.dtype
        self.register_buffer("weight", torch.empty_like(linear.weight, dtype=dtype))
        self.register_buffer("scale", torch.empty(len(linear.weight), device=linear.weight.device))
        self.update()

    @torch.no_grad()
    def update(self) -> None:
        """Quantise the source's weight again: each row over the range of the dtype, int8 rounded to nearest."""
        weight, whole = self.source[0].weight.float(), not self.weight.dtype.is_floating_point
        most = torch.iinfo(torch.int8).max if whole else torch.finfo(self.weight.dtype).max
        self.scale.copy_(weight.abs().amax(dim=1).clamp(min=1e-30) / most)
        weight = weight / self.scale[:, None]
        self.weight.copy_(weight.round() if whole else weight)

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias, scale=self.scale)


def product_dtype(linear: nn.Module) -> torch.dtype:
    """The dtype that a linear takes and gives."""
    return getattr(linear, "product_dtype", linear.weight.dtype)


def scale_of(linear: nn.Module) -> Tensor | None:
    """Of the rows of a quantised weight; None of another."""
    return linear.scale if type(linear) is QuantisedLinear else None


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

    def buckets(self, distances: int, device=None) -> Tensor:
        """The bucket of each distance from 0: (distances,) int64."""
        distance = torch.arange(distances, device=device)
        exact = self.num_buckets // 2
        scale = (self.num_buckets - exact) / math.log(self.max_distance / exact)
        far = exact + (torch.log(distance.clamp(min=1).float() / exact) * scale).long()
        return torch.where(distance < exact, distance, far.clamp(max=self.num_buckets - 1))

    def forward(self, i: int, j: int, *, device=None) -> Tensor:
        """The bias of queries 0..i-1 to keys 0..j-1: (heads, i, j)."""
        return self.rows(0, i, j, device).permute(1, 0, 2)

    def rows(self, start: int, end: int, keys: int, device=None) -> Tensor:
        """The bias of queries start..end-1 to keys 0..keys-1: (end - start, heads, keys)."""
        table = self.relative_attention_bias.weight
        return reference.expand_bias(table, self.buckets(end, table.device), end - start, keys)


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
        h = activation(expand(norm(x, dtype=product_dtype(expand))))
        return contract(dropout(inner_norm(h)))

    def fused(self, x: Tensor, stream: Tensor, stream_gain: Tensor) -> Tensor:
        """`y + self(y)` of `y = stream + norm(x) * stream_gain`, without dropout, by two kernels."""
        norm, expand, _, inner_norm, _, contract = self
        norms = dict(
            stream=stream, stream_gain=stream_gain, norm_gain=norm.g, eps=norm.eps, dtype=product_dtype(expand)
        )
        h, stream = ops.linear(x, expand.weight, activation="swiglu", scale=scale_of(expand), **norms)
        gain = None if isinstance(inner_norm, nn.Identity) else inner_norm.g
        around = dict(norm_gain=gain, eps=norm.eps, residual=stream)
        return ops.linear(h, contract.weight, scale=scale_of(contract), **around)


def _own_modules(attn: Attention, ff: FeedForward) -> tuple[nn.Module, ...]:
    return attn.norm, attn.to_q, attn.to_kv, attn.to_out, *attn.to_out, ff, *ff


def _is_plain(module: nn.Module) -> bool:
    """Whether a call does what the weights say: no subclass, such as an adapter, no hook, no replaced forward."""
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    own = NormedLinear, FeedForward, Linear, QuantisedLinear, LayerNorm, SwiGLU, nn.Dropout, nn.Identity
    return type(module) in own and not hooked


class NormedLinear(nn.Sequential):
    """A linear and the norm of its result."""

    def forward(self, x: Tensor, after: Tensor | None = None) -> Tensor:
        linear, norm = self
        return norm(linear(x), after=after)


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
        self.qkv_scale: Tensor | None = None  # of both projections, where they are quantised
        self.to_out = NormedLinear(Linear(dim_head * heads, dim, bias=False), LayerNorm(dim))

    def normed(self, x: Tensor) -> Tensor:
        """The input of the projections: the norm of the residual stream, in the weights' dtype."""
        return self.norm(x, dtype=product_dtype(self.to_q))

    def queries(self, h: Tensor) -> Tensor:
        """Raw queries of normed tokens (batch, seq, dim): (batch, seq, heads, dim_head)."""
        return self.to_q(h).unflatten(-1, (self.heads, -1))

    def keys_values(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Raw keys and values of normed tokens (batch, seq, dim): two (batch, seq, 1, dim_head)."""
        return self.to_kv(h).unsqueeze(-2).chunk(2, dim=-1)

    def projections(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Raw queries, keys and values of the residual stream (batch, seq, dim), with heads as above."""
        h = self.normed(x)
        return self.queries(h), *self.keys_values(h)

    def fused_projections(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`projections` by one kernel, with the norm before."""
        dim_head, norm = self.null_kv.shape[-1], dict(norm_gain=self.norm.g, eps=self.norm.eps)
        weights = dict(beside=self.to_kv.weight, scale=self.qkv_scale, dtype=product_dtype(self.to_q))
        y = ops.linear(x, self.to_q.weight, **weights, **norm)
        return y.unflatten(-1, (-1, dim_head)).split((self.heads, 1, 1), dim=-2)

    def forward(self, x: Tensor, mask: Tensor | None = None, attn_bias: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            x: (batch, seq, dim).
            mask: (batch, seq) bool, False for keys that must not be seen; the null key always is.
            attn_bias: (heads, seq, seq + 1), added to the logits.
        Returns:
            (batch, seq, dim).
        """
        h, rotary = self.normed(x), None
        q, (k, v) = self.queries(h), self.keys_values(h)
        if isinstance(self.rotary_emb, RotaryEmbedding):
            rotary = self.rotary_emb.table(0, x.shape[1], q.shape[-1])
        elif self.rotary_emb is not None:
            rotate = self.rotary_emb.rotate_queries_or_keys
            q, k = (rotate(reference.at_least_fp32(t).transpose(1, 2)).transpose(1, 2) for t in (q, k))
        bias = None if attn_bias is None else attn_bias.transpose(0, 1)
        return self.attend(q, k, v, rotary, dict(bias=bias, causal=self.causal), mask=mask)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rotary: Rotary | None, bias: dict, **kwargs) -> Tensor:
        """Attention of raw queries, keys and values, and the output projection; `residual` is added to it.

        Args:
            bias: `bias`, `buckets` and `causal` of `kernels.reference.attention`.
            **kwargs: `mask`, `residual`.
        """
        residual = kwargs.pop("residual", None)
        if rotary is not None and rotary[0].requires_grad:  # learned frequencies: kernels give them no gradient
            q, k = (reference.rotate(t, *(table[-t.shape[1] :, None] for table in rotary)) for t in (q, k))
            rotary = None
        out = ops.attention(
            q, k, v, scale=self.scale, rotary=rotary, cosine=self.cosine_sim, null_kv=self.null_kv[:, None],
            dropout=self.dropout.p if self.training else 0.0, **bias, **kwargs,
        )  # fmt: skip
        return self.to_out(out.to(product_dtype(self.to_q)), after=residual)


class KVCache(NamedTuple):
    """What steps share: of the prefix keys and values (depth, prompts, prefix + 1, 1, dim_head), the null ones first,
    of the suffix the attention bias (suffix, heads, prefix + 1 + suffix) and rotary table (suffix, width), of the
    layers what `CausalTransformer.prepared` gives; without it each step asks; and how many samples a row holds."""

    k: Tensor
    v: Tensor
    bias: Tensor
    rotary: Rotary | None
    blocks: ops.Blocks | None = None
    samples: int = 1


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
        """Position bias of queries start..end-1 to the null key and keys 0..end-1, -inf where a key may not be seen."""
        bias = self.rel_pos_bias.rows(start, end, end + 1, device)
        hidden = torch.arange(end + 1, device=device) > torch.arange(start, end, device=device)[:, None] + 1
        return bias.masked_fill(hidden[:, None], -math.inf)

    def _attention_bias(self, seq: int, x: Tensor) -> dict:
        """The same for all of a sequence, as `Attention.attend` takes it: kernels read the table themselves."""
        if not ops.on_triton(x):
            return dict(bias=self._bias(0, seq, x.device))
        table = self.rel_pos_bias.relative_attention_bias.weight
        return dict(bias=table, buckets=self.rel_pos_bias.buckets(seq, x.device), causal=True)

    def _rotary(self, start: int, end: int) -> Rotary | None:
        attn = self.layers[0][0]
        return attn.rotary_emb and attn.rotary_emb.table(start, end, attn.null_kv.shape[-1])

    def _head(self, x: Tensor) -> Tensor:
        if isinstance(self.project_out, nn.Identity):
            return self.norm(x)
        return self.project_out(self.norm(x).to(product_dtype(self.project_out)))

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
        bias, rotary = self._attention_bias(seq, x), self._rotary(0, seq)
        for index, (attn, ff) in enumerate(self.layers):
            h = attn.normed(x)
            kv = attn.keys_values(h)
            if index == len(self.layers) - 1:
                x, h = x[:, -1:], h[:, -1:]
                if "buckets" not in bias:
                    bias = dict(bias=bias["bias"][-1:])
            x = attn.attend(attn.queries(h), *kv, rotary, bias, residual=x)
            x = ff(x) + x
        return self._head(x[:, -1])

    def prefill(self, x: Tensor, suffix: int) -> KVCache:
        """Run the prefix x (prompts, prefix, dim) and return what `suffix` tokens after it need."""
        prefix, blocks = x.shape[1], self.prepared() if x.is_cpu else None
        with ops.one_thread(x):
            x, end, rotary = self.init_norm(x), prefix + suffix, self._rotary(0, prefix)
            null = torch.stack([attn.null_kv for attn, _ in self.layers])  # (depth, 2, dim_head)
            null = self._as_prefix(reference.at_least_fp32(null)[:, None, None, :, None], None)
            found = self._keys_values_by_blocks(x, blocks, null, rotary)
        if found is None:
            found = self._keys_values(x, rotary)
        with ops.one_thread(found):
            own = self._as_prefix(found, rotary)
            k, v = (torch.cat((n.expand(-1, len(x), -1, -1, -1), t), dim=2) for n, t in zip(null, own))
            return KVCache(k, v, self._bias(prefix, end, x.device).to(k.dtype), self._rotary(prefix, end), blocks)

    def _as_prefix(self, kv: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor]:
        """Keys and values as `decode_attention` takes those of a prefix, rotated and normalised.

        Args:
            kv: (depth, prompts, seq, 2, 1, dim_head), at least fp32.
        Returns:
            Both (depth, prompts, seq, 1, dim_head).
        """
        k, v = kv.unbind(3)
        return reference.prepare_heads(k, rotary, self.layers[0][0].cosine_sim), v

    def _keys_values(self, x: Tensor, rotary: Rotary | None) -> Tensor:
        """Keys and values of all layers for a prefix, (depth, prompts, seq, 2, 1, dim_head), at least fp32."""
        bias, found = self._attention_bias(x.shape[1], x), []
        for index, (attn, ff) in enumerate(self.layers):
            h = attn.normed(x)
            kv = attn.keys_values(h)
            found.append(torch.stack(kv, dim=2))
            if index < len(self.layers) - 1:
                x = attn.attend(attn.queries(h), *kv, rotary, bias, residual=x)
                x = ff(x) + x
        return reference.at_least_fp32(torch.stack(found))

    def _keys_values_by_blocks(
        self, x: Tensor, blocks: ops.Blocks | None, null: tuple[Tensor, Tensor], rotary: Rotary | None
    ) -> Tensor | None:
        """The same by `ops.run_blocks`, for which the null keys are the prefix; None where it does not compute this."""
        if blocks is None:
            return None
        seq, found = x.shape[1], []
        around = dict(outputs=0, rotary=rotary, bias=self._bias(0, seq, x.device))
        for part in x.split(max(1, ops.most_tokens(blocks) // seq)):
            kv = ops.run_blocks(part, blocks, *(t.expand(-1, len(part), -1, -1, -1) for t in null), **around)
            if kv is None:
                return None
            found.append(kv)
        return torch.cat(found, dim=1)

    def share(self, cache: KVCache, layout: RowLayout) -> KVCache:
        """The cache for steps whose rows hold several samples of a prompt."""
        tokens, prefix = layout.tokens, cache.k.shape[2]
        bias = cache.bias[tokens]
        own = bias[..., prefix + tokens].masked_fill(layout.hidden[:, None], -math.inf)
        rotary = cache.rotary and tuple(t[tokens] for t in cache.rotary)
        bias = torch.cat((bias[..., :prefix], own), dim=-1)
        return cache._replace(bias=bias, rotary=rotary, samples=layout.samples)

    def _is_plain(self) -> bool:
        """Whether kernels that compute several modules at once compute what these do."""
        modules = [module for layer in self.layers for module in _own_modules(*layer)]
        plain = not self.training and all(map(_is_plain, modules))
        return plain and len({module.eps for module in modules if isinstance(module, LayerNorm)}) == 1

    def _by_blocks(self, x: Tensor, cache: KVCache, outputs: int) -> Tensor | None:
        """`ops.run_blocks` of all layers, and the head of outputs; None where it does not compute this."""
        if not x.is_cpu:
            return None
        blocks = cache.blocks
        if blocks is None or blocks.owner is not self:
            blocks = self.prepared()
        found = ops.run_blocks(x, blocks, cache.k, cache.v, outputs=outputs, rotary=cache.rotary, bias=cache.bias)
        return found if found is None or not outputs or blocks.has_head else self._head(found)

    def prepared(self) -> ops.Blocks | None:
        """The layers as one kernel of the CPU runs all of them, for as long as no module, hook or mode changes.

        None where there is no such kernel, or a trace must look at each module.
        """
        if torch.compiler.is_compiling() or not self._is_plain():
            return None
        attn = self.layers[0][0]
        sizes = dict(owner=self, heads=attn.heads, kv_heads=1, dim_head=attn.null_kv.shape[-1])
        how = dict(scale=attn.scale, cosine=attn.cosine_sim, activation="swiglu", eps=attn.norm.eps)
        return ops.prepare_blocks(self._blocks(), **sizes, **how, head=self._head_block())

    def _head_block(self) -> ops.Block | None:
        norm, linear, attn = self.norm, self.project_out, self.layers[0][0]
        plain = type(norm) is LayerNorm and type(linear) is type(attn.to_q) and _is_plain(norm) and _is_plain(linear)
        if not plain or not norm.stable or norm.eps != attn.norm.eps or linear.weight.dtype != attn.to_q.weight.dtype:
            return None
        return ops.Block(q=linear.weight, q_scale=scale_of(linear), norm_gain=norm.g)

    def _blocks(self) -> list[ops.Block]:
        found = []
        for attn, ff in self.layers:
            linears = attn.to_q, attn.to_kv, None, attn.to_out[0], ff[1], ff[5]
            parts = [(None, None) if linear is None else (linear.weight, scale_of(linear)) for linear in linears]
            weights, scales = zip(*parts)
            gains = dict(norm_gain=attn.norm.g, out_gain=attn.to_out[1].g, ff_gain=ff[0].g)
            inner = None if isinstance(ff[3], nn.Identity) else ff[3].g
            found.append(ops.Block(*weights, *scales, **gains, inner_gain=inner))
        return found

    def step(self, x: Tensor, cache: KVCache) -> Tensor:
        """The output of the last suffix token of each sample behind the cached prefix.

        Args:
            x: (rows, suffix, dim); rows is a multiple of the cache's prompts, and those of one prompt lie together.
            cache: from `prefill`, or `share` where rows hold several samples.
        Returns:
            (rows * samples, dim), in the weights' dtype or fp32.
        """
        x, outputs = self.init_norm(x), cache.samples
        if (out := self._by_blocks(x, cache, outputs)) is not None:
            return out.flatten(0, 1)
        fused = ops.on_triton(x) and self._is_plain() and not torch.is_autocast_enabled(x.device.type)
        for index, (attn, ff) in enumerate(self.layers):
            q, k, v = attn.fused_projections(x) if fused else attn.projections(x)
            if index == len(self.layers) - 1:
                x, q = x[:, -outputs:], q[:, -outputs:]
            out = ops.decode_attention(
                q, k, v, cache.k[index], cache.v[index], scale=attn.scale, rotary=cache.rotary,
                cosine=attn.cosine_sim, bias=cache.bias, dropout=attn.dropout.p if self.training else 0.0,
            )  # fmt: skip
            if fused:
                x = ff.fused(attn.to_out[0](out), stream=x, stream_gain=attn.to_out[1].g)
            else:
                x = attn.to_out(out, after=x)
                x = ff(x) + x
        return self._head(x.flatten(0, 1))

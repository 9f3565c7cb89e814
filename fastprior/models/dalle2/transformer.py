"""The causal transformer: whole, or as a prefill of the prefix and steps of the suffix behind it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastprior.kernels import ops, reference
from fastprior.kernels.reference import Rotary
from fastprior.models.dalle2.layers import (
    Attention,
    FeedForward,
    LayerNorm,
    Linear,
    NormedLinear,
    RelPosBias,
    RotaryEmbedding,
    SwiGLU,
)
from fastprior.models.quantised_linear import QuantisedLinear, product_dtype, scale_of
from fastprior.models.shared_rows import RowLayout


def _own_modules(attn: Attention, ff: FeedForward) -> tuple[nn.Module, ...]:
    return attn.norm, attn.to_q, attn.to_kv, attn.to_out, *attn.to_out, ff, *ff


def _is_plain(module: nn.Module) -> bool:
    """Whether a call does what the weights say: no subclass, such as an adapter, no hook, no replaced forward."""
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    own = NormedLinear, FeedForward, Linear, QuantisedLinear, LayerNorm, SwiGLU, nn.Dropout, nn.Identity
    return type(module) in own and not hooked


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

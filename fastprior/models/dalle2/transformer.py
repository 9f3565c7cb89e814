"""The causal transformer: whole, or as a prefill of the prefix and steps of the suffix behind it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprior.checks import MOST, check_count, check_number, check_share
from fastprior.kernels import ops, reference
from fastprior.kernels.reference import Rotary
from fastprior.models import patches, snapshot
from fastprior.models.dalle2.layers import (
    Attention,
    FeedForward,
    LayerNorm,
    NormedLinear,
    RelPosBias,
    RotaryEmbedding,
    SwiGLU,
)
from fastprior.models.linears import PLAIN, dtype_of, projected, scales_of
from fastprior.models.patches import are_called_as_they_are
from fastprior.models.quantised_linear import QuantisedLinear
from fastprior.models.shared_rows import RowLayout

LINEAR, NORM = (nn.Linear, QuantisedLinear), (LayerNorm,)
# what stands in a layer that kernels compute as a whole, in the order of `_modules_of`
LAYER = (
    *(NORM, LINEAR, LINEAR, (NormedLinear,), LINEAR, NORM),
    *((FeedForward,), NORM, LINEAR, (SwiGLU,), (LayerNorm, nn.Identity), (nn.Dropout, nn.Identity), LINEAR),
)


def _modules_of(attn: Attention, ff: FeedForward) -> list[nn.Module]:
    """The modules of a layer, without those of other ones that stand in it."""
    inside = (block if isinstance(block, nn.Sequential) else () for block in (attn.to_out, ff))
    of_attention, of_ff = inside
    return [attn.norm, attn.to_q, attn.to_kv, attn.to_out, *of_attention, ff, *of_ff]


def _are_of(modules: Sequence[nn.Module], kinds: Sequence[tuple[type, ...]]) -> bool:
    """Whether modules are what kernels compute from weights: no subclass, such as an adapter, and no bias, either."""
    if len(modules) != len(kinds):
        return False
    for module, known in zip(modules, kinds):
        if type(module) not in known:
            return False
        if type(module) is nn.Linear:
            weights = module._parameters
            if type(weights.get("weight")) not in PLAIN or weights.get("bias") is not None:
                return False
        elif type(module) is QuantisedLinear and module.bias is not None:
            return False
        elif type(module) is LayerNorm and module.stable:
            return False
    return True


def _rows(rotary: Rotary | None, positions: slice | Tensor) -> Rotary | None:
    return rotary and tuple(table[positions] for table in rotary)


class KVCache(NamedTuple):
    """Keys and values of a prefix, and all else that steps behind it share.

    Attributes:
        k, v: (depth, prompts, prefix + 1, 1, dim_head), the null ones first; of 16 bits where kernels multiply in them.
        bias: (suffix, heads, prefix + 1 + suffix), of the suffix's attention.
        rotary: the suffix's table (suffix, width).
        blocks: what `CausalTransformer.prepared` gives; without it each step asks.
        samples: how many a row holds.
    """

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
        for name, value, most in (("dim", dim, MOST), ("depth", depth, 2**12), ("dim_head", dim_head, MOST)):
            check_count(name, value, most=most)
        check_count("heads", heads)
        check_number("ff_mult", ff_mult, above=0, most=2**10)
        check_share("attn_dropout", attn_dropout)
        check_share("ff_dropout", ff_dropout)
        if dot_scale is not None:
            check_number("dot_scale", dot_scale)
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
        self.project_out = nn.Linear(dim, dim, bias=False) if final_proj else nn.Identity()

    def obstacles(self) -> list[str]:
        """Why prefix and suffix cannot run apart: a module that must be called whole, or a patch; empty when they can.

        What stands in the place of a linear or a norm is called there, token by token.
        """
        found, ways, blocks = list(patches.found().whole), set(), [self]
        for layer in self.layers:
            for block, kind in zip(layer, (Attention, FeedForward)):
                blocks.append(block)
                if type(block) is not kind:
                    found.append(f"a {type(block).__name__} stands in the transformer's layers")
                elif kind is Attention:
                    ways.add((block.heads, block.scale, block.cosine_sim, id(block.rotary_emb)))
                    found += (f"a {type(one).__name__} of attention must be called" for one in block.strangers())
        for block in patches.touched(blocks):
            if "forward" in vars(block):
                found.append(f"the forward of a {type(block).__name__} was replaced")
            else:
                found.append(f"{type(block).__name__} has a forward hook, which the cached path would not call")
        if len(ways) > 1:
            found.append("the layers attend in different ways")
        return list(dict.fromkeys(found))

    def drops_out(self) -> bool:
        """Whether dropout is active, be it on its own: all else may be in eval mode."""
        dropouts = (block._modules.get(name) for layer in self.layers for block, name in zip(layer, ("dropout", "4")))
        return any(isinstance(module, nn.Dropout) and module.training and module.p > 0 for module in dropouts)

    def _has_known_bias(self) -> bool:
        return type(self.rel_pos_bias) is RelPosBias and are_called_as_they_are(self.rel_pos_bias)

    def _bias(self, start: int, end: int) -> Tensor:
        """Position bias of queries start..end-1 to the null key and keys 0..end-1, -inf where a key may not be seen."""
        table = self.rel_pos_bias
        if self._has_known_bias():
            bias = table.rows(start, end, end + 1)
        else:
            bias = table(end, end + 1, device=self.layers[0][0].null_kv.device)[:, start:].transpose(0, 1)
        keys, queries = (torch.arange(*span, device=bias.device) for span in ((end + 1,), (start, end)))
        hidden = keys > queries[:, None] + 1
        return bias.masked_fill(hidden[:, None], -math.inf)

    def _attention_bias(self, seq: int, x: Tensor) -> dict:
        """Position bias of a whole sequence, as `Attention.attend` takes it: Triton's kernels read the table."""
        if not ops.on_triton(x) or not self._has_known_bias():
            return dict(bias=self._bias(0, seq))
        table = self.rel_pos_bias.table(x.device)
        return dict(bias=table, buckets=self.rel_pos_bias.buckets(seq, x.device), causal=True)

    def _rotary(self, seq: int) -> Rotary | None:
        attn = self.layers[0][0]
        return attn.rotary_emb and attn.rotary_emb.table(0, seq, attn.null_kv.shape[-1])

    def _normed(self, norm: nn.Module, x: Tensor) -> Tensor:
        """The norm of the stream x, which for what is not ours has the weights' dtype."""
        return norm(x) if type(norm) in (LayerNorm, nn.Identity) else norm(x.to(dtype_of(norm, self))).to(x.dtype)

    def _head(self, x: Tensor) -> Tensor:
        x, linear = self._normed(self.norm, x), self.project_out
        return x if isinstance(linear, nn.Identity) else projected(linear, x.to(dtype_of(linear, self)))

    def forward(self, x: Tensor) -> Tensor:
        """Run all of x (batch, seq, dim), dtype fp32 or wider (fp16 and bf16 are taken too): (batch, seq, dim)."""
        x = self._normed(self.init_norm, x)
        bias = self.rel_pos_bias(x.shape[1], x.shape[1] + 1, device=x.device)
        for attn, ff in self.layers:
            x = attn(x, attn_bias=bias) + x
            x = ff(x) + x
        return self._head(x)

    def last(self, x: Tensor) -> Tensor:
        """`forward(x)[:, -1]`, (batch, dim), with only the last token computed where no other is needed."""
        seq = x.shape[1]
        x = self._normed(self.init_norm, x)
        bias, rotary = self._attention_bias(seq, x), self._rotary(seq)
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
        cache = self.prefill_by_blocks(x, suffix)
        return self.prefill_by_layers(x, suffix) if cache is None else cache

    def prefill_by_layers(self, x: Tensor, suffix: int) -> KVCache:
        """`prefill` with the layers as they are, one after the other."""
        seq, x = x.shape[1], self._normed(self.init_norm, x)
        rotary, null, bias = self._rotary(seq + suffix), self._null(), self._bias(seq, seq + suffix)
        blocks = self.prepared() if x.is_cpu else None
        return self._cache(self._keys_values(x, _rows(rotary, slice(seq))), null, rotary, bias, blocks)

    def prefill_by_blocks(self, x: Tensor, suffix: int, behind: tuple[Tensor, Tensor] | None = None) -> KVCache | None:
        """`prefill` by `ops.run_blocks`, whose prefix the null keys are; None where it does not compute this.

        Behind are keys and values of one prompt: of what all begin with, before x.
        """
        blocks = self.prepared() if x.is_cpu else None
        if blocks is None:
            return None
        before = self._null() if behind is None else behind
        first, x = before[0].shape[2] - 1, self._normed(self.init_norm, x)
        count, parts = x.shape[1], []
        rotary, bias = self._rotary(first + count + suffix), self._bias(first, first + count + suffix)
        of_prefix = dict(bias=bias[:count, :, : first + count + 1].contiguous())
        of_prefix["rotary"] = _rows(rotary, slice(first, first + count))
        for part in x.split(max(1, blocks.most_tokens // count)):
            k, v = (t.expand(-1, len(part), -1, -1, -1) for t in before)
            parts.append(ops.run_blocks(part, blocks, k, v, outputs=0, **of_prefix))
            if parts[-1] is None:
                return None
        return self._cache(torch.cat(parts, dim=1), before, rotary, bias[count:], blocks)

    def _null(self) -> tuple[Tensor, Tensor]:
        """The null keys, normalised, and values, (depth, 1, 1, 1, dim_head) each, at least fp32."""
        null = torch.stack([attn.null_kv for attn, _ in self.layers])[:, None, None, :, None]
        k, v = null.to(torch.promote_types(null.dtype, torch.float32)).unbind(3)
        return F.normalize(k, dim=-1) if self.layers[0][0].cosine_sim else k, v

    def _cache(
        self, kv: Tensor, before: tuple[Tensor, Tensor], rotary: Rotary | None, bias: Tensor, blocks: ops.Blocks | None
    ) -> KVCache:
        """The cache of what `_keys_values` gives behind others, with the table of all tokens, the bias of the suffix.

        What stands before is of one prompt, the null key and perhaps tokens behind it.
        """
        k, v = kv.unbind(3)
        (prompts, seq), cosine, first = k.shape[1:3], self.layers[0][0].cosine_sim, before[0].shape[2] - 1
        k = reference.prepare_heads(k, _rows(rotary, slice(first, first + seq)), cosine)
        k, v = (torch.cat((t.expand(-1, prompts, -1, -1, -1), of), dim=2) for t, of in zip(before, (k, v)))
        bias, weights = bias.to(k.dtype), dtype_of(self.layers[0][0].to_kv, self)
        if weights.itemsize < k.element_size() and ops.on_triton(k):  # whose products are in that dtype
            k, v = k.to(weights), v.to(weights)
        return KVCache(k, v, bias, _rows(rotary, slice(first + seq, None)), blocks)

    def _keys_values(self, x: Tensor, rotary: Rotary | None) -> Tensor:
        """Keys and values of all layers for a prefix, (depth, prompts, seq, 2, 1, dim_head), at least fp32."""
        bias, layers = self._attention_bias(x.shape[1], x), []
        for index, (attn, ff) in enumerate(self.layers):
            h = attn.normed(x)
            kv = attn.keys_values(h)
            layers.append(torch.stack(kv, dim=2))
            if index < len(self.layers) - 1:
                x = attn.attend(attn.queries(h), *kv, rotary, bias, residual=x)
                x = ff(x) + x
        return reference.at_least_fp32(torch.stack(layers))

    def share(self, cache: KVCache, layout: RowLayout) -> KVCache:
        """Make a cache ready for steps whose rows hold several samples of a prompt."""
        tokens, prefix = layout.tokens, cache.k.shape[2]
        bias = cache.bias[tokens]
        of_suffix = bias[..., prefix + tokens].masked_fill(layout.hidden[:, None], -math.inf)
        bias = torch.cat((bias[..., :prefix], of_suffix), dim=-1)
        return cache._replace(bias=bias, rotary=_rows(cache.rotary, tokens), samples=layout.samples)

    def _is_plain(self) -> bool:
        """Whether kernels that compute several modules at once compute what these do."""
        if self.training or self.drops_out():
            return False
        layers = [_modules_of(*layer) for layer in self.layers]
        if not all(_are_of(modules, LAYER) for modules in layers):
            return False
        modules = [module for modules in layers for module in modules]
        same_eps = len({module.eps for module in modules if type(module) is LayerNorm}) == 1
        return same_eps and are_called_as_they_are(*modules)

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
        return None if torch.compiler.is_compiling() else snapshot.once(self, "blocks", self._prepared)

    def _prepared(self) -> ops.Blocks | None:
        if (described := self._described()) is None:
            return None
        blocks, options = described
        dim_head = self.layers[0][0].null_kv.shape[-1]
        return ops.prepare_blocks(blocks, owner=self, kv_heads=1, dim_head=dim_head, head=self._head_block(), **options)

    def _described(self) -> tuple[list[ops.Block], dict] | None:
        """The layers' weights, and how kernels compute them; None where they do not."""
        if self.obstacles() or not self._is_plain():
            return None
        attn, blocks = self.layers[0][0], self._blocks()
        if len({tuple(t.shape for t in block if t is not None) for block in blocks}) > 1:  # such as pruned ones
            return None
        options = dict(heads=attn.heads, scale=attn.scale, cosine=attn.cosine_sim, eps=attn.norm.eps)
        return blocks, dict(options, activation="swiglu")

    def prepare_launches(self, cache: KVCache, **options) -> ops.Launches | None:
        """`ops.prepare_launches` of the layers and the head behind a cache; None where it does not compute them."""
        if not ops.on_triton(cache.k) or (described := self._described()) is None:
            return None
        linears = [module for layer in self.layers for module in _modules_of(*layer) if type(module) in LINEAR]
        dtypes, head = {dtype_of(linear, self) for linear in (*linears, self.project_out)}, self._head_block()
        if head is None or len(dtypes) > 1:
            return None
        blocks, shared = described
        shared |= dict(dtype=dtypes.pop(), samples=cache.samples, rotary=cache.rotary, bias=cache.bias, stable=True)
        return ops.prepare_launches(blocks, head, cache.k, cache.v, **shared, **options)

    def _head_block(self) -> ops.Block | None:
        norm, linear, attn = self.norm, self.project_out, self.layers[0][0]
        if type(norm) is not LayerNorm or not norm.stable or norm.eps != attn.norm.eps:
            return None
        if not _are_of([linear], [(type(attn.to_q),)]) or not are_called_as_they_are(norm, linear):
            return None
        if linear.weight.dtype != attn.to_q.weight.dtype:
            return None
        return ops.Block(q=linear.weight, q_scale=scales_of(linear)[0], norm_gain=norm.g)

    def _blocks(self) -> list[ops.Block]:
        blocks, names = [], ("q", "k", "out", "expand", "contract")
        for attn, ff in self.layers:
            norm, expand, _, inner_norm, _, contract = ff
            linears = dict(zip(names, (attn.to_q, attn.to_kv, attn.to_out[0], expand, contract)))
            weights = {name: linear.weight for name, linear in linears.items()}
            scales = {f"{name}_scale": scale for name, scale in zip(names, scales_of(*linears.values()))}
            gains = dict(norm_gain=attn.norm.g, out_gain=attn.to_out[1].g, ff_gain=norm.g)
            blocks.append(ops.Block(**weights, **scales, **gains, inner_gain=getattr(inner_norm, "g", None)))
        return blocks

    def step(self, x: Tensor, cache: KVCache) -> Tensor:
        """The output of the last suffix token of each sample behind the cached prefix.

        Args:
            x: (rows, suffix, dim); rows is a multiple of the cache's prompts, and those of one prompt lie together.
            cache: from `prefill`, or `share` where rows hold several samples.
        Returns:
            (rows * samples, dim), in the weights' dtype or fp32.
        """
        x, outputs = self._normed(self.init_norm, x), cache.samples
        if (out := self._by_blocks(x, cache, outputs)) is not None:
            return out.flatten(0, 1)
        fused = ops.on_triton(x) and self._is_plain() and reference.autocast_dtype(x) is None
        for index, (attn, ff) in enumerate(self.layers):
            q, k, v = attn.fused_projections(x) if fused else attn.projections(x)
            if index == len(self.layers) - 1:
                x, q = x[:, -outputs:], q[:, -outputs:]
            out = ops.decode_attention(
                q, k, v, cache.k[index], cache.v[index], scale=attn.scale, rotary=cache.rotary,
                cosine=attn.cosine_sim, bias=cache.bias, dropout=attn.dropout_rate,
            )  # fmt: skip
            if fused:
                x = ff.fused(projected(attn.to_out[0], out), stream=x, stream_gain=attn.to_out[1].g)
            else:
                x = attn.projected(out, residual=x)
                x = ff(x) + x
        return self._head(x.flatten(0, 1))


patches.watch(CausalTransformer, kind=patches.WHOLE)

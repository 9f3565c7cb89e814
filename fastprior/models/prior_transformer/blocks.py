"""Building blocks of `PriorTransformer`, under diffusers' parameter names."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprior.checks import check_choice
from fastprior.models import patches

ACTIVATIONS = {"silu": nn.SiLU, "swish": nn.SiLU, "mish": nn.Mish, "gelu": nn.GELU, "relu": nn.ReLU}


class TimeFeatures(nn.Module):
    """Times (n,) as (n, dim) cosines and sines of falling frequency, fp32; a last odd feature is zero."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, times: Tensor) -> Tensor:
        half = self.dim // 2
        rate = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=times.device) / half)
        angles = times[:, None].float() * rate
        return F.pad(torch.cat((angles.cos(), angles.sin()), dim=-1), (0, self.dim % 2))


class TimeEmbedding(nn.Module):
    """Linear, activation, linear: (n, dim) to (n, dim)."""

    def __init__(self, dim: int, hidden: int, act_fn: str):
        super().__init__()
        check_choice("time_embed_act_fn", act_fn, ACTIVATIONS)
        self.linear_1 = nn.Linear(dim, hidden)
        self.act = ACTIVATIONS[act_fn]()
        self.linear_2 = nn.Linear(hidden, dim)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(features)))


class Attention(nn.Module):
    """Self-attention of `heads` heads with biases; `attention_mask` (batch or batch * heads, seq, seq) is added."""

    def __init__(self, heads: int, dim_head: int, dropout: float):
        super().__init__()
        dim = heads * dim_head
        self.heads, self.scale = heads, dim_head**-0.5
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Dropout(dropout)])

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        projections = (linear(x) for linear in (self.to_q, self.to_k, self.to_v))
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in projections)
        if attention_mask is not None:
            attention_mask = attention_mask.unflatten(0, (x.shape[0], -1))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask).transpose(1, 2).flatten(2)
        for module in self.to_out:
            out = module(out)
        return out


class GELU(nn.Module):
    """A linear and its exact GELU."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x))


class FeedForward(nn.Module):
    """Linear, GELU, dropout, linear; four times as wide inside."""

    def __init__(self, dim: int, dropout: float):
        super().__init__()
        self.net = nn.ModuleList([GELU(dim, 4 * dim), nn.Dropout(dropout), nn.Linear(4 * dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        for module in self.net:
            x = module(x)
        return x


class Block(nn.Module):
    """Attention and feed-forward, each behind a LayerNorm and a residual connection: (batch, seq, dim) to the same."""

    def __init__(self, heads: int, dim_head: int, dropout: float):
        super().__init__()
        dim = heads * dim_head
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(heads, dim_head, dropout)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim, dropout)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden_states = hidden_states + self.attn1(self.norm1(hidden_states), attention_mask=attention_mask)
        return hidden_states + self.ff(self.norm3(hidden_states))


BLOCKS = TimeFeatures, TimeEmbedding, Attention, GELU, FeedForward, Block
patches.watch(*BLOCKS, kind=patches.PRIOR_TRANSFORMER)

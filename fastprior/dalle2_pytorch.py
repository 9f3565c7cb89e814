"""The names that clients import from `dalle2_pytorch.dalle2_pytorch`.

What belongs to the prior is fastprior's. Any other name (Decoder, Unet, VQGanVAE, ...) is that of the installed
dalle2-pytorch, imported when the name is first asked for; without dalle2-pytorch it is a stand-in that raises
ImportError on use.
"""

from __future__ import annotations

import math
import random
from functools import partial, wraps
from typing import Any

import torch
import torch.nn.functional as F
from einops import pack, rearrange, reduce, repeat, unpack
from einops.layers.torch import Rearrange
from torch import einsum, nn
from tqdm.auto import tqdm

from fastprior.clip import (
    BaseClipAdapter,
    CoCaAdapter,
    EmbeddedImage,
    EmbeddedText,
    OpenAIClipAdapter,
    OpenClipAdapter,
    XClipAdapter,
)
from fastprior.clip import freeze_and_eval as freeze_model_and_make_eval_
from fastprior.diffusion.schedule import BETA_SCHEDULES, NoiseScheduler, extract
from fastprior.models.dalle2.layers import (
    MLP,
    Attention,
    FeedForward,
    LayerNorm,
    RelPosBias,
    RotaryEmbedding,
    SinusoidalPosEmb,
    SwiGLU,
    l2norm,
)
from fastprior.models.dalle2.network import DiffusionPriorNetwork, prob_mask_like
from fastprior.models.dalle2.transformer import CausalTransformer
from fastprior.peer import is_stand_in, peer_attribute
from fastprior.prior.diffusion_prior import DiffusionPrior
from fastprior.prior.diffusion_prior import in_eval_mode as eval_decorator
from fastprior.tokenizer import tokenizer

cosine_beta_schedule = BETA_SCHEDULES["cosine"]
linear_beta_schedule = BETA_SCHEDULES["linear"]
quadratic_beta_schedule = BETA_SCHEDULES["quadratic"]
sigmoid_beta_schedule = BETA_SCHEDULES["sigmoid"]


def exists(val: Any) -> bool:
    return val is not None


def default(val: Any, d: Any) -> Any:
    """`val`, or where it is None `d`, or what `d` returns if it can be called."""
    return val if val is not None else d() if callable(d) else d


__all__ = [
    "Attention", "BaseClipAdapter", "CausalTransformer", "CoCaAdapter", "DiffusionPrior", "DiffusionPriorNetwork",
    "EmbeddedImage", "EmbeddedText", "F", "FeedForward", "LayerNorm", "MLP", "NoiseScheduler", "OpenAIClipAdapter",
    "OpenClipAdapter", "Rearrange", "RelPosBias", "RotaryEmbedding", "SinusoidalPosEmb", "SwiGLU", "XClipAdapter",
    "cosine_beta_schedule", "default", "einsum", "eval_decorator", "exists", "extract", "freeze_model_and_make_eval_",
    "l2norm", "linear_beta_schedule", "math", "nn", "pack", "partial", "prob_mask_like", "quadratic_beta_schedule",
    "random", "rearrange", "reduce", "repeat", "sigmoid_beta_schedule", "tokenizer", "torch", "tqdm", "unpack", "wraps",
]  # fmt: skip

# what else dalle2-pytorch 1.15.6 defines: so that without it, a name that never existed is still an AttributeError
PEER_NAMES = frozenset({
    "Block", "CLIP", "ChanLayerNorm", "CoCa", "CrossAttention", "CrossEmbedLayer", "DALLE2", "Decoder", "Downsample",
    "LinearAttention", "LowresConditioner", "NearestUpsample", "NullVQGanVAE", "PixelShuffleUpsample",
    "RearrangeToSequence", "Residual", "ResnetBlock", "Unet", "UpsampleCombiner", "VQGanVAE",
    "WeightStandardizedConv2d", "cast_tuple", "discretized_gaussian_log_likelihood", "first", "freeze_all_layers_",
    "identity", "is_float_dtype", "is_list_str", "log", "make_checkpointable", "maybe", "meanflat", "module_device",
    "normal_kl", "normalize_neg_one_to_one", "null_context", "pad_tuple_to_length", "resize_image_to",
    "set_module_requires_grad_", "unfreeze_all_layers_", "unnormalize_zero_to_one", "zero_init_",
})  # fmt: skip


def __getattr__(name: str) -> Any:
    if not name.startswith("_"):
        found = peer_attribute("dalle2_pytorch.dalle2_pytorch", name)
        if name in PEER_NAMES or not is_stand_in(found):
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

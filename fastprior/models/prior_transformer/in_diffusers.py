"""PriorTransformer as a diffusers model, for its pipelines; and without diffusers, our own."""

from __future__ import annotations

import sys
from types import MethodType
from typing import TypeVar

from torch import Tensor, nn

from fastprior.models import patches
from fastprior.models.patches import PRIOR_TRANSFORMER
from fastprior.models.prior_transformer.forward import PriorForward
from fastprior.models.prior_transformer.prompt_memory import PROCESSORS

try:
    from diffusers import ModelMixin  # noqa: F401 (re-exported)
    from diffusers import PriorTransformer as StockPrior
except ImportError:
    from fastprior.models.prior_transformer.model import PriorTransformer

    StockPrior = None
else:
    from diffusers.models import activations, attention, attention_processor, embeddings

    STOCK_FORWARD = StockPrior.forward
    BLOCKS = attention.BasicTransformerBlock, attention.Attention, attention.FeedForward, activations.GELU
    PROCESSOR_CLASSES = (getattr(attention_processor, name) for name in PROCESSORS)
    patches.watch(StockPrior, *BLOCKS, embeddings.Timesteps, embeddings.TimestepEmbedding, kind=PRIOR_TRANSFORMER)
    patches.watch(*PROCESSOR_CLASSES, names=("__call__",), kind=PRIOR_TRANSFORMER)

    class PriorTransformer(PriorForward, StockPrior):
        """diffusers' PriorTransformer with our `forward`, `prefill` and `step`; all else is its own."""

        __module__ = "fastprior"  # by which saved pipelines and pickles refer to it
        output_class = sys.modules[StockPrior.__module__].PriorTransformerOutput
        _supports_gradient_checkpointing = True
        _no_split_modules = ("BasicTransformerBlock",)
        _repeated_blocks = ("BasicTransformerBlock",)

        def predict_whole(self, *given) -> Tensor:
            if StockPrior.forward is STOCK_FORWARD:
                return super().predict_whole(*given)
            return StockPrior.forward(self, *given, return_dict=False)[0]  # which somebody patched


Accelerated = TypeVar("Accelerated")


def accelerate_prior(pipe_or_model: Accelerated) -> Accelerated:
    """Turn the priors of a loaded diffusers pipeline, or one prior, into ours in place.

    Weights, adapters, hooks and processors stay as they are.

    Returns:
        its argument.
    Raises:
        ImportError: diffusers is not installed.
        TypeError: there is no PriorTransformer of diffusers, or a subclass of it with a forward of its own.
    """
    if StockPrior is None:
        raise ImportError("accelerate_prior needs diffusers: pip install diffusers")
    components = getattr(pipe_or_model, "components", {"model": pipe_or_model})
    modules = [getattr(part, "_orig_mod", part) for part in components.values() if isinstance(part, nn.Module)]
    priors = [module for module in modules if isinstance(module, StockPrior)]
    if not priors:
        raise TypeError(
            f"pipe_or_model is a {type(pipe_or_model).__name__}; it must be or have a diffusers PriorTransformer"
        )
    for prior in priors:
        if not isinstance(prior, PriorTransformer):
            if type(prior) is not StockPrior:
                raise TypeError(f"the prior is a {type(prior).__name__}; it must be a PriorTransformer and no subclass")
            prior.__class__ = PriorTransformer
            if "_old_forward" in vars(prior):  # which hooks of accelerate call
                prior._old_forward = MethodType(PriorTransformer.forward, prior)
    return pipe_or_model

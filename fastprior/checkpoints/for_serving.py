"""Other weights for what serves: of a state dict, a model or a file, checked whole before anything changes."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastprior.checkpoints.dalle2 import load
from fastprior.models.dalle2.network import DiffusionPriorNetwork
from fastprior.models.dalle2.transformer import CausalTransformer
from fastprior.models.loading import fitted
from fastprior.models.prior_transformer.as_network import PriorTransformerNet
from fastprior.models.prior_transformer.model import PriorTransformer
from fastprior.models.weight_lock import lock_of
from fastprior.prior.diffusion_prior import DiffusionPrior

Weights = Mapping[str, Tensor] | nn.Module | str | os.PathLike
MEANING = (  # of predictions, which tensors do not show
    "prediction", "image_embed_scale", "clamp", "sampling_clamp_l2norm", "sampling_final_clamp_l2norm",
    "init_image_embed_l2norm", "condition_on_text_encodings", "can_classifier_guidance",
)  # fmt: skip
IN_TRAINING = "dropout", "attn_dropout", "ff_dropout"
BETAS = "noise_scheduler.betas"


def _check_alike(own: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Raise ValueError where another model was built otherwise."""
    found = [f"{name}={other.get(name)!r}, not {value!r}" for name, value in own.items() if other.get(name) != value]
    if found:
        raise ValueError(f"weights are of a model with {'; '.join(found)}: it must be built as the one that serves")


def _arguments(net: nn.Module) -> dict[str, Any]:
    """What a network was built with, defaults too, without what matters in training alone."""
    own = isinstance(net, DiffusionPriorNetwork)
    kinds = (DiffusionPriorNetwork, CausalTransformer) if own else (PriorTransformer,)
    known = {name: given.default for kind in kinds for name, given in inspect.signature(kind).parameters.items()}
    said = {name: net.config.get(name, default) for name, default in known.items() if name not in IN_TRAINING}
    return {"kind": kinds[0].__name__, **said}


def _state_of(weights: Any, prefixes: Sequence[str], own: Mapping[str, Tensor]) -> tuple[dict, dict]:
    """The tensors of a network in a state dict, of it or of a model that holds it, and the others but CLIP's."""
    if isinstance(weights, nn.Module):
        with lock_of(weights):  # as they are at one time
            weights = {key: value.detach().clone() for key, value in weights.state_dict().items()}
    if not isinstance(weights, Mapping):
        kind = type(weights).__name__
        raise TypeError(f"weights is a {kind}; it must be a state dict, a model, or the path of a file")
    weights = {str(key): value for key, value in weights.items() if not str(key).startswith("clip.")}
    prefix = max(prefixes, key=lambda prefix: sum(prefix + key in weights for key in own))
    inner = {key[len(prefix) :]: value for key, value in weights.items() if key.startswith(prefix)}
    return inner, {key: value for key, value in weights.items() if not key.startswith(prefix)}


def of_prior(prior: DiffusionPrior, weights: Weights) -> dict[str, Tensor]:
    """Weights as the network of a prior loads them, see `PriorSampler.update`."""
    if isinstance(weights, (str, os.PathLike)):
        path, weights = weights, load(weights)
        if weights.load_report.architecture == "inferred":  # from shapes, which do not show all
            weights = load(path, config=dict(net=prior.net.config, prior=prior.config))
    if isinstance(weights, DiffusionPrior):
        _check_alike(*({name: getattr(one, name) for name in MEANING} for one in (prior, weights)))
    net = getattr(weights, "net", weights)
    if isinstance(net, (DiffusionPriorNetwork, PriorTransformerNet)):
        _check_alike(_arguments(prior.net), _arguments(net))
    own = prior.net.state_dict()
    state, rest = _state_of(weights, ("", "net."), own)
    betas, given = prior.noise_scheduler.betas, rest.get(BETAS)
    if given is not None:
        alike = torch.is_tensor(given) and given.shape == betas.shape
        if not alike or not torch.allclose(given.to(betas), betas, rtol=0.02, atol=1e-4):  # as 16 bits keep them
            raise ValueError(f"weights have another {BETAS}; their noise schedule must be the one that serves")
    return fitted(prior.net, state | {key: t for key, t in rest.items() if not key.startswith("noise_scheduler.")})


def of_transformer(prior: PriorTransformer, weights: Weights) -> dict[str, Tensor]:
    """Weights as a PriorTransformer loads them, see `PriorPipeline.update`."""
    if isinstance(weights, (str, os.PathLike)):
        folder = Path(weights)
        if folder.is_dir():
            weights = PriorTransformer.from_pretrained(folder / "prior" if (folder / "prior").is_dir() else folder)
        else:
            weights = load(folder)
    if isinstance(weights, DiffusionPrior):
        weights = weights.net
    net = weights.prior if isinstance(weights, PriorTransformerNet) else weights
    if hasattr(net, "config") and isinstance(net, nn.Module):
        _check_alike(_arguments(prior), _arguments(net))
    return fitted(prior, _state_of(net, ("", "prior.", "net.prior."), prior.state_dict())[0])

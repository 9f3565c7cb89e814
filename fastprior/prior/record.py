"""What a file records of a prior beside its weights: how to build it, and what encodes its text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fastprior.models.dalle2.network import DiffusionPriorNetwork
from fastprior.models.prior_transformer.as_network import PriorTransformerNet
from fastprior.models.prior_transformer.model import PriorTransformer
from fastprior.version import __version__
from fastprior.weight_files.safe import HEADER

FORMAT = 1
# arguments that weights do not show, and without which what was trained means something else
TRAINED = "predict_x_start", "predict_v", "image_embed_scale", "condition_on_text_encodings", "self_cond"
TABLES = "learned_tables"  # the entry that keeps those
MADE_BEFORE = {"make": "embeddings"}  # in place of a CLIP's description: the text was embedded before the training


def make_net(config: Mapping[str, Any]) -> nn.Module:
    """The network, with fresh weights, of its recorded `config`."""
    if config.get("make") != "prior_transformer":
        return DiffusionPriorNetwork(**config)
    return PriorTransformerNet(PriorTransformer(**{name: value for name, value in config.items() if name != "make"}))


def unlike_config(net: nn.Module) -> list[str]:
    """Names of the tensors that a network of its `config` has not, or has in another shape."""
    with torch.device("meta"):
        built = {key: value.shape for key, value in make_net(net.config).state_dict().items()}
    found = {re.sub(r"(?:^|(?<=\.))_orig_mod\.", "", key): value.shape for key, value in net.state_dict().items()}
    return [f"net.{key}" for key in {**found, **built} if found.get(key) != built.get(key)]


def text_encoder(prior: nn.Module) -> Any:
    """What encodes a prior's text, in plain values: how its CLIP describes itself, or else what was said of it.

    `prior.text_encoder` says it: what `clip.make_adapter` takes, `MADE_BEFORE`, or a name. None where nobody knows.
    """
    said = getattr(prior.clip, "description", None), getattr(prior, "text_encoder", None)  # anybody's may be anything
    return next((encoder for encoder in said if isinstance(encoder, (Mapping, str))), None)


def record(prior: nn.Module, metadata: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The configuration of a prior in JSON values: format, version, net, prior, and metadata with its text encoder.

    Where it has learned tables, they are an entry, too.

    Raises ValueError for a network or a prior without a `config` dict, TypeError for what is not JSON.
    """
    config = {"net": getattr(prior.net, "config", None), "prior": getattr(prior, "config", None)}
    for name, part in (("net", prior.net), ("prior", prior)):
        if not isinstance(config[name], dict):
            kind = type(part).__name__
            raise ValueError(f"the {name} is a {kind} without a `config` dict: a file could not tell how to build it")
    encoder = text_encoder(prior)
    metadata = {**({} if encoder is None else {"text_encoder": encoder}), **(metadata or {})}
    try:
        plain = json.dumps({**config, "metadata": metadata}, default=_number)
    except TypeError as error:
        raise TypeError(f"metadata and configuration must be JSON values ({error})") from error
    tables = [table.to_json() for table in getattr(prior, "learned_tables", {}).values()]
    learned = {TABLES: tables} if tables else {}
    return {"format": FORMAT, "version": __version__, **json.loads(plain), **learned}


def entry(prior: nn.Module) -> dict[str, dict[str, Any]]:
    """What a pickled file has beside the weights for `fastprior.load`: the record by its key, or nothing.

    Nothing where the network is not what its `config` builds, or has none: somebody's own, whose weights speak alone.
    """
    try:
        return {} if unlike_config(prior.net) else {HEADER: record(prior)}
    except (AttributeError, TypeError, ValueError):
        return {}


def _number(value: Any) -> Any:
    """The plain number in a scalar of numpy or torch."""
    if getattr(value, "shape", None) != ():
        raise TypeError(f"a {type(value).__name__} is none")
    return value.item()

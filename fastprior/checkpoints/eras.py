"""What checkpoints of every DALLE2-pytorch release mean: their keys, their attention, and their configuration."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastprior.checkpoints.constants import OLD_SCHEDULE, SCHEDULE, has_rotary, read_schedule
from fastprior.checkpoints.contents import CURRENT, GAMMA, ONE_NULL, UNPADDED, Contents, LoadReport, renamed
from fastprior.checkpoints.limits import is_plain
from fastprior.models.dalle2.network import DiffusionPriorNetwork
from fastprior.models.dalle2.transformer import CausalTransformer
from fastprior.models.prior_transformer.model import PriorTransformer
from fastprior.prior.diffusion_prior import DiffusionPrior
from fastprior.prior.record import MADE_BEFORE, TABLES, TRAINED
from fastprior.reading import quoted, read_json

# The one map of renames, applied in order to the keys of a prior (`net.…`); None drops the key.
RENAMES = (
    (OLD_SCHEDULE, rf"{SCHEDULE}\1"),
    (r"\.gamma$", ".g"),  # before 0.16.0
    (r"^net\.null_text_embed$", "net.null_text_encodings"),  # 0.23.1 to 1.8.4
    (r"\.rotary_emb\.(?!freqs$)\w+$", None),  # caches of some releases of rotary-embedding-torch
)
# arguments that weights do not show and on which results depend: what was trained, and how samples are made
UNSEEN = (
    *TRAINED, "cond_drop_prob", "clamp", "sampling_clamp_l2norm", "sampling_final_clamp_l2norm",
    "init_image_embed_l2norm",
)  # fmt: skip
NULLS = ("null_text_encodings", "null_text_embeds", "null_image_embed")

# Releases before a version computed dot-product attention: the version, and the factor on the relative position bias,
# which was added before logits were multiplied by it. From 1.4.3 on it is cosine similarity, with the same keys.
DOT_PRODUCT_ERAS = (((0, 16, 1), 1), ((0, 23, 3), 1024), ((1, 4, 3), 128))

_POSITION_BIAS = "net.causal_transformer.rel_pos_bias.relative_attention_bias.weight"


_DEFAULTS = {
    name: parameter.default
    for cls in (DiffusionPrior, DiffusionPriorNetwork)
    for name, parameter in inspect.signature(cls).parameters.items()
} | {"image_embed_scale": "√dim"}


def _parameters(cls: type, *left_out: str) -> set[str]:
    parameters = inspect.signature(cls.__init__).parameters.values()
    return {p.name for p in parameters if p.kind != p.VAR_KEYWORD} - {"self", *left_out}


NET_KEYS = _parameters(DiffusionPriorNetwork) | _parameters(CausalTransformer)
PRIOR_KEYS = _parameters(DiffusionPrior, "net", "clip")


def _checked(name: str, section, known: set[str]) -> Mapping:
    if not isinstance(section, Mapping):
        raise ValueError(f"{name} is a {type(section).__name__}; it must be a dict")
    for key in section:
        if key not in known:
            nearest = difflib.get_close_matches(str(key)[:100], sorted(known), n=1, cutoff=0)[0]
            raise ValueError(f"{name} has the unknown key {quoted(key)}; did you mean {nearest!r}?")
    return section


def read_config(config: Mapping | str | os.PathLike | None, report: LoadReport) -> tuple[dict, dict]:
    """The arguments of network and prior in our configuration, or in DALLE2-pytorch's of a training or of a prior."""
    if config is None:
        return {}, {}
    if isinstance(config, (str, os.PathLike)):
        config = read_json(config, where=f"config={quoted(os.fspath(config))}")
    prior = config.get("prior") if isinstance(config, Mapping) else None
    if isinstance(prior, Mapping) and "net" in prior:  # a training's; its other parts are the trainer's
        data = config.get("data")
        if isinstance(data, Mapping) and data.get("text_url") is not None:
            report.metadata["text_encoder"] = MADE_BEFORE
        config, prior = prior, None
    if prior is None:
        config = _checked("config", config, PRIOR_KEYS | {"net", "clip"})
        prior = {key: value for key, value in config.items() if key not in ("net", "clip")}
        if config.get("clip") is not None:
            report.metadata["text_encoder"] = config["clip"]
            report.notes.append("the config's CLIP was not made; that needs clip=")
    else:
        _checked("config", config, {"format", "version", "net", "prior", "metadata", "checksums", TABLES})
    net = config.get("net", {})
    is_dalle2 = not isinstance(net, Mapping) or net.get("make") != "prior_transformer"
    net = _checked("config 'net'", net, NET_KEYS if is_dalle2 else {"make", *_parameters(PriorTransformer)})
    prior = _checked("config 'prior'", prior, PRIOR_KEYS)
    # DALLE2-pytorch's config class makes an absent max_text_len null, which its constructor cannot take
    return {key: value for key, value in net.items() if key != "max_text_len" or value is not None}, dict(prior)


def find_config(recorded: Any, path: Path) -> tuple[Mapping | None, str]:
    """The config that a foreign file at `path` records, or else that of the config.json beside it, and where it is.

    None where there is none that `read_config` could be meant for: other programs write such files too.
    """
    beside = path.with_name("config.json")
    with contextlib.suppress(OSError, ValueError):
        if recorded is None:
            recorded = read_json(beside)
            path = beside
    prior = recorded.get("prior", recorded) if isinstance(recorded, Mapping) and is_plain(recorded) else None
    net = prior.get("net", recorded.get("net")) if isinstance(prior, Mapping) else None
    return (recorded, str(path)) if isinstance(net, Mapping) and net.get("dim") else (None, "")


def overridden(recorded: Mapping, given: Mapping) -> list[str]:
    """What a file records of its training, and a config says otherwise."""
    return [
        f"{name}={given[name]!r}, as the config says; {recorded[name]!r} was recorded in training"
        for name in TRAINED
        if name in recorded and given.get(name) not in (None, recorded[name])
    ]


def contradictions(state: dict[str, Tensor], net: Mapping, prior: Mapping) -> dict[str, tuple]:
    """Arguments by name that (renamed) weights show to be others than a config says: what they are, and what it says.

    The widths of feed-forwards and the rotation are left out: weights do not show them, or not exactly.
    """
    try:
        shown_net, shown_prior = _infer(dict(state), LoadReport(""))
    except ValueError:  # damaged
        return {}
    shown = {**shown_prior, **shown_net}
    said = {**prior, **net}
    left_out = "ff_mult", "rotary_emb", "text_dim", "text_embed_dim"
    return {n: (shown[n], said[n]) for n in shown if n not in left_out and n in said and shown[n] != said[n]}


def _infer(state: dict[str, Tensor], report: LoadReport) -> tuple[dict, dict]:
    """The arguments of network and prior that can be seen in (renamed) weights, of which files have all or none."""

    def size(key: str, axis: int = 0) -> int:
        if key not in state or state[key].ndim <= axis:
            raise ValueError(f"{report.path}: {key} is missing or damaged; the architecture cannot be told without it")
        return state[key].shape[axis]

    stack = "net.causal_transformer."
    layer = f"{stack}layers.0."
    dim, dim_head, inner = size("net.learned_query"), size(f"{layer}0.null_kv", 1), size(f"{layer}1.5.weight", 1)
    if not dim or not dim_head:
        raise ValueError(f"{report.path}: the network is {dim} wide, its heads {dim_head}; both must be at least 1")
    ff_mult = inner / dim if int(inner / dim * dim) == inner else (inner + 0.5) / dim  # the constructor rounds down
    net = dict(
        dim=dim,
        depth=1 + max(int(match[1]) for key in state if (match := re.match(rf"{stack}layers\.(\d{{1,9}})\.", key))),
        dim_head=dim_head,
        heads=size(f"{layer}0.to_q.weight") // dim_head,
        ff_mult=int(ff_mult) if ff_mult == int(ff_mult) else ff_mult,
        normformer=f"{layer}1.3.g" in state,
        norm_in=f"{stack}init_norm.g" in state,
        norm_out=f"{stack}norm.g" in state,
        final_proj=f"{stack}project_out.weight" in state,
        max_text_len=size("net.null_text_encodings", 1) if "net.null_text_encodings" in state else 0,
    )
    for kind in ("text", "image"):
        key = f"net.to_{kind}_embeds.0.weight"
        net[f"num_{kind}_embeds"] = size(key) // dim if key in state else 1
        if key in state and size(key) == dim == size(key, 1):
            raise ValueError(f"{report.path}: {key} projects to one token, as in early releases; no such layer exists")
    for name, key in (("text_dim", "to_text_encodings"), ("text_embed_dim", "to_text_embeds")):
        if (key := f"net.{key}.0.weight") in state and size(key, 1) != dim:
            net[name] = size(key, 1)
    discrete = "net.to_time_embeds.0.weight" in state
    net["num_timesteps"] = size("net.to_time_embeds.0.weight") if discrete else None
    time_width = size("net.to_time_embeds.0.weight", 1) if discrete else size("net.to_time_embeds.0.1.net.2.weight")
    net["num_time_embeds"] = time_width // dim
    return net, dict(image_embed_dim=dim)


def _rename(state: dict[str, Tensor], report: LoadReport) -> dict[str, Tensor]:
    """Today's keys. Raises ValueError for layers of the earliest releases, which are not here."""
    current = {}
    for key, value in state.items():
        if key.endswith(".post_norm.gamma"):
            raise ValueError(f"{report.path}: {key} belongs to a layer of early releases; no such layer exists")
        if key.endswith(".beta") and f"{key[:-5]}.gamma" in state:
            if value.count_nonzero():
                raise ValueError(f"{report.path}: {key} is not zero; the LayerNorm here has no offset")
            continue
        if (key := renamed(key, RENAMES)) is not None:
            current[key] = value
    return current


def _read_era(state: dict[str, Tensor], number: tuple[int, ...] | None, report: LoadReport) -> int | None:
    """Tell the era from keys as found. Returns the factor on the position bias of dot products; None for cosine."""
    if any(key.startswith("net.") and key.endswith(".gamma") for key in state):
        report.era = GAMMA
    elif not any(f"net.{name}" in state for name in NULLS):
        report.era = ONE_NULL if "net.null_text_embed" in state else UNPADDED
    if number:
        return next((factor for before, factor in DOT_PRODUCT_ERAS if number < before), None)
    if report.era == UNPADDED:
        raise ValueError(
            f"{report.path}: version=None; these weights are from {UNPADDED}, and attention changed at 0.16.1 with the "
            "same keys. Give the dalle2-pytorch release that trained them"
        )
    if report.era == ONE_NULL:
        report.guesses.append(
            "cosine similarity attention: no version is recorded, and releases before 1.4.3 had dot products under the "
            "same keys. Give version= if one of those trained them"
        )
    return 1 if report.era == GAMMA else None


def _differences(number: tuple[int, ...] | None, net: dict, prior: dict, padded: bool) -> list[str]:
    """Why the network here cannot give the results of the release that trained it, if so."""
    found = []
    if not padded and prior.get("condition_on_text_encodings", True):
        found.append(
            "releases before 0.23.1 masked padding of text encodings, for which later ones learned tokens; only priors "
            "with condition_on_text_encodings=False in their config are the same"
        )
    if number and net.get("self_cond") and number < (1, 12, 1):
        found.append("self_cond=True, and releases before 1.12.1 put self-conditioning in place of the learned query")
    if number and net["num_timesteps"] is None and (0, 16, 9) <= number < (1, 10, 8):
        found.append("num_timesteps=None, and releases 0.16.9 to 1.10.7 rounded embeddings of continuous times")
    return found


def translate(
    contents: Contents, config: Mapping | str | os.PathLike | None, report: LoadReport, strict: bool
) -> tuple[dict[str, Tensor], dict, dict]:
    """Today's tensors, and the arguments of network and prior, of a file without our header."""
    state = contents.tensors
    numbers = re.match(r"v?(\d{1,9}(?:\.\d{1,9})+)", report.version or "")
    number = tuple(map(int, numbers[1].split("."))) if numbers else None
    if number and number < (0, 23, 1) and any(f"net.{name}" in state for name in NULLS):
        report.notes.append(f"version {report.version} is not that of a dalle2-pytorch with these keys; it was ignored")
        number = None
    factor = _read_era(state, number, report)
    state = _rename(state, report)
    given_net, given_prior = read_config(config, report)
    net, prior = _infer(state, report)
    net["rotary_emb"] = has_rotary(state, contents, given_net, report)
    prior |= read_schedule(state, net["num_timesteps"], given_prior, report)
    absent = [f"{name}=False" for name in ("norm_out", "final_proj") if not net[name] and name not in given_net]
    if absent and not contents.modules:  # a whole state dict notes its modules: what it lacks, the network had not
        report.guesses.append(
            f"{', '.join(absent)}: there are no such layers in the file. Give config= if it lacks them"
        )
    padded = "net.null_text_encodings" in state
    conditions = sorted({key.split(".")[2] for key in state if key.startswith("net.conditions.")})
    if strict and conditions and "conditions" not in given_net:
        raise ValueError(
            f"{report.path} has the conditions {', '.join(conditions)}, and weights do not show their means and "
            "dropouts: give config=, the file that it was trained with"
        )
    if factor is not None:
        net.update(cosine_sim=False, dot_scale=net["dim_head"] ** -0.5)
        if _POSITION_BIAS in state:
            state[_POSITION_BIAS] = state[_POSITION_BIAS].float() * factor
        report.notes.append(f"dot-product attention, and {factor} times the position bias, as releases of the time had")
    if not given_prior:
        prior["cond_drop_prob"] = 0.1
        if not padded:
            prior["condition_on_text_encodings"] = False
            report.guesses.append("a prior without text encodings, since none were padded before 0.23.1")
    named = prior.get("beta_schedule")
    if named and given_prior.get("beta_schedule", named) != named:
        raise ValueError(f"{report.path} holds {named!r} betas; config has {quoted(given_prior['beta_schedule'])}")
    net, prior = {**net, **given_net}, {**prior, **given_prior}

    old = report.era != CURRENT and not (number and number >= (1, 9, 0))
    shapes = (1, net["max_text_len"], net["dim"]), (1, net["num_text_embeds"], net["dim"]), (1, net["dim"])
    lacking = {f"net.{name}": torch.zeros(shape) for name, shape in zip(NULLS, shapes) if f"net.{name}" not in state}
    if old or (number and (1, 9, 0) <= number < (1, 10, 4)):
        state.update(lacking if old else {})
        prior = {key: value for key, value in prior.items() if not key.endswith("cond_drop_prob")}
        report.notes.append("the null embeddings for guidance were not trained at the time: cond_scale must be 1")
    if (number and number < (0, 23, 3)) or report.era in (GAMMA, UNPADDED):
        report.notes.append("the eps of norms was applied differently before 0.23.3: results are close, not equal")
    if problems := _differences(number, net, prior, padded):
        report.notes += problems
        if strict:
            raise ValueError(f"{report.path}: {'; '.join(problems)}. strict=False loads it all the same")
    if not given_prior:
        report.assumed += [f"{name}={prior.get(name, _DEFAULTS[name])}" for name in UNSEEN if name not in given_net]
    report.architecture = "inferred" if config is None else "given"
    return state, net, prior

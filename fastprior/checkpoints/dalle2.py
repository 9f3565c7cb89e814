"""Load priors from every era and shape of checkpoint file, and save them atomically.

Files are not trusted: pickles are read with `weights_only=True`, and the few foreign types that trainers pickle become
inert stand-ins.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from fastprior.checkpoints.constants import complete, is_constant, unlike_betas
from fastprior.checkpoints.contents import (
    MOST_PRIORS,
    Contents,
    LoadReport,
    choose_root,
    flatten,
    module_names,
    one_error,
    tensors_under,
    widened,
    without_wrappers,
)
from fastprior.checkpoints.eras import contradictions, find_config, overridden, read_config, translate
from fastprior.checkpoints.limits import check_counts, check_memory, is_plain
from fastprior.diffusion.learned_tables import read_tables
from fastprior.peer import check_fits_peer
from fastprior.prior.diffusion_prior import DiffusionPrior
from fastprior.prior.record import FORMAT, TABLES, make_net, record, unlike_config
from fastprior.reading import quoted
from fastprior.utils import atomic, first_few
from fastprior.weight_files.checks import checksums, compare
from fastprior.weight_files.model_files import read_model
from fastprior.weight_files.safe import HEADER, SharedOnce, version_string
from fastprior.weight_files.weights import check_dense

_QUERIES = {True: "learned_query", False: "prior.prd_embedding"}  # which a network has; of dalle2-pytorch's, or not


def _is_dalle2(net_config: Any) -> bool:
    return not isinstance(net_config, Mapping) or net_config.get("make") != "prior_transformer"


def _find_weights(payload: Mapping, weights: str, query: str, report: LoadReport) -> Contents:
    """One prior out of whatever it is nested in; constants that its tensors lack are those of a twin beside it.

    query: the end of a key that every network has.
    """
    flat, pattern = dict(flatten(payload, report.path)), re.compile(rf"(?:(?<=\.)|^)(net\.)?{re.escape(query)}$")
    bare = {key[: match.start()]: match[1] is None for key in flat if (match := pattern.search(key))}
    if not bare:
        other = " (but a PriorTransformer of diffusers or Karlo, which convert writes to a folder)"
        hint = other if any("prd_emb" in key for key in flat) else ""
        found = first_few(flat or payload) or "nothing"
        raise ValueError(f"{report.path} holds no diffusion prior{hint}: no key ends in {query}. Found: {found}")
    if len(bare) > MOST_PRIORS:
        raise ValueError(f"{report.path} holds {len(bare)} priors; it must hold at most {MOST_PRIORS}")
    root, _ = choose_root(flat, bare, weights, report)
    report.kind = "network state dict" if bare[root] else "prior state dict"
    if "optimizer" in payload:
        report.kind = "trainer checkpoint"

    def under(place: str, names: Mapping) -> dict:
        prefix = "net." if bare[place] else ""
        return {prefix + key: value for key, value in tensors_under(names, place, bare).items()}

    def shapes(tensors: Mapping[str, Tensor]) -> dict:
        return {key: t.shape for key, t in tensors.items() if key.startswith("net.") and not is_constant(key)}

    tensors, noted, modules = under(root, flat), dict.fromkeys(module_names(payload, report.path)), set()
    for place in (root, *(other for other in bare if other != root)):  # a moving average, and what it is the average of
        if shapes(twin := under(place, flat)) == shapes(tensors):
            tensors = {key: value for key, value in twin.items() if is_constant(key)} | tensors
            modules |= under(place, noted).keys()
    return Contents(tensors, modules, isinstance(payload, SharedOnce))


def _recorded(header: Mapping, config, report: LoadReport) -> tuple[dict, dict]:
    """The arguments of network and prior in the header of a file of ours, or in place of them the config's."""
    if not is_plain(header):
        raise ValueError(f"{report.path}: its {HEADER} entry has other values than JSON's, or too many")
    if header.get("format") != FORMAT:
        raise ValueError(f"{report.path} has format {quoted(header.get('format'))}; this release reads format {FORMAT}")
    for name, kind in (("version", str), ("metadata", dict), ("checksums", dict)):
        if not isinstance(header.get(name, kind()), kind):
            raise ValueError(f"{report.path}: its {name} is {quoted(header[name])}; it must be a {kind.__name__}")
    written = header.get("checksums", {})
    if not all(isinstance(value, str) for value in written.values()):
        raise ValueError(f"{report.path}: its checksums are {quoted(written)}; it must be a dict of strings")
    given_net, given_prior = read_config(config, report)
    net, prior = read_config(header, report)
    report.kind = "trainer checkpoint" if report.kind == "trainer checkpoint" else "fastprior file"
    report.version, report.metadata = header.get("version"), {**header.get("metadata", {}), **report.metadata}
    report.architecture = "recorded" if config is None else "given"
    report.guesses += overridden(net | prior, given_net | given_prior)
    return net | given_net, prior | given_prior


def _compare(
    state: dict[str, Tensor], wanted: dict[str, Tensor], written: dict[str, str], report: LoadReport, strict: bool
) -> None:
    """Check names, shapes and values of a prior's tensors.

    written: checksums, where a file of ours has them: see `weight_files.checks.checksum`.
    """
    for key, value in state.items():
        if key in wanted and value.shape != wanted[key].shape:
            raise ValueError(
                f"{report.path}: {key} has shape {tuple(value.shape)}; by the {report.architecture} architecture it "
                f"must be {tuple(wanted[key].shape)}"
            )
        if key in wanted and not value.is_floating_point():
            raise ValueError(f"{report.path}: {key} has dtype {value.dtype}; it must be a floating point tensor")
    floats = {key for key in wanted if key.startswith(("net.", "noise_scheduler.betas"))}
    differing, converted, infinite = compare(state, written, floats)
    if converted:
        report.notes.append(f"another program changed the type of {len(converted)} tensors: nothing vouches for them")
    if differing:
        found = f"{first_few(differing)} differ from what fastprior wrote"
        if strict:
            raise ValueError(
                f"{report.path}: {found}: the file is damaged, or another program has changed the numbers and kept the "
                "checksums. strict=False loads it all the same"
            )
        report.guesses.append(f"that another program changed the file on purpose: {found}")
    if bad := infinite + unlike_betas(state):
        raise ValueError(f"{report.path} holds NaN or infinity in {first_few(bad)}")
    report.missing = [key for key in wanted if key not in state]
    report.unexpected = [key for key in state if key not in wanted]
    if strict and (report.missing or report.unexpected):
        raise ValueError(
            f"{report.path} does not fit the {report.architecture} architecture; strict=False loads what fits. "
            f"Missing: {first_few(report.missing) or 'none'}; unexpected: {first_few(report.unexpected) or 'none'}"
        )


def _build(
    state: dict[str, Tensor],
    written: dict[str, str],
    net_config: dict,
    prior_config: dict,
    clip: nn.Module | None,
    dtype: torch.dtype | None,
    report: LoadReport,
    strict: bool,
) -> DiffusionPrior:
    """The prior of these arguments and tensors; the weights of the network are random where `report` says missing."""
    is_dalle2 = _is_dalle2(net_config)
    file_dtype = state[f"net.{_QUERIES[is_dalle2]}"].dtype
    if dtype is not None and dtype != file_dtype:
        report.notes.append(f"weights are {file_dtype} in the file, and were cast to {dtype}")
    check_counts(net_config, prior_config, state, report.path)
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        net = make_net(net_config)
    prior = DiffusionPrior(net, clip=clip, **prior_config)
    wanted = {key: value for key, value in prior.state_dict().items() if not key.startswith("clip.")}
    complete(state, wanted, "beta_schedule" in prior_config, report)
    _compare(state, wanted, written, report, strict)
    check_memory(net, report.missing, state, report.path)
    if is_dalle2 and not any(key.startswith("net.") for key in report.missing):
        net.to_empty(device="cpu")
    else:
        with torch.random.fork_rng(devices=[]):
            prior.net = make_net(net_config)  # a PriorTransformer has tensors that no file holds
    prior.net.to(file_dtype if dtype is None else dtype)
    prior.load_state_dict({key: value for key, value in state.items() if key in wanted}, strict=False)
    return prior


def _fill_clip(clip: nn.Module, state: dict[str, Tensor], strict: bool) -> None:
    """Load CLIP's weights, whether or not the file has what the module makes by itself, such as position ids."""
    saved, buffers = clip.state_dict(keep_vars=True), dict(clip.named_buffers(remove_duplicate=False))
    loaded = {id(saved[key]) for key in state if key in saved}
    own = {key: t for key, t in saved.items() if torch.is_tensor(t) and key not in state}
    own = {key: t for key, t in own.items() if not t.is_floating_point() or id(t) in loaded}
    clip.load_state_dict({key: t for key, t in state.items() if key in saved or key not in buffers} | own, strict)


def load(
    path: str | os.PathLike,
    *,
    config: Mapping | str | os.PathLike | None = None,
    weights: str = "auto",
    version: str | None = None,
    clip: nn.Module | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = torch.float32,
    strict: bool = True,
) -> DiffusionPrior:
    """Load a prior, in eval mode. The global random generators are not touched.

    Args:
        path: a safetensors file, ours or not, or a torch pickle: the state dict of a prior or of its network, alone or
            in a trainer's checkpoint, an EMA, DDP or torch.compile. Or the index of a model in several files; or a
            folder of accelerate's `save_state` or of transformers' Trainer. Constants may be missing: rotary
            frequencies and tables of the noise schedule are derived.
        config: what weights do not show, as a dict or a JSON file: ours, `{"net": …, "prior": …}`, or DALLE2-pytorch's
            of a training or of a prior. Arguments of the network that it leaves out are inferred; where the file cannot
            show whether there is a rotary embedding, there is one. By default what the file records; else a config.json
            beside it that is one of these and fits the weights.
        weights: "ema", "model", or "auto" for the EMA where there is one.
        version: the dalle2-pytorch release that trained the weights, where the file does not record it. Releases
            before 1.4.3 had other attention, at times under the same keys.
        clip: see `DiffusionPrior`. CLIP weights in the file are ignored without it.
        dtype: of the network; None keeps the file's. The noise schedule stays fp32.
        strict: raise for missing and unexpected keys, for tensors that are not what `save` wrote, and where the network
            here cannot give the results of the release that trained the weights. With False these are only reported,
            and missing weights are random.
    Returns:
        The prior, with its `LoadReport` in `load_report`.
    Raises:
        FileNotFoundError: there is no such file, or one that an index names is missing.
        ValueError: it is damaged, unsafe, or no prior; tensors are not finite, or have other shapes than the config
            says; the config has an unknown key.
    """
    report = LoadReport(str(path))
    if version is not None and not re.match(r"v?\d+\.\d+", version):
        raise ValueError(f"version={version!r}; it must read like '1.4.2'")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype={dtype!r}; it must be a floating point dtype of torch, or None")
    with read_model(Path(path)) as model:
        payload, header, file = model.payload, model.header, model.file
        report.notes += model.notes
        header = payload.get(HEADER) if header is None and isinstance(payload.get(HEADER), Mapping) else header
        is_dalle2 = header is None or _is_dalle2(header.get("net"))
        contents = _find_weights(payload, weights, _QUERIES[is_dalle2], report)
        state = contents.tensors
        clip_state = {key[5:]: state.pop(key) for key in list(state) if key.startswith("clip.")}
        used = state | ({} if clip is None else {f"clip.{key}": value for key, value in clip_state.items()})
        check_dense(used, report.path)
        model.fill(used.values())
    contents = replace(contents, tensors=widened(state, report))
    report.version = version or version_string(payload.get("version"))
    found, where = (None, "") if header or config is not None else find_config(payload.get("config"), file)
    del payload, model  # a trainer's is several times the model
    rest = clip, dtype, strict
    if found is not None:
        tried = replace(report, assumed=[f"what {where} says"], guesses=[], notes=[*report.notes], metadata={})
        try:
            prior = _make(replace(contents, tensors=dict(state)), None, found, *rest, tried)
            return _finish(prior, clip_state, tried, device, strict)
        except ValueError as error:
            report.guesses.append(f"what weights do not show, as {where} is not used: {error}")
    return _finish(_make(contents, header, config, *rest, report), clip_state, report, device, strict)


def _make(
    contents: Contents,
    header: Mapping | None,
    config: Mapping | str | os.PathLike | None,
    clip: nn.Module | None,
    dtype: torch.dtype | None,
    strict: bool,
    report: LoadReport,
) -> DiffusionPrior:
    """The prior of a file's tensors, by our header, or by the config and what tensors show."""
    written: dict[str, str] = {}
    with one_error(report.path):
        if header is None:
            state, net_config, prior_config = translate(contents, config, report, strict)
        else:
            state = contents.tensors
            net_config, prior_config = _recorded(header, config, report)
            written = {key: value for key, value in header.get("checksums", {}).items() if key in state}
    tables = (header or {}).get(TABLES, [])
    shown = dict(state)  # before constants are derived, of layers that the config alone may have
    try:
        with one_error(report.path):
            prior = _build(state, written, net_config, prior_config, clip, dtype, report, strict)
            prior.learned_tables = read_tables(tables, prior.noise_scheduler.num_timesteps)
            report.notes += [f"learned table: {table}" for table in prior.learned_tables.values()]
            return prior
    except ValueError as error:
        if not (differing := contradictions(shown, net_config, prior_config)):
            raise
        source = config if isinstance(config, (str, os.PathLike)) else f"the {report.architecture} config"
        have, said = (" and ".join(f"{name}={quoted(pair[i])}" for name, pair in differing.items()) for i in (0, 1))
        raise ValueError(
            f"the weights of {report.path} have {have}, {os.fspath(source)} says {said}: {error}"
        ) from None


def _finish(
    prior: DiffusionPrior, clip_state: dict[str, Tensor], report: LoadReport, device: str | torch.device, strict: bool
) -> DiffusionPrior:
    """The prior with its CLIP's weights and its report, in eval mode on the device."""
    if clip_state and prior.clip is None:
        report.notes.append(f"{len(clip_state)} tensors of a CLIP were ignored; they need clip=")
    elif clip_state:
        try:
            _fill_clip(prior.clip, clip_state, strict)
        except RuntimeError as error:
            raise ValueError(f"{report.path}: its CLIP weights do not fit the clip given ({error})") from error
    for guess in report.guesses:
        warnings.warn(f"{report.path}: assumed {guess}", stacklevel=3)
    prior.text_encoder = report.metadata.get("text_encoder")
    prior.load_report = report
    return prior.to(device).eval()


# saving


def _contents(prior: DiffusionPrior, metadata: Mapping | None = None) -> tuple[dict[str, Tensor], dict]:
    """The tensors of a prior without its CLIP, none sharing memory, and its record; checked to be loadable."""
    config = record(prior, metadata)
    state, storages = {}, set()
    for key, value in prior.state_dict().items():
        if not key.startswith("clip."):
            value = value.detach().cpu().contiguous()
            storage = value.untyped_storage()
            if storage.data_ptr() in storages or storage.nbytes() != value.nbytes:
                value = value.clone()
            storages.add(value.untyped_storage().data_ptr())
            state[without_wrappers(key)] = value
    if differing := unlike_config(prior.net):
        raise ValueError(f"the network is not what its `config` builds; differing: {first_few(differing)}")
    return state, config


def save(prior: DiffusionPrior, path: str | os.PathLike, *, metadata: Mapping | None = None) -> None:
    """Save a prior, without its CLIP, as one safetensors file that records how to build it. Atomic.

    The record has the learned step tables, and a checksum of each tensor, which `load` compares: see
    `weight_files.checks.checksum`.

    Args:
        path: ends in .safetensors; an existing file is replaced.
        metadata: JSON values to keep with it; `load` returns them in `load_report.metadata`.
    Raises:
        ValueError: another suffix, or a network that is not what its `config` builds.
        TypeError: metadata that is not JSON.
    """
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"path={os.fspath(path)!r}; it must end in .safetensors")
    state, config = _contents(prior, metadata)
    with atomic(path) as temporary:
        config["checksums"] = checksums(state)
        safetensors.torch.save_file(state, temporary, metadata={HEADER: json.dumps(config)})


def save_peer(prior: DiffusionPrior, path: str | os.PathLike) -> None:
    """Save the state dict that a `dalle2_pytorch.DiffusionPrior` of the same arguments loads strictly. Atomic.

    Raises ValueError for a suffix other than .pt and .pth, and for what dalle2-pytorch has not: dot-product attention,
    text of another width, conditions. Learned step tables, which it has not either, are left out.
    """
    if Path(path).suffix not in (".pt", ".pth"):
        raise ValueError(f"path={os.fspath(path)!r}; it must end in .pt or .pth")
    state, config = _contents(prior)
    check_fits_peer(config["net"])
    state, noted = OrderedDict(state), prior.state_dict()._metadata
    named = ((without_wrappers(f"{name}.")[:-1], version) for name, version in noted.items())
    state._metadata = {name: version for name, version in named if not f"{name}.".startswith("clip.")}
    with atomic(path) as temporary:
        torch.save(state, temporary)

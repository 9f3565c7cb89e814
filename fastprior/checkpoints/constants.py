"""What a file may lack, since it can be derived: rotary frequencies, and the tables of the noise schedule."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprior.checkpoints.contents import Contents, LoadReport
from fastprior.diffusion.schedule import BETA_SCHEDULES, schedule_tables
from fastprior.models.dalle2.layers import RotaryEmbedding

SCHEDULE = "noise_scheduler."
OLD_SCHEDULE = r"^(betas|\w*alphas_cumprod\w*|posterior_\w+|p2_loss_weight)$"  # before 0.11.0, without a prefix
_FREQS = ".rotary_emb.freqs"
_ATTENTION = "net.causal_transformer.layers.0.0"


def is_constant(key: str) -> bool:
    """Whether a key of a prior's state dict is that of a constant, which averages of the weights may leave out."""
    return key.startswith(SCHEDULE) or key.endswith(_FREQS) or re.search(OLD_SCHEDULE, key) is not None


def has_rotary(state: Mapping[str, Tensor], contents: Contents, given_net: Mapping, report: LoadReport) -> bool:
    """Whether there is a rotary embedding; absent frequencies say nothing where constants may have been dropped."""
    if any(key.endswith(_FREQS) for key in state):
        return True
    if _ATTENTION in contents.modules:
        return any(name.startswith("net.") and name.endswith(".rotary_emb") for name in contents.modules)
    if "rotary_emb" in given_net:
        return given_net["rotary_emb"]
    keeps_constants = not contents.shared_once and any(key.startswith(SCHEDULE) for key in state)
    is_whole = {"dim", "depth"} <= given_net.keys()  # a configuration that leaves out what has its default
    value = is_whole or not keeps_constants
    why = "the default of a config that leaves it out" if is_whole else "the default"
    why = why if value else "the constants of the noise schedule are there"
    said = f"rotary_emb={value}, {why}: the file has no rotary frequencies"
    if is_whole and not keeps_constants:
        report.notes.append(said)
    else:
        report.guesses.append(f"{said}. Give config={{'net': {{'rotary_emb': {not value}}}}} if that is wrong")
    return value


def _fits(table: Tensor, wanted: Tensor) -> bool:
    return table.shape == wanted.shape and torch.allclose(wanted.float(), table.float(), rtol=0.01, atol=1e-6)


def _tables(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tables of a schedule in a state dict, those first that say most of it; releases before 0.9.0 have no p2."""
    names = (name for name in schedule_tables(torch.ones(1)) if name != "p2_loss_weight")
    return {name: state[SCHEDULE + name] for name in names if SCHEDULE + name in state}


def read_schedule(
    state: Mapping[str, Tensor], num_timesteps: int | None, given_prior: Mapping, report: LoadReport
) -> dict:
    """The prior's `timesteps` and `beta_schedule`, as far as any table of the schedule in a file shows them."""
    tables = _tables(state)
    if not tables:
        defaults = {"beta_schedule": "cosine"} | ({} if num_timesteps else {"timesteps": 1000})
        assumed = [f"{name}={value!r}" for name, value in defaults.items() if name not in given_prior]
        if assumed:
            said = f"{', '.join(assumed)}, the default: there is no noise schedule in the file"
            report.guesses.append(f"{said}. Give config= for another")
        else:
            report.notes.append("no noise schedule in the file: it is the config's")
        return {"timesteps": num_timesteps or 1000}
    name, table = next(iter(tables.items()))
    if table.ndim != 1:
        raise ValueError(f"{report.path}: {SCHEDULE}{name} has shape {tuple(table.shape)}; it must be (timesteps,)")
    prior = {"timesteps": len(table)}
    for schedule, make in BETA_SCHEDULES.items():
        if _fits(table, schedule_tables(make(len(table)))[name]):
            return prior | {"beta_schedule": schedule}
    report.notes.append("the betas fit no named schedule; they are kept")
    return prior


def _betas(tables: Mapping[str, Tensor]) -> Tensor | None:
    """The betas of a schedule, (timesteps,) in fp64, of a table from which they follow."""
    if "betas" in tables:
        return tables["betas"].double()
    if "alphas_cumprod" in tables:
        product = tables["alphas_cumprod"].double()
    elif "sqrt_alphas_cumprod" in tables:
        product = tables["sqrt_alphas_cumprod"].double() ** 2
    else:
        return None
    return 1 - product / F.pad(product[:-1], (1, 0), value=1.0)


def unlike_betas(state: Mapping[str, Tensor]) -> list[str]:
    """Tables of a schedule that are not finite where those that follow from its betas are, such as one at beta 1.

    What 16 bits cannot hold is infinite, too.
    """
    names, unlike = schedule_tables(torch.ones(1)), []
    tables = {name: state[SCHEDULE + name] for name in names if SCHEDULE + name in state}
    follow = schedule_tables(tables["betas"].double()) if "betas" in tables else {}
    for name, table in tables.items():
        odd = table.isnan() if table.dtype.itemsize == 2 else ~table.isfinite()
        same = name in follow and follow[name].shape == odd.shape
        if odd.any() and not (same and (odd <= ~follow[name].isfinite()).all()):
            unlike.append(SCHEDULE + name)
    return unlike


def _restore(state: dict[str, Tensor], wanted: Mapping[str, Tensor], betas_named: bool, report: LoadReport) -> None:
    """Undo the rounding of constants to 16 bits."""
    rounded = [key for key, value in state.items() if value.dtype.itemsize == 2]
    for key in rounded:
        if key.startswith(SCHEDULE) and betas_named and key in wanted and state[key].shape == wanted[key].shape:
            state[key] = wanted[key]
        elif key.endswith(_FREQS):
            exact = RotaryEmbedding(2 * state[key].numel()).freqs.detach()
            state[key] = exact if torch.equal(exact.to(state[key].dtype), state[key]) else state[key]
    if rounded:
        report.notes.append("the noise schedule and rotary frequencies are exact again, where 16 bits rounded them")


def complete(state: dict[str, Tensor], wanted: Mapping[str, Tensor], betas_named: bool, report: LoadReport) -> None:
    """Make the constants of a state dict exact, and add those that it lacks.

    Args:
        state: of a file, completed in place.
        wanted: of a prior built as the file says, with the tables of its schedule; weights may be on the meta device.
        betas_named: whether its schedule is one that has a name.
    """
    _restore(state, wanted, betas_named, report)
    found = _tables(state)
    derived = {key: wanted[key] for key in wanted if key.startswith(SCHEDULE)}
    first = next(iter(found), None)
    if first and found[first].ndim == 1 and not _fits(found[first], wanted[SCHEDULE + first]):
        betas = _betas(found)  # of no name: what is there decides
        tables = {} if betas is None else schedule_tables(betas)
        derived = {SCHEDULE + name: table for name, table in tables.items()}
    freqs = [key for key in wanted if key.endswith(_FREQS)]  # one parameter, which all layers share
    if freqs:
        known = (state[key] for key in freqs if key in state)
        exact = RotaryEmbedding(2 * len(wanted[freqs[0]])).freqs.detach()
        derived |= dict.fromkeys(freqs, next(known, exact))
    report.derived = [key for key in derived if key not in state]
    state.update({key: derived[key] for key in report.derived})

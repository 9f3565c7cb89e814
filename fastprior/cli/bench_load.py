"""What `fastprior bench --serve` measures: one load on a StepEngine, on batches, and on one request at a time."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprior.cli.common import load_prior
from fastprior.prior.diffusion_prior import DiffusionPrior
from fastprior.prior.sampling_quality import Way
from fastprior.serving.load import Ask, Batches, Measured, Submit, asks, offer, one_by_one
from fastprior.serving.remote import Remote
from fastprior.serving.step_engine import StepEngine
from fastprior.utils import atomic

TEXTS = 64  # different ones, so that most prefixes are new
UNLOADED = 5  # requests, one by one, after one that is not timed
SHARE = 0.7  # of requests that are short
BATCH = 16  # prompts of the server of batches
ONE_ALONE = 1.2  # the share above which one at a time would fall behind for ever
COLUMNS = "server", "of one", "came/s", "done/s", "p50 ms", "p95 ms", "p99 ms", "rows/step", "refused"
REMOTE = "the server"
SERVERS = "step by step", f"batches of {BATCH}", "one at a time"


class Level(NamedTuple):
    """A server at a rate: relative to one at a time, and rows of a step where it has such."""

    server: str
    share: float
    measured: Measured
    rows: float


class Case(NamedTuple):
    """What all servers serve: a prior, or a server elsewhere; texts by name; and how."""

    prior: DiffusionPrior | Remote
    text: dict[str, Tensor]
    cond_scale: float
    dtype: torch.dtype
    way: dict[str, str | None]
    rows: int | None


def run(args: argparse.Namespace) -> int:
    """Offer each server the same requests at each rate: the same texts, seeds and times between them."""
    for name in ("plot", "json"):
        path = getattr(args, name)
        if path and not Path(path).absolute().parent.is_dir():
            raise FileNotFoundError(f"--{name} {path}: its folder does not exist")
    if not all(math.isfinite(share) and share > 0 for share in args.load):
        raise ValueError(f"--load {args.load}: rates must be more than 0")
    scale, timesteps = 1.0 if args.cond_scale is None else args.cond_scale, args.timesteps or 64
    way = Way.parse(args.solver or "ddim")._asdict()
    if args.serve:
        remote, servers = Remote(args.serve, args.api_key), (REMOTE,)
        case = Case(remote, remote.random_texts(TEXTS), scale, torch.float32, way, None)
        what = f"{args.serve}, {remote.model['id']}"
    else:
        prior, servers = load_prior(args), SERVERS
        case = Case(prior, _texts(prior), scale, getattr(torch, args.dtype), way, args.rows)
        what = args.dtype
    steps, shares = ([timesteps], [1.0]) if args.short is None else ([args.short, timesteps], [SHARE, 1 - SHARE])
    requests = asks(args.requests, steps, shares, TEXTS)
    mean = _seconds_of_one(servers[-1], case, requests)
    print(f"{what}, {' and '.join(map(str, steps))} steps, cond_scale {scale:g}, {args.requests} requests a rate")
    print(f"one at a time: {mean * 1e3:.0f} ms, {1 / mean:.2f} requests/s")
    print(*(f"{title:>13}" for title in COLUMNS), flush=True)
    levels = []
    for share in args.load:
        for server in servers:
            if server == SERVERS[2] and share > ONE_ALONE:
                continue
            levels.append(_level(server, share, case, requests, share / mean))
            print(*(f"{cell:>13}" for cell in _row(levels[-1])), flush=True)
    if args.json:
        with atomic(args.json) as temporary:
            Path(temporary).write_text(json.dumps([_record(level) for level in levels], indent=1) + "\n")
    if args.plot:
        draw(levels, args.plot)
    return 0


def _seconds_of_one(server: str, case: Case, requests: Sequence[Ask]) -> float:
    """The mean of a request without load, of those that differ in steps as often as they come."""
    with _serving(server, case) as (submit, _):
        seconds = {}
        for timesteps in {ask.timesteps for ask in requests}:
            part = [ask for ask in requests if ask.timesteps == timesteps][: UNLOADED + 1]
            seconds[timesteps] = statistics.median(one_by_one(submit, [part[0], *part])[1:])
    return statistics.mean(seconds[ask.timesteps] for ask in requests)


def _level(server: str, share: float, case: Case, requests: Sequence[Ask], rate: float) -> Level:
    with _serving(server, case) as (submit, stats):
        one_by_one(submit, requests[:1])
        before = stats()
        measured = offer(submit, requests, rate)
        after = stats()
    steps = after["steps"] - before["steps"]
    rows = (after["row_steps"] - before["row_steps"]) / steps if steps else math.nan
    return Level(server, share, measured, rows)


def _texts(prior: DiffusionPrior) -> dict[str, Tensor]:
    """Random captions of full length."""
    draw, net = torch.Generator().manual_seed(0), prior.net
    text = dict(text_embed=F.normalize(torch.randn(TEXTS, net.text_embed_dim, generator=draw), dim=-1))
    if prior.condition_on_text_encodings:
        text["text_encodings"] = torch.randn(TEXTS, net.max_text_len, net.text_dim, generator=draw)
    return {name: t.to(prior.device) for name, t in text.items()}


@contextlib.contextmanager
def _serving(server: str, case: Case) -> Iterator[tuple[Submit, Callable[[], dict]]]:
    """A server, by what takes its requests; and what counts its steps and their rows."""
    prior, text, scale, dtype, way, rows = case
    if isinstance(prior, Remote):

        def submit_there(ask: Ask):
            options = dict(seed=ask.number, guidance_scale=scale, steps=ask.timesteps, **way)
            return prior.submit({name: t[ask.text] for name, t in text.items()}, **options)

        yield submit_there, prior.stats
        return
    if server != SERVERS[0]:
        most = BATCH if server == SERVERS[1] else 1
        batches = Batches(prior, text, scale, most, dtype=dtype, guidance=scale != 1, **way)
        try:
            yield batches.submit, lambda: dict(steps=0, row_steps=0)
        finally:
            batches.close()
        return
    with StepEngine(prior, dtype=dtype, rows=rows, waiting=2**16) as engine:

        def submit(ask: Ask):
            one = {name: t[ask.text] for name, t in text.items()}
            return engine.submit(**one, seed=ask.number, cond_scale=scale, timesteps=ask.timesteps, **way)

        yield submit, engine.stats


def _row(level: Level) -> list[str]:
    measured = level.measured
    times = (f"{measured.percentile(share) * 1e3:.0f}" for share in (50, 95, 99))
    rates = f"{level.share:g}", f"{measured.rate:.2f}", f"{measured.throughput:.2f}"
    rows, refused = "" if math.isnan(level.rows) else f"{level.rows:.1f}", str(sum(measured.refused.values()) or "")
    return [level.server, *rates, *times, rows, refused]


def _record(level: Level) -> dict:
    measured = level.measured
    percentiles = {f"p{share}_s": measured.percentile(share) for share in (50, 95, 99)}
    figures = dict(server=level.server, share=level.share, rate=measured.rate, throughput=measured.throughput)
    rows = None if math.isnan(level.rows) else level.rows
    return figures | percentiles | dict(rows_per_step=rows, answered=len(measured.latencies), refused=measured.refused)


def draw(levels: Sequence[Level], path: str | os.PathLike) -> None:
    """Write a picture of latency against load, the median and the 99th percentile; its kind is that of the suffix."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('matplotlib is not installed: pip install "fastprior[quickstart]"') from error
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for server in dict.fromkeys(level.server for level in levels):
        part = sorted((level for level in levels if level.server == server), key=lambda level: level.share)
        rates = [level.measured.rate for level in part]
        late, median = ([level.measured.percentile(share) for level in part] for share in (99, 50))
        (line,) = axes.plot(rates, late, "o-", markersize=4, label=f"{server}, p99")
        axes.plot(rates, median, "o--", markersize=3, linewidth=1, color=line.get_color(), label=f"{server}, p50")
    axes.set_yscale("log")
    axes.set(xlabel="requests per second that came", ylabel="seconds until the answer")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    with atomic(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix[1:], dpi=150)

"""`fastprior bench`: how fast a checkpoint samples on this machine, beside dalle2-pytorch where that is installed."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from fastprior.prior import DiffusionPrior

PEER_STEPS = 5  # evaluations of the peer are all alike: a few are timed
DTYPES = "float32", "bfloat16", "float16"
QUANTISED = "int8", "float8"
COLUMNS = "batch", "p50 ms", "p99 ms", "ms/step", "modelled", "MB/step", "of reads", "launches", "vs peer"


def add_bench_parser(subparsers) -> None:
    """Add `fastprior bench` to the subparsers of a command line."""
    summary = "measure how fast a checkpoint samples on this machine, beside dalle2-pytorch where it is installed"
    sub = subparsers.add_parser("bench", help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    sub.set_defaults(run=bench_command)
    sub.add_argument("--checkpoint", required=True, metavar="FILE", help="of a prior, or of its training")
    sub.add_argument("--config", metavar="FILE.json", help="where the checkpoint holds none")
    sub.add_argument("--batch-size", type=int, nargs="+", default=[1, 8], metavar="N", help="(1 8)")
    sub.add_argument("--timesteps", type=int, default=64, help="(%(default)s)")
    sub.add_argument("--cond-scale", type=float, default=1.0, help="guidance; 1 is none (%(default)s)")
    sub.add_argument("--dtype", choices=DTYPES, default="float32", help="of our run; the peer's is fp32 (%(default)s)")
    sub.add_argument("--quantise", choices=QUANTISED, help="weights of 8 bits that our steps read")
    sub.add_argument("--runs", type=int, default=10, help="that are timed, after one that is not (%(default)s)")
    sub.add_argument("--eager", action="store_true", help="without torch.compile")
    sub.add_argument("--no-peer", action="store_true", help="do not run dalle2-pytorch")
    sub.add_argument("--device", choices=("cpu", "cuda"), help="by default cuda where there is one")


def bench_command(args: argparse.Namespace) -> int:
    """`fastprior bench`: whole runs, prefill included.

    "modelled" is what a step should take (see `step_cost.step_seconds`), "of reads" the share of its reads in its time,
    and "launches" of kernels are those of a step: none on the CPU, where linears, or all of them, are calls of C.
    """
    import torch

    import fastprior

    for option, value in (("--runs", args.runs), *(("--batch-size", batch) for batch in args.batch_size)):
        if value < 1:
            raise ValueError(f"{option} {value}: it must be at least 1")
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    prior = fastprior.load(args.checkpoint, config=args.config).to(device).eval()
    peer = None if args.no_peer else _peer(prior, device)
    bandwidth = read_bandwidth(device)
    weights = f"{args.dtype}, steps of {args.quantise}" if args.quantise else args.dtype
    print(f"{device}, {weights}, {args.timesteps} steps, cond_scale {args.cond_scale:g}; ", end="")
    print(f"memory reads {bandwidth / 1e9:.1f} GB/s; dalle2-pytorch: {'fp32, eager' if peer else 'not measured'}")
    print(*(f"{title:>9}" for title in COLUMNS))
    for batch in args.batch_size:
        print(*(f"{cell:>9}" for cell in _row(prior, peer, batch, bandwidth, args)), flush=True)
    return 0


def _peer(prior: DiffusionPrior, device: torch.device):
    """The same prior in dalle2-pytorch; None where it is not installed, or has no equal."""
    from fastprior.checkpoint import check_fits_peer

    if importlib.util.find_spec("dalle2_pytorch") is None:
        return None
    try:
        check_fits_peer(prior.net.config)
    except ValueError as error:
        print(f"dalle2-pytorch is left out: {error}")
        return None
    import dalle2_pytorch

    options = {name: value for name, value in prior.config.items() if name != "clamp"}
    known = {name: v for name, v in prior.net.config.items() if name not in ("cosine_sim", "dot_scale")}
    peer = dalle2_pytorch.DiffusionPrior(dalle2_pytorch.DiffusionPriorNetwork(**known), **options)
    own = {name: t for name, t in prior.state_dict().items() if not name.startswith("clip.")}
    peer.load_state_dict(own)
    return peer.to(device).eval()


def _row(prior: DiffusionPrior, peer, batch: int, bandwidth: float, args: argparse.Namespace) -> list[str]:
    import torch

    from fastprior.serving import PriorSampler

    guided, dtype = args.cond_scale != 1, getattr(torch, args.dtype)
    sampler = PriorSampler(
        prior, batch_sizes=(batch,), timesteps=args.timesteps, dtype=dtype, guidance=guided, compile=not args.eager,
        quantise=args.quantise,
    )  # fmt: skip
    sampler.warmup()
    text = _text(prior, batch)
    theirs, ours = [], []
    for number in range(args.runs):
        if peer is not None and number < 3:  # in turns, so that both see the same machine
            theirs.append(_peer_seconds(peer, text, args))
        ours.append(seconds(lambda: sampler(**text, cond_scale=args.cond_scale), prior.device))
    whole, stats = statistics.median(ours), sampler.stats(bandwidth)
    read = stats["weight_bytes"] + stats["prefix_bytes"] + stats["table_bytes"]
    step_s = whole / max(len(sampler.plan.table), 1)
    late = statistics.quantiles(ours, n=100, method="inclusive")[98] if len(ours) > 1 else whole
    ratio = f"{statistics.median(theirs) / whole:.2f}x" if theirs else ""
    floor = f"{read / bandwidth / step_s:.0%}"
    times = f"{whole * 1e3:.1f}", f"{late * 1e3:.1f}", f"{step_s * 1e3:.2f}", f"{stats['modelled_step_ms']:.3f}"
    return [str(batch), *times, f"{read / 1e6:.2f}", floor, str(stats["launches"] or "none"), ratio]


def _text(prior: DiffusionPrior, batch: int) -> dict:
    """Random captions of full length."""
    import torch
    import torch.nn.functional as F

    draw, net = torch.Generator().manual_seed(batch), prior.net
    text = dict(text_embed=F.normalize(torch.randn(batch, net.text_embed_dim, generator=draw), dim=-1))
    if prior.condition_on_text_encodings:
        text["text_encodings"] = torch.randn(batch, net.max_text_len, net.text_dim, generator=draw)
    return {name: t.to(prior.device) for name, t in text.items()}


def _peer_seconds(peer, text: dict, args: argparse.Namespace) -> float:
    """Of a whole run, from a few of its evaluations."""
    total, steps = peer.noise_scheduler.num_timesteps, min(args.timesteps, PEER_STEPS)

    def run() -> None:
        shape = len(text["text_embed"]), peer.image_embed_dim
        with contextlib.redirect_stderr(io.StringIO()):
            peer.p_sample_loop(shape, text_cond=text, cond_scale=args.cond_scale, timesteps=steps)

    asked, made = (n if n == total else n - 1 for n in (args.timesteps, steps))  # its DDIM makes one less than it says
    return seconds(run, peer.device) * asked / max(made, 1)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    import torch

    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second of reading a tensor larger than the caches, best of several."""
    import torch

    x = torch.ones(2**28, device=device)  # 1 GiB
    return x.nbytes / min(seconds(x.sum, device) for _ in range(8))

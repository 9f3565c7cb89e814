"""`fastprior bench`: how fast a checkpoint samples on this machine, beside its peer where that is installed."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fastprior.serving.measure import read_bandwidth, seconds

if TYPE_CHECKING:
    import torch

    from fastprior.pipelines.prior_pipeline import PriorPipeline
    from fastprior.prior.diffusion_prior import DiffusionPrior

PEER_STEPS = 5  # evaluations of the peer are all alike: a few are timed
DTYPES = "float32", "bfloat16", "float16"
QUANTISED = "int8", "float8"
FAMILIES = {"dalle2-pytorch": (64, 1.0), "diffusers": (25, 4.0)}  # by peer: steps and guidance that are usual
COLUMNS = "batch", "p50 ms", "p99 ms", "ms/step", "modelled", "MB/step", "of reads", "launches", "vs peer"


def add_bench_parser(subparsers) -> None:
    """Add `fastprior bench` to the subparsers of a command line."""
    summary = "measure how fast a checkpoint samples on this machine, beside its peer where that is installed"
    sub = subparsers.add_parser("bench", help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    sub.set_defaults(run=bench_command)
    sub.add_argument("--checkpoint", required=True, metavar="PATH", help="a prior's file, or a folder of diffusers")
    sub.add_argument("--config", metavar="FILE.json", help="where a file holds none")
    sub.add_argument("--batch-size", type=int, nargs="+", default=[1, 8], metavar="N", help="(1 8)")
    sub.add_argument("--timesteps", type=int, help="(64; of diffusers 25)")
    sub.add_argument("--cond-scale", type=float, help="guidance; 1 is none (1; of diffusers 4)")
    sub.add_argument("--dtype", choices=DTYPES, default="float32", help="of our run; the peer's is fp32 (%(default)s)")
    sub.add_argument("--quantise", choices=QUANTISED, help="weights of 8 bits that our steps read")
    sub.add_argument("--runs", type=int, default=10, help="that are timed, after one that is not (%(default)s)")
    sub.add_argument("--eager", action="store_true", help="without torch.compile")
    sub.add_argument("--no-peer", action="store_true", help="do not run dalle2-pytorch or diffusers")
    sub.add_argument("--device", choices=("cpu", "cuda"), help="by default cuda where there is one")


def bench_command(args: argparse.Namespace) -> int:
    """`fastprior bench`: whole runs, prefill included, encoders not; of diffusers itself all forwards of its prior.

    "modelled" is what a step should take (see `step_cost.step_seconds`), "of reads" the share of its reads in its time,
    and "launches" of kernels are those of a step: none on the CPU, where linears, or all of them, are calls of C.
    """
    import torch

    import fastprior

    for option, value in (("--runs", args.runs), *(("--batch-size", batch) for batch in args.batch_size)):
        if value < 1:
            raise ValueError(f"{option} {value}: it must be at least 1")
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    name = "diffusers" if Path(args.checkpoint).is_dir() else "dalle2-pytorch"
    steps, scale = FAMILIES[name]
    args.timesteps = steps if args.timesteps is None else args.timesteps
    args.cond_scale = scale if args.cond_scale is None else args.cond_scale
    if name == "diffusers":
        if args.config:
            raise ValueError(f"--config {args.config}: a folder of diffusers holds its own; it must not be given")
        pipeline, peer = _pipeline(args, device)
        timed = [partial(_of_pipeline, pipeline, peer, batch, args) for batch in args.batch_size]
    else:
        prior = fastprior.load(args.checkpoint, config=args.config).to(device).eval()
        peer = None if args.no_peer else _peer(prior, device)
        timed = [partial(_of_sampler, prior, peer, batch, args) for batch in args.batch_size]
    bandwidth = read_bandwidth(device)
    weights = f"{args.dtype}, steps of {args.quantise}" if args.quantise else args.dtype
    print(f"{device}, {weights}, {args.timesteps} steps, cond_scale {args.cond_scale:g}; ", end="")
    print(f"memory reads {bandwidth / 1e9:.1f} GB/s; {name}: {'fp32, eager' if peer else 'not measured'}")
    print(*(f"{title:>9}" for title in COLUMNS))
    for batch, make in zip(args.batch_size, timed):
        print(*(f"{cell:>9}" for cell in _row(make(), batch, bandwidth, args.runs, device)), flush=True)
    return 0


class Timed(NamedTuple):
    """What a row times.

    Attributes:
        run: a whole run of ours; it ran before.
        peer_seconds: of a whole run of the peer; None without it.
        stats: of ours, given the bandwidth.
        evaluations: of the network in a run of ours.
    """

    run: Callable[[], object]
    peer_seconds: Callable[[], float] | None
    stats: Callable[[float], dict[str, float]]
    evaluations: int


def _peer(prior: DiffusionPrior, device: torch.device):
    """The same prior in dalle2-pytorch; None where it is not installed, or has no equal."""
    from fastprior.peer import check_fits_peer

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


def _of_sampler(prior: DiffusionPrior, peer, batch: int, args: argparse.Namespace) -> Timed:
    import torch

    from fastprior.serving.prior_sampler import PriorSampler

    guided, dtype = args.cond_scale != 1, getattr(torch, args.dtype)
    sampler = PriorSampler(
        prior, batch_sizes=(batch,), timesteps=args.timesteps, dtype=dtype, guidance=guided, compile=not args.eager,
        quantise=args.quantise,
    )  # fmt: skip
    sampler.warmup()
    text = _text(prior, batch)
    run = partial(sampler, **text, cond_scale=args.cond_scale)
    return Timed(run, peer and partial(_peer_seconds, peer, text, args), sampler.stats, len(sampler.plan.table))


def _pipeline(args: argparse.Namespace, device: torch.device) -> tuple[PriorPipeline, object]:
    """The pipeline of a folder, or one of its prior's folder, and diffusers' model of the same weights."""
    import torch

    from fastprior.diffusion.diffusers_schedules import DiffusersSchedule
    from fastprior.models.prior_transformer.model import PriorTransformer
    from fastprior.pipelines.prior_pipeline import PriorPipeline

    options = dict(compile=not args.eager, batch_sizes=tuple(args.batch_size), quantise=args.quantise)
    dtype, folder = getattr(torch, args.dtype), Path(args.checkpoint)
    if (folder / "prior").is_dir():
        pipeline = PriorPipeline.from_pretrained(folder, dtype=dtype, device=device, **options)
        folder = folder / "prior"
    else:
        prior = PriorTransformer.from_pretrained(folder, torch_dtype=dtype).to(device)
        pipeline = PriorPipeline(prior, DiffusersSchedule("UnCLIPScheduler", prediction_type="sample"), **options)
    if args.no_peer or importlib.util.find_spec("diffusers") is None:
        return pipeline, None
    import diffusers

    return pipeline, diffusers.PriorTransformer.from_pretrained(folder).to(device).eval()


def _of_pipeline(pipeline: PriorPipeline, peer, batch: int, args: argparse.Namespace) -> Timed:
    """With ready encodings of full length, and of an empty text of two tokens."""
    import torch

    from fastprior.pipelines.text_encoding import TextEncoding

    config, device = pipeline.prior.config, pipeline.device
    tokens, dim = config["num_embeddings"], config["embedding_dim"]
    draw, given = torch.Generator().manual_seed(batch), []
    for count, length in (batch, tokens), (1, min(2, tokens)):
        shapes = (count, config["embedding_proj_dim"] or dim), (count, tokens, dim)
        encoding = (torch.randn(shape, generator=draw) for shape in shapes)
        shown = (torch.arange(tokens) < length).expand(count, -1)
        given.append(TextEncoding(*(t.to(device) for t in (*encoding, shown))))
    options = dict(num_inference_steps=args.timesteps, guidance_scale=args.cond_scale)
    run = partial(pipeline, *given, **options, zero_embed=torch.zeros(1, dim, device=device))
    run()
    evaluations = len(pipeline.schedule.table(args.timesteps))
    theirs = peer and partial(_diffusers_seconds, peer, given, evaluations, args.cond_scale > 1)
    return Timed(run, theirs, pipeline.stats, evaluations)


def _diffusers_seconds(peer, given: list, evaluations: int, guided: bool) -> float:
    """Of all forwards of a run, without its scheduler, from a few of them."""
    import torch

    (embeds, encodings, mask), null = given
    if guided:  # as pipelines do: the unconditional rows lie in front
        expanded = (t.expand(len(embeds), *t.shape[1:]) for t in null)
        embeds, encodings, mask = (torch.cat(pair) for pair in zip(expanded, given[0]))
    x = torch.zeros(len(embeds), encodings.shape[-1], device=embeds.device)

    @torch.no_grad()
    def forward() -> None:
        peer(x, timestep=3, proj_embedding=embeds, encoder_hidden_states=encodings, attention_mask=mask)

    times = [seconds(forward, embeds.device) for _ in range(min(evaluations, PEER_STEPS))]
    return statistics.median(times) * evaluations


def _row(timed: Timed, batch: int, bandwidth: float, runs: int, device: torch.device) -> list[str]:
    theirs, ours = [], []
    for number in range(runs):
        if timed.peer_seconds is not None and number < 3:  # in turns, so that both see the same machine
            theirs.append(timed.peer_seconds())
        ours.append(seconds(timed.run, device))
    whole, stats = statistics.median(ours), timed.stats(bandwidth)
    read = stats["weight_bytes"] + stats["prefix_bytes"] + stats["table_bytes"]
    step_s = whole / max(timed.evaluations, 1)
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

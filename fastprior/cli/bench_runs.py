"""What `fastprior bench` times: whole runs of fastprior and of its peer, in turns."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastprior.batches import map_rows
from fastprior.cli.common import device_of, load_prior
from fastprior.diffusion.diffusers_schedules import DiffusersSchedule
from fastprior.engine.shapes import can_compile
from fastprior.models.prior_transformer.model import PriorTransformer
from fastprior.peer import check_fits_peer
from fastprior.pipelines.prior_pipeline import PriorPipeline
from fastprior.pipelines.text_encoding import TextEncoding
from fastprior.prior.diffusion_prior import DiffusionPrior
from fastprior.prior.sampling_quality import Way
from fastprior.serving.measure import read_bandwidth, seconds
from fastprior.serving.prior_sampler import PriorSampler
from fastprior.weight_files.model_files import MODEL_NAMES

PEER_STEPS = 5  # evaluations of the peer are all alike: a few are timed
FAMILIES = {"dalle2-pytorch": (64, 1.0), "diffusers": (25, 4.0)}  # by peer: steps and guidance that are usual
COLUMNS = "batch", "p50 ms", "p99 ms", "ms/step", "modelled", "MB/step", "of reads", "launches", "vs peer"


def run(args: argparse.Namespace) -> int:
    """Time whole runs, prefill included and encoders not; of diffusers itself all forwards of its prior.

    "modelled" is what a step should take (see `step_cost.step_seconds`), "of reads" the share of its reads in its time,
    and "launches" of kernels are those of a step: none on the CPU, where linears, or all of them, are calls of C.
    """
    device = torch.device(device_of(args))
    folder = Path(args.checkpoint)
    is_training = any((folder / name).is_file() for name in MODEL_NAMES)  # accelerate's folder, or a Trainer's
    name = "diffusers" if folder.is_dir() and not is_training else "dalle2-pytorch"
    steps, scale = FAMILIES[name]
    args.timesteps = steps if args.timesteps is None else args.timesteps
    args.cond_scale = scale if args.cond_scale is None else args.cond_scale
    if name == "diffusers":
        if args.config:
            raise ValueError(f"--config {args.config}: a folder of diffusers holds its own; it must not be given")
        if args.solver:
            raise ValueError(f"--solver {args.solver}: it is for priors; a folder of diffusers runs its own scheduler")
        pipeline, peer = _pipeline(args, device)
        make = partial(_pipeline_runs, pipeline, peer, args)
    else:
        prior = load_prior(args)
        peer = None if args.no_peer else _peer(prior, device)
        make = partial(_sampler_runs, prior, peer, args)
    bandwidth = read_bandwidth(device)
    weights = f"{args.dtype}, steps of {args.quantise}" if args.quantise else args.dtype
    print(f"{device}, {weights}, {args.timesteps} steps, cond_scale {args.cond_scale:g}; ", end="")
    print(f"memory reads {bandwidth / 1e9:.1f} GB/s; {name}: {'fp32, eager' if peer else 'not measured'}")
    print(*(f"{title:>9}" for title in COLUMNS))
    for batch in args.batch_size:
        print(*(f"{cell:>9}" for cell in _row(make(batch), batch, bandwidth, args.runs, device)), flush=True)
    return 0


class Runs(NamedTuple):
    """What a row of the table times."""

    ours: Callable[[], object]  # a whole run of fastprior, which ran before
    peer_seconds: Callable[[], float] | None  # measures a whole run of the peer
    stats: Callable[[float], dict[str, float]]  # of ours, given the bandwidth
    evaluations: int  # of the network in a run of ours


def _peer(prior: DiffusionPrior, device: torch.device):
    """The prior made of dalle2-pytorch; None where it is not installed, or has no equal."""
    if importlib.util.find_spec("dalle2_pytorch") is None:
        return None
    try:
        check_fits_peer(prior.net.config)
    except ValueError as error:
        print(f"dalle2-pytorch is left out: {error}")
        return None
    import dalle2_pytorch

    options = {name: value for name, value in prior.config.items() if name != "clamp"}
    net_options = {name: v for name, v in prior.net.config.items() if name not in ("cosine_sim", "dot_scale")}
    peer = dalle2_pytorch.DiffusionPrior(dalle2_pytorch.DiffusionPriorNetwork(**net_options), **options)
    peer.load_state_dict({name: t for name, t in prior.state_dict().items() if not name.startswith("clip.")})
    return peer.to(device).eval()


def _sampler_runs(prior: DiffusionPrior, peer, args: argparse.Namespace, batch: int) -> Runs:
    """Runs of a PriorSampler on random captions of full length."""
    way = Way.parse(args.solver)._asdict() if args.solver else {}
    sampler = PriorSampler(
        prior, batch_sizes=(batch,), timesteps=args.timesteps, dtype=getattr(torch, args.dtype), **way,
        guidance=args.cond_scale != 1, compile=not args.eager and can_compile(prior.device), quantise=args.quantise,
    )  # fmt: skip
    sampler.warmup()
    draw, net = torch.Generator().manual_seed(batch), prior.net
    text = dict(text_embed=F.normalize(torch.randn(batch, net.text_embed_dim, generator=draw), dim=-1))
    if prior.condition_on_text_encodings:
        text["text_encodings"] = torch.randn(batch, net.max_text_len, net.text_dim, generator=draw)
    text = map_rows(text, lambda t: t.to(prior.device))
    ours = partial(sampler, **text, cond_scale=args.cond_scale)
    return Runs(ours, peer and partial(_peer_seconds, peer, text, args), sampler.stats, len(sampler.plan.table))


def _pipeline(args: argparse.Namespace, device: torch.device) -> tuple[PriorPipeline, object]:
    """The pipeline of a whole folder, or of a prior's alone, and diffusers' model of the same weights."""
    options = dict(
        compile=not args.eager and can_compile(device), batch_sizes=tuple(args.batch_size), quantise=args.quantise
    )
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


def _pipeline_runs(pipeline: PriorPipeline, peer, args: argparse.Namespace, batch: int) -> Runs:
    """Runs of a PriorPipeline on random encodings of full length, and on those of an empty text of two tokens."""
    config, device = pipeline.prior.config, pipeline.device
    tokens, dim = config["num_embeddings"], config["embedding_dim"]
    draw, texts = torch.Generator().manual_seed(batch), []
    for count, length in (batch, tokens), (1, min(2, tokens)):
        shapes = (count, config["embedding_proj_dim"] or dim), (count, tokens, dim)
        encoding = (torch.randn(shape, generator=draw) for shape in shapes)
        mask = (torch.arange(tokens) < length).expand(count, -1)
        texts.append(TextEncoding(*(t.to(device) for t in (*encoding, mask))))
    options = dict(num_inference_steps=args.timesteps, guidance_scale=args.cond_scale)
    ours = partial(pipeline, *texts, **options, zero_embed=torch.zeros(1, dim, device=device))
    ours()
    evaluations = len(pipeline.schedule.table(args.timesteps))
    peer_seconds = peer and partial(_diffusers_seconds, peer, *texts, evaluations, args.cond_scale > 1)
    return Runs(ours, peer_seconds, pipeline.stats, evaluations)


def _diffusers_seconds(peer, text: TextEncoding, empty: TextEncoding, evaluations: int, guided: bool) -> float:
    """Seconds of all forwards of a run, without its scheduler, from a few of them."""
    embeds, encodings, mask = text
    if guided:  # as pipelines do: the unconditional rows lie in front
        embeds, encodings, mask = (torch.cat((e.expand_as(t), t)) for e, t in zip(empty, text))
    x = torch.zeros(len(embeds), encodings.shape[-1], device=embeds.device)

    @torch.no_grad()
    def forward() -> None:
        peer(x, timestep=3, proj_embedding=embeds, encoder_hidden_states=encodings, attention_mask=mask)

    times = [seconds(forward, embeds.device) for _ in range(min(evaluations, PEER_STEPS))]
    return statistics.median(times) * evaluations


def _row(timed: Runs, batch: int, bandwidth: float, runs: int, device: torch.device) -> list[str]:
    """The cells of a batch size, in the order of COLUMNS."""
    theirs, ours = [], []
    for number in range(runs):
        if timed.peer_seconds is not None and number < 3:  # in turns, so that both see the same machine
            theirs.append(timed.peer_seconds())
        ours.append(seconds(timed.ours, device))
    whole, stats = statistics.median(ours), timed.stats(bandwidth)
    read = stats["weight_bytes"] + stats["prefix_bytes"] + stats["table_bytes"]
    step_s = whole / max(timed.evaluations, 1)
    late = statistics.quantiles(ours, n=100, method="inclusive")[98] if len(ours) > 1 else whole
    ratio = f"{statistics.median(theirs) / whole:.2f}x" if theirs else ""
    floor = f"{read / bandwidth / step_s:.0%}"
    times = f"{whole * 1e3:.1f}", f"{late * 1e3:.1f}", f"{step_s * 1e3:.2f}", f"{stats['modelled_step_ms']:.3f}"
    return [str(batch), *times, f"{read / 1e6:.2f}", floor, str(stats["launches"] or "none"), ratio]


def _peer_seconds(peer, text: dict, args: argparse.Namespace) -> float:
    """Seconds of a whole run, from a few of its evaluations."""
    total, steps = peer.noise_scheduler.num_timesteps, min(args.timesteps, PEER_STEPS)

    def run() -> None:
        shape = len(text["text_embed"]), peer.image_embed_dim
        with contextlib.redirect_stderr(io.StringIO()):
            peer.p_sample_loop(shape, text_cond=text, cond_scale=args.cond_scale, timesteps=steps)

    asked, made = (n if n == total else n - 1 for n in (args.timesteps, steps))  # its DDIM makes one less than it says
    return seconds(run, peer.device) * asked / max(made, 1)

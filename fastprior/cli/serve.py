"""`fastprior serve`: image embeddings over HTTP."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from fastprior.cli import common

KEY = "FASTPRIOR_API_KEY"
LOCAL = "127.0.0.1", "::1", "localhost"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    summary = "serve image embeddings over HTTP: texts or their embeddings in, steps shared by all requests"
    parser = common.add_command(subparsers, "serve", run, summary)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="FILE", help="of a prior; old ones: see convert")
    add("--host", default="127.0.0.1", help="to listen on (%(default)s)")
    add("--port", type=int, default=8000, help="0 takes any that is free (%(default)s)")
    add("--name", help="of the model, in requests and answers (the file's, without its suffix)")
    add("--api-key", metavar="KEY", help=f"that requests under /v1 must carry; better in the environment, {KEY}")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the network (%(default)s)")
    add("--steps", type=int, help="of requests that say nothing of it (16 of sde-dpm++ at logsnr times)")
    add("--solver", help="of these: ddpm, ddim, ddim_trailing, dpm++, sde-dpm++ or learned")
    add("--spacing", help="of their times: trailing, logsnr or karras")
    add("--rows", type=int, metavar="N", help="that share steps at most; by default as many as pay, which is measured")
    add("--waiting", type=int, default=256, metavar="N", help="embeddings that may wait (%(default)s); then it is 429")
    add("--most-rows", type=int, default=64, metavar="N", help="embeddings of one request (%(default)s)")
    add("--most-body", type=int, default=32 * 2**20, metavar="BYTES", help="of one request (%(default)s)")
    add("--timeout", type=float, default=60.0, metavar="SECONDS", help="of a request at most (%(default)g)")
    add("--drain", type=float, default=30.0, metavar="SECONDS", help="that requests have left at the end (%(default)g)")
    add("--alike", action="store_true", help="bits do not depend on what else runs, with 16 bits too; slower there")
    common.add_clip_options(parser)


def run(args: argparse.Namespace) -> int:
    common.check_least(1, steps=args.steps, rows=args.rows, waiting=args.waiting, most_rows=args.most_rows)
    common.check_least(1, most_body=args.most_body)
    if not 0 <= args.port < 2**16:
        raise ValueError(f"--port {args.port}: it must be 0 to {2**16 - 1}")
    if bool(args.clip_model) != bool(args.clip_pretrained):
        raise ValueError("--clip-model and --clip-pretrained go together")
    try:
        from fastprior.server.run import listen, serve
    except ImportError as error:
        raise ImportError(f'{error.name} is not installed: pip install "fastprior[serve]"') from error
    from fastprior.server.settings import Settings

    settings = Settings(
        name=args.name or Path(args.checkpoint).stem,
        api_key=os.environ.get(KEY) if args.api_key is None else args.api_key,  # an empty one is an error, not none
        timeout=args.timeout, most_body=args.most_body, most_rows=args.most_rows, drain=args.drain,
    )  # fmt: skip
    settings.check_queue(args.waiting)
    with listen(args.host, args.port) as bound:
        if args.host not in LOCAL and settings.api_key is None:
            common.say("warning", f"anybody who reaches {args.host} may ask: give an API key ({KEY})")
        server = _server(args, settings)
        host, port = bound.getsockname()[:2]
        print(f"serving {settings.name} on http://{host}:{port}", flush=True)
        return serve(server, bound)


def _server(args: argparse.Namespace, settings):
    import torch

    from fastprior.server.app import Server
    from fastprior.server.metrics import Metrics
    from fastprior.serving.step_engine import StepEngine

    prior = common.load_prior(args)
    try:
        common.need_clip(prior, args.checkpoint, "POST /v1/priors/sample")
    except (ValueError, ImportError) as error:
        common.say("note", f"texts cannot be encoded, embeddings can be sent: {error}")
    metrics = Metrics()
    engine = StepEngine(
        prior, timesteps=args.steps, solver=args.solver, spacing=args.spacing, dtype=getattr(torch, args.dtype),
        rows=args.rows, waiting=args.waiting, alike=args.alike or None, events=metrics,
    )  # fmt: skip
    return Server(prior, engine, settings, metrics)

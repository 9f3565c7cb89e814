"""`fastprior bench`: how fast a checkpoint samples on this machine, beside its peer where that is installed."""

from __future__ import annotations

import argparse

from fastprior.cli.common import add_command, add_config_option, add_device_option, check_cond_scale, check_least

DTYPES = "float32", "bfloat16", "float16"
QUANTISED = "int8", "float8"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    summary = "measure how fast a checkpoint samples on this machine, beside its peer where that is installed"
    parser = add_command(subparsers, "bench", run, summary)
    add = parser.add_argument
    add("--checkpoint", metavar="PATH", help="a prior's file, or a folder of diffusers")
    add_config_option(parser)
    add("--batch-size", type=int, nargs="+", default=[1, 8], metavar="N", help="(1 8)")
    add("--timesteps", type=int, help="(64; of diffusers 25)")
    add("--cond-scale", type=float, help="guidance; 1 is none (1; of diffusers 4)")
    add("--solver", help="of a prior, and its spacing if it has one, such as dpm++:logsnr or learned (ddim)")
    add("--dtype", choices=DTYPES, default="float32", help="of our run; the peer's is fp32 (%(default)s)")
    add("--quantise", choices=QUANTISED, help="weights of 8 bits that our steps read")
    add("--runs", type=int, default=10, help="that are timed, after one that is not (%(default)s)")
    add("--eager", action="store_true", help="without torch.compile")
    add("--no-peer", action="store_true", help="do not run dalle2-pytorch or diffusers")
    load = parser.add_argument_group(
        "load", "requests that come by a Poisson process, at rates relative to what one at a time manages"
    )
    add = load.add_argument
    add(
        "--serve", nargs="?", const="", metavar="URL",
        help="measure a StepEngine of the checkpoint under load, beside simpler servers; or the server at an address",
    )  # fmt: skip
    add("--api-key", metavar="KEY", help="of the server")
    add("--load", type=float, nargs="+", default=[0.5, 0.95, 2.0, 4.0], metavar="X", help="rates (0.5 0.95 2 4)")
    add("--requests", type=int, default=100, metavar="N", help="of each rate (%(default)s)")
    add("--short", type=int, metavar="STEPS", help="of 7 requests in 10; the others have --timesteps")
    add("--rows", type=int, metavar="N", help="at once; by default as many as pay, which is measured")
    add("--plot", metavar="FILE.png", help="draw latency against load")
    add("--json", metavar="FILE", help="keep all figures")
    add_device_option(parser)


def run(args: argparse.Namespace) -> int:
    check_cond_scale(args.cond_scale)
    check_least(1, runs=args.runs, batch_size=args.batch_size, timesteps=args.timesteps, requests=args.requests)
    check_least(1, short=args.short, rows=args.rows)
    if not args.checkpoint and not args.serve:
        raise ValueError("--checkpoint PATH must be given, or the address of a server: --serve URL")
    if args.checkpoint and args.serve:
        raise ValueError(f"--serve {args.serve} has a checkpoint of its own: --checkpoint does not go with it")
    if args.serve is not None:
        from fastprior.cli import bench_load

        return bench_load.run(args)
    from fastprior.cli import bench_runs

    return bench_runs.run(args)

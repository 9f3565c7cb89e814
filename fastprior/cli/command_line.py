"""The command line: `fastprior info`, `quickstart`, `sample`, `convert`, `bench`, and the commands of training."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import warnings

from fastprior.cli.bench import add_bench_parser
from fastprior.cli.common import _say, _seed, named
from fastprior.cli.info import info
from fastprior.cli.sample import sample
from fastprior.cli.training import add_evaluate_parser, add_inspect_parser, add_train_parser
from fastprior.version import __version__

# Commands import what they need, so that --help needs none of it.


# info


# quickstart


def quickstart(args: argparse.Namespace) -> int:
    from fastprior.demos import quickstart as qs

    summary = qs.run(args.out, steps=args.steps, batch=args.batch, seed=args.seed, progress=args.progress)
    goal, files = summary["goal"], summary["files"]
    print(qs.report(summary))
    print(f"\nwrote {', '.join(files.values())}")
    print("sample from it with")
    print(f'  fastprior sample --checkpoint {shlex.quote(files["checkpoint"])} "a handwritten three"')
    if not summary["samplers"]["agree"]:
        _say("failed", f"the cached and the uncached sampler differ by more than {qs.TOLERANCE:g}")
        return 1
    accuracy = f"{summary['metrics'][goal['metric']]:.1%} of the sampled embeddings show the right digit"
    if not goal["judged"]:
        print(f"{accuracy}; the goal of {goal['at_least']:.0%} is not judged for a training this short")
    elif goal["reached"]:
        print(f"goal reached: {accuracy}, at least {goal['at_least']:.0%} were wanted")
    else:
        _say("failed", f"only {accuracy}, at least {goal['at_least']:.0%} were wanted")
        return 1
    return 0


# sample


# convert


def convert(args: argparse.Namespace) -> int:
    from fastprior import checkpoints

    options = dict(overwrite=args.overwrite, config=args.config, weights=args.weights, version=args.trained_with)
    options["clip_stats"] = args.clip_stats
    try:
        report = checkpoints.convert(args.source, args.target, **options)
    except FileExistsError:
        raise FileExistsError(f"{args.target} exists; --overwrite replaces it") from None
    print(report)
    print(f"wrote {args.target}")
    return 0


def _parser() -> argparse.ArgumentParser:
    from fastprior.demos.quickstart import BATCH, STEPS

    parser = argparse.ArgumentParser(
        prog="fastprior", description="Fast, exact diffusion priors: CLIP text embeddings to CLIP image embeddings."
    )
    parser.add_argument("--version", action="version", version=f"fastprior {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(run, summary: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(run.__name__, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        sub.set_defaults(run=run)
        return sub

    command(info, "print versions, devices, and which fast paths work here")

    sub = command(quickstart, "train a small prior on handwritten digits, and measure it")
    sub.add_argument("--out", default="quickstart-out", metavar="DIR", help="folder to write (%(default)s)")
    sub.add_argument(
        "--steps", type=int, default=STEPS, help="training steps; with fewer no goal is judged (%(default)s)"
    )
    sub.add_argument("--batch", type=int, default=BATCH, help="pairs in a step (%(default)s)")
    sub.add_argument("--seed", type=_seed, default=0, help="of everything random (%(default)s)")
    sub.add_argument("--no-progress", dest="progress", action="store_false", help="no progress bar")

    sub = command(sample, "sample image embeddings for captions or text embeddings")
    sub.add_argument("captions", nargs="*", metavar="CAPTION")
    sub.add_argument("--checkpoint", required=True, metavar="FILE", help="of a prior; old ones: see convert")
    sub.add_argument("--steps", type=int, default=64, help="sampling steps (%(default)s)")
    sub.add_argument("--cond-scale", type=float, default=1.0, help="guidance; 1 is none (%(default)s)")
    sub.add_argument("--solver", help="ddpm, ddim, ddim_trailing or dpm++; by default ddpm over all steps, else ddim")
    sub.add_argument(
        "--samples-per-prompt", type=int, default=4, metavar="N",
        help="candidates, of which the most similar to the text is kept (%(default)s)",
    )  # fmt: skip
    sub.add_argument("--seed", type=_seed, help="of the noise; another each time by default")
    sub.add_argument("--out", metavar="FILE.npy", help="write the embeddings (prompts, dim), fp32")
    sub.add_argument("--text-embed", metavar="FILE.npy", help="text embeddings (prompts, dim) instead of captions")
    sub.add_argument("--text-encodings", metavar="FILE.npy", help="text encodings (prompts, length, dim)")
    sub.add_argument(
        "--condition", type=named, action="append", default=[], metavar="NAME=VALUE",
        help="an extra condition: a number, or a vector's FILE.npy (prompts, size); any may be left out",
    )  # fmt: skip
    sub.add_argument("--clip-model", metavar="NAME", help="OpenCLIP model to encode captions with")
    sub.add_argument("--clip-pretrained", metavar="FILE", help="its weights: a file, or a tag of OpenCLIP")
    sub.add_argument("--device", choices=("cpu", "cuda"), help="by default cuda where there is one")

    sub = command(convert, "rewrite a checkpoint of any era as one safe file, or for dalle2-pytorch")
    sub.add_argument("source", metavar="SRC")
    sub.add_argument(
        "target", metavar="DST",
        help=".safetensors, .pt / .pth for dalle2-pytorch, or a folder for the prior of Kandinsky 2.1 or Karlo",
    )  # fmt: skip
    sub.add_argument("--overwrite", action="store_true", help="replace an existing DST")
    sub.add_argument("--config", metavar="JSON", help="file with what weights do not show")
    sub.add_argument("--weights", choices=("auto", "model", "ema"), default="auto", help="(%(default)s)")
    sub.add_argument("--clip-stats", metavar="FILE", help="of Kandinsky 2.1 and Karlo: ViT-L-14_stats.th")
    sub.add_argument("--trained-with", metavar="RELEASE", help="of dalle2-pytorch, for old files that do not record it")

    for add_parser in (add_inspect_parser, add_train_parser, add_evaluate_parser, add_bench_parser):
        add_parser(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command: 0, 1 where the quickstart misses its goal, 2 for a user's error, 130 when interrupted."""
    args = _parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: _say("warning", message)
            status = args.run(args)
            sys.stdout.flush()
            return status
    except KeyboardInterrupt as interrupt:
        _say("interrupted", interrupt)
        return 130
    except BrokenPipeError:
        # the reader of our output has left; the interpreter flushes stdout once more when it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, ImportError, OSError) as error:
        _say("error", error)
        return 2


if __name__ == "__main__":
    sys.exit(main())

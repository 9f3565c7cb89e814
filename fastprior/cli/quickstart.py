"""`fastprior quickstart`: a small prior is trained on handwritten digits and judged."""

from __future__ import annotations

import argparse
import shlex

from fastprior.cli.common import add_command, say, seed, this_program


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    summary = "train a small prior on handwritten digits, and measure it"
    add = add_command(subparsers, "quickstart", run, summary).add_argument
    add("--out", default="quickstart-out", metavar="DIR", help="folder to write (%(default)s)")
    add("--steps", type=int, default=500, help="training steps; with fewer no goal is judged (%(default)s)")
    add("--batch", type=int, default=128, help="pairs in a step (%(default)s)")
    add("--seed", type=seed, default=0, help="of everything random (%(default)s)")
    add("--no-progress", dest="progress", action="store_false", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    from fastprior.demos import quickstart

    summary = quickstart.run(args.out, steps=args.steps, batch=args.batch, seed=args.seed, progress=args.progress)
    goal, files = summary["goal"], summary["files"]
    print(quickstart.report(summary))
    print(f"\nwrote {', '.join(files.values())}")
    print("sample from it with")
    print(f'  {this_program()} sample --checkpoint {shlex.quote(files["checkpoint"])} "a handwritten three"')
    if not summary["samplers"]["agree"]:
        say("failed", f"the cached and the uncached sampler differ by more than {quickstart.TOLERANCE:g}")
        return 1
    accuracy = f"{summary['metrics'][goal['metric']]:.1%} of the sampled embeddings show the right digit"
    if not goal["judged"]:
        print(f"{accuracy}; the goal of {goal['at_least']:.0%} is not judged for a training this short")
    elif goal["reached"]:
        print(f"goal reached: {accuracy}, at least {goal['at_least']:.0%} were wanted")
    else:
        say("failed", f"only {accuracy}, at least {goal['at_least']:.0%} were wanted")
        return 1
    return 0

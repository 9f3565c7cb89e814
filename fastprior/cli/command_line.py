"""The command line: `fastprior info`, `fastprior sample` and the other commands, each a module of this package."""

from __future__ import annotations

import argparse
import sys
import warnings
from typing import NoReturn

from fastprior.cli import (
    bench,
    convert,
    embed,
    evaluate,
    info,
    init,
    inspect,
    quality,
    quickstart,
    sample,
    serve,
    train,
    tune,
)
from fastprior.cli.common import brief, say
from fastprior.program import open_standard_streams, settle_output
from fastprior.version import __version__

# What takes long to import (torch above all) commands import when they run: --help needs none of it.
COMMANDS = info, quickstart, sample, embed, convert, inspect, init, train, evaluate, quality, tune, bench, serve


class _Parser(argparse.ArgumentParser):
    """A parser whose errors do not repeat all of an argument, which may be a text of any length."""

    def error(self, message: str) -> NoReturn:
        super().error(brief(message))


def make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fastprior", description="Fast, exact diffusion priors: CLIP text embeddings to CLIP image embeddings."
    )
    parser.add_argument("--version", action="version", version=f"fastprior {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command: 0, 1 where the quickstart misses its goal, 2 for a user's error, 130 when interrupted."""
    open_standard_streams()
    args = make_parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: say("warning", message)
            status = args.run(args)
            sys.stdout.flush()
            return status
    except KeyboardInterrupt as interrupt:
        say("interrupted", interrupt)
        return 130
    except BrokenPipeError:  # the reader of our output has left
        return 141
    except (ValueError, ImportError, OSError) as error:
        say("error", error)
        return 2
    finally:
        settle_output()

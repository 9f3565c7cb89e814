"""`fastprior train`: a prior is trained from a JSON config, on one process."""

from __future__ import annotations

import argparse

from fastprior.cli.common import add_command


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = add_command(subparsers, "train", run, "train a prior from a JSON config, on one process")
    parser.add_argument("--config_file", "--config_path", "--config-file", required=True, metavar="FILE.json")


def run(args: argparse.Namespace) -> int:
    from fastprior import train_diffusion_prior

    return train_diffusion_prior.main(["--config_file", args.config_file])

"""`fastprior tune`: learn a step table for a checkpoint, and keep it there."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fastprior.cli import common, prompts

if TYPE_CHECKING:
    from fastprior.diffusion.learned_tables import LearnedTable


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    summary = "learn a step table of few evaluations for a checkpoint, and keep it there for --solver learned"
    parser = common.add_command(subparsers, "tune", run, summary)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="FILE", help="of a prior, as fastprior or its trainer wrote it")
    add("--evaluations", type=int, required=True, metavar="N", help="of the network, such as 6")
    add(
        "--scales", type=_scales, nargs="+", default=[(1.0, 1.0)], metavar="S",
        help="guidance that the table serves: numbers, or ranges such as 1:4 (1)",
    )  # fmt: skip
    prompts.add_options(parser)
    add("--seed", type=common.seed, default=0, help="of noise, and of which prompts are held out (%(default)s)")
    add("--out", metavar="FILE.safetensors", help="write the prior with its tables there, and leave the checkpoint")
    common.add_clip_options(parser)


def _scales(text: str) -> tuple[float, float]:
    least, colon, most = text.partition(":")
    try:
        return float(least), float(most if colon else least)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number and no range such as 1:4") from None


def run(args: argparse.Namespace) -> int:
    common.check_least(2, evaluations=args.evaluations)
    prompts.check(args)
    common.check_clip_and_out(args)
    if args.out and Path(args.out).suffix != ".safetensors":
        raise ValueError(f"--out {args.out}: it must end in .safetensors")
    import fastprior
    from fastprior.checkpoints.tables import add_table, check_keeps_tables
    from fastprior.prior.tuning import tune

    prior = common.load_prior(args)
    if not args.out:
        check_keeps_tables(args.checkpoint)
    given = dict.fromkeys(("text", "text_embed", "text_encodings")) | prompts.load(args, prior)
    table = tune(
        prior, prior.text_condition(**given), args.evaluations, scales=args.scales, seed=args.seed,
        progress=sys.stderr.isatty(),
    )  # fmt: skip
    print(figures(table))
    if args.out:
        whole = fastprior.load(args.checkpoint, config=args.config, dtype=None)
        whole.learned_tables = prior.learned_tables
        fastprior.save(whole, args.out, metadata=whole.load_report.metadata)
    else:
        add_table(args.checkpoint, table)
    print(f"wrote {args.out or args.checkpoint}")
    return 0


def figures(table: LearnedTable) -> str:
    """What held-out prompts showed, as a table of text."""
    lines = [f"cosine of {len(table)} evaluations to the solution of the ODE, held-out prompts", ""]
    lines.append(f"{'cond_scale':>10}  {'solver':<14}{'median':>9}{'5 %':>9}{'worst':>9}")
    for one in table.held_out:
        for name, cosines in (("dpm++:logsnr", one.untuned), ("learned", one.learned)):
            lines.append(f"{one.cond_scale:>10g}  {name:<14}" + "".join(f"{value:>9.5f}" for value in cosines))
    return "\n".join(lines)

"""The command line: `fastprior info`, `quickstart`, `sample`, `convert`, `bench`, and the commands of training."""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import os
import platform
import shlex
import shutil
import sys
import warnings
from pathlib import Path

from fastprior.bench import add_bench_parser
from fastprior.training_commands import add_evaluate_parser, add_inspect_parser, add_train_parser, named
from fastprior.version import __version__

# Commands import what they need, so that --help needs none of it.

PACKAGES = ("torch", "triton", "numpy", "safetensors")
OPTIONAL = ("open-clip-torch", "embedding-reader", "accelerate", "diffusers", "xformers", "dalle2-pytorch")


def _say(kind: str, message: object) -> None:
    """One line on stderr, whatever the message looks like."""
    print(f"fastprior: {kind}: {' '.join(str(message).split())}", file=sys.stderr)


# info


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _devices() -> list[tuple[str, str]]:
    import torch

    rows = [("cpu", f"{_cpu_name()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.cuda.get_device_properties(index)
        memory = device.total_memory / 2**30
        rows.append((f"cuda:{index}", f"{device.name}, capability {device.major}.{device.minor}, {memory:.0f} GiB"))
    return rows if len(rows) > 1 else [*rows, ("cuda", "none available")]


def _fast_paths() -> list[tuple[str, str]]:
    """Each fast path, and whether it works here: found out, where that takes no time, by trying."""
    import torch

    from fastprior import DiffusionPrior, DiffusionPriorNetwork
    from fastprior.kernels import ops
    from fastprior.kernels.cpu import blocks as cpu_blocks
    from fastprior.kernels.cpu import library as cpu_library
    from fastprior.kernels.cpu import threads as cpu_threads

    net = DiffusionPriorNetwork(dim=8, depth=1, dim_head=8, heads=1, max_text_len=2)
    plan = DiffusionPrior(net, image_embed_dim=8, timesteps=8, cond_drop_prob=0.1).eval().sampling_plan(8, 2.0)
    reasons = f" ({'; '.join(plan.reasons)})" if plan.reasons else ""
    rows = [
        ("prefix cache", f"{'on' if plan.path == 'cached' else 'off'}, for fastprior's own networks{reasons}"),
        ("null table", f"{'on' if plan.guidance == 'null table' else 'off'}, for guidance without self-conditioning"),
    ]

    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    where = shutil.which(compiler)
    found = f"available on the CPU, C++ compiler {where}" if where else f"not on the CPU, no C++ compiler {compiler}"
    rows.append(("torch.compile", f"{found}; PriorSampler compiles steps that are no calls of C"))

    forced = f"off, FASTPRIOR_KERNELS={ops.forced()}" if ops.forced() else None
    why = forced or (cpu_library.unavailable() and f"off, {cpu_library.unavailable()}")
    most = (f"{cpu_blocks.most_tokens(d)} in {str(d).removeprefix('torch.')}" for d in cpu_library.KINDS)
    if not why:
        paid = "" if cpu_threads.quota() is None else f" (a control group pays for {cpu_threads.quota():g} cores)"
        why = f"on, threads: {cpu_threads.thread_count()}{paid}, for as many tokens at once: {', '.join(most)}"
    rows.append(("CPU kernels", why))

    cuda = torch.cuda.is_available()
    if ops.forced() == "reference":
        triton = "off, FASTPRIOR_KERNELS=reference: plain PyTorch runs"
    elif not ops.HAS_TRITON:
        triton = "off, triton is not installed: plain PyTorch runs"
    elif cuda:
        triton = f"on, for CUDA tensors: {', '.join(ops.OPERATIONS)}"
    elif ops.forced() == "triton":
        triton = "on, FASTPRIOR_KERNELS=triton; without a CUDA device they need TRITON_INTERPRET=1"
    else:
        triton = "off, no CUDA device: plain PyTorch runs"
    rows.append(("Triton kernels", triton))
    rows.append(("CUDA graphs", "on, in PriorSampler" if cuda else "off, no CUDA device"))

    # what torch itself asks, by names that are not public: absent means unknown
    checks = {"AMX": "_is_amx_tile_supported", "AVX-512 BF16": "_is_avx512_bf16_supported"}
    probes = {name: getattr(torch.cpu, check, None) for name, check in checks.items()}
    have = [name for name, probe in probes.items() if probe is not None and probe()]
    unknown = all(probe is None for probe in probes.values())
    rows.append(("bf16 on the CPU", f"{' and '.join(have) or ('unknown' if unknown else 'no')} instructions"))
    return rows


def info(args: argparse.Namespace) -> int:
    versions = [("fastprior", __version__), ("python", platform.python_version())]
    versions += [(package, _version_of(package)) for package in (*PACKAGES, *OPTIONAL)]
    for title, rows in (("versions", versions), ("devices", _devices()), ("fast paths", _fast_paths())):
        print(title)
        for name, value in rows:
            print(f"  {name:<17} {value}")
    return 0


# quickstart


def quickstart(args: argparse.Namespace) -> int:
    from fastprior import quickstart as qs

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


def _load_array(path: str, option: str, ndim: int, device: str):
    """A .npy file as an fp32 tensor."""
    import numpy as np
    import torch

    try:
        array = np.load(path)  # refuses pickles
    except (EOFError, ValueError) as error:
        raise ValueError(f"{option} {path} is not a .npy file of numbers") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f" or array.ndim != ndim:
        found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "an .npz archive"
        raise ValueError(f"{option} {path} holds {found}; it must hold a {ndim}-dimensional array of floats")
    return torch.from_numpy(array.astype(np.float32)).to(device)


def _load_conditions(prior, given: list[tuple[str, str]], prompts: int, device: str) -> dict:
    """The values of extra conditions: a number for all prompts, or of a vector a file with a row for each."""
    import torch

    from fastprior.models.dalle2.conditions import find

    values = {}
    for name, value in given:
        kind = find(prior.net.conditions, name, "--condition").kind
        if kind == "vector":
            values[name] = _load_array(value, f"--condition {name}", 2, device)
            continue
        number, rule = (int, "an integer") if kind == "category" else (float, "a number")
        try:
            values[name] = torch.full((prompts,), number(value), device=device)
        except ValueError:
            raise ValueError(f"--condition {name}={value}: it must be {rule}") from None
    return values


def load_clip(name: str, pretrained: str, device: str):
    """An open_clip model. Raises ValueError where it cannot be loaded."""
    from fastprior import OpenClipAdapter

    try:
        return OpenClipAdapter(name, pretrained, device=device)
    except ImportError:
        raise
    except Exception as error:  # open_clip raises whatever its readers do
        raise ValueError(f"CLIP {name} with weights {pretrained} cannot be loaded ({error})") from error


def _check_sample(args: argparse.Namespace) -> None:
    if not math.isfinite(args.cond_scale):
        raise ValueError(f"--cond-scale {args.cond_scale}: it must be finite")
    if bool(args.captions) == bool(args.text_embed):
        raise ValueError("give either captions or --text-embed")
    if args.text_encodings and not args.text_embed:
        raise ValueError("--text-encodings goes with --text-embed")
    if bool(args.clip_model) != bool(args.clip_pretrained):
        raise ValueError("--clip-model and --clip-pretrained go together")
    if args.clip_model and args.text_embed:
        raise ValueError("--clip-model encodes captions; it does not go with --text-embed")
    if args.out and not Path(args.out).absolute().parent.is_dir():
        raise FileNotFoundError(f"--out {args.out}: its folder does not exist")
    if args.out and Path(args.out).is_dir():
        raise IsADirectoryError(f"--out {args.out} is a folder; it must be a file")


def sample(args: argparse.Namespace) -> int:
    import numpy as np
    import torch

    from fastprior import checkpoint, digits
    from fastprior.utils import atomic

    _check_sample(args)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    clip = load_clip(args.clip_model, args.clip_pretrained, device) if args.clip_model else None
    prior = checkpoint.load(args.checkpoint, clip=clip, device=device)
    of_digits = prior.load_report.metadata.get("text_encoder") == digits.NAME
    if not of_digits and not args.out:
        raise ValueError("give --out FILE.npy: only the quickstart's embeddings can be drawn")
    text = {}
    if args.captions:
        if of_digits and clip is None:
            prior.clip = digits.DigitsClip()
            strange = sorted({word for c in args.captions for word in digits.words_of(c)} - digits.KNOWN_WORDS)
            if strange:
                _say("note", f"words that the training never saw: {', '.join(strange)}")
        if prior.clip is None:
            raise ValueError(
                f"{args.checkpoint} does not say how to encode captions: give --clip-model and --clip-pretrained, or "
                "embeddings with --text-embed and --text-encodings"
            )
        text["text"] = args.captions
    else:
        text["text_embed"] = _load_array(args.text_embed, "--text-embed", 2, device)
        if args.text_encodings:
            text["text_encodings"] = _load_array(args.text_encodings, "--text-encodings", 3, device)
        elif prior.condition_on_text_encodings:
            raise ValueError(f"{args.checkpoint} is conditioned on text encodings: give --text-encodings too")
    prompts = len(args.captions or text["text_embed"])
    embeds = prior.sample(
        conditions=_load_conditions(prior, args.condition, prompts, device),
        num_samples_per_batch=args.samples_per_prompt,
        cond_scale=args.cond_scale,
        timesteps=args.steps,
        solver=args.solver,
        generator=None if args.seed is None else torch.Generator(device).manual_seed(args.seed),
        progress=sys.stderr.isatty(),
        **text,
    )
    if of_digits:
        for title, embed in zip(args.captions or [f"row {i}" for i in range(len(embeds))], embeds):
            print(f"{title}\n\n{digits.terminal_picture(embed[None])}\n")
    if args.out:
        with atomic(Path(args.out)) as path, open(path, "wb") as file:
            np.save(file, embeds.float().cpu().numpy())
        print(f"wrote {args.out}: {embeds.shape[0]} embeddings of {embeds.shape[1]}")
    return 0


# convert


def convert(args: argparse.Namespace) -> int:
    from fastprior import checkpoint

    options = dict(overwrite=args.overwrite, config=args.config, weights=args.weights, version=args.trained_with)
    options["clip_stats"] = args.clip_stats
    try:
        report = checkpoint.convert(args.source, args.target, **options)
    except FileExistsError:
        raise FileExistsError(f"{args.target} exists; --overwrite replaces it") from None
    print(report)
    print(f"wrote {args.target}")
    return 0


def _seed(text: str) -> int:
    seed = int(text)
    if not 0 <= seed < 2**63:
        raise argparse.ArgumentTypeError(f"{seed} is not between 0 and 2**63 - 1")
    return seed


def _parser() -> argparse.ArgumentParser:
    from fastprior.quickstart import BATCH, STEPS

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

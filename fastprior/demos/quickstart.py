"""Train a small prior on handwritten digits in under a minute, and measure it."""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from fastprior import DiffusionPrior, DiffusionPriorNetwork, __version__, checkpoints
from fastprior.demos import digits
from fastprior.demos.digits import Pairs
from fastprior.prior.evaluate import evaluate, similarities
from fastprior.utils import atomic

STEPS, BATCH = 500, 128
LEARNING_RATE, WARMUP, EMA_DECAY = 6e-3, 0.1, 0.98  # peak; share of the steps that it rises for
HELD_OUT = 0.2  # share of the images
GOAL = 0.95  # share of sampled embeddings that must show the digit that their caption names
SAMPLE_STEPS = 64
CURVE_POINTS, CURVE_CAPTIONS, CURVE_SAMPLE_STEPS = 10, 100, 16
TIMED_CAPTIONS, TIMED_ROUNDS = 64, 3
TOLERANCE = 1e-4  # between the cached and the uncached sampler: rounding of one fp32 run of 64 steps

METRICS = {
    "validation loss": "training loss on held-out pairs",
    "similarity with original image": "cos(sampled, held-out image of that caption)",
    "similarity of samples of one digit": "cos(sampled, another sampled of the same digit)",
    "similarity of real images of one digit": "cos(held-out image, another of the same digit)",
    "similarity with unrelated image": "cos(sampled, held-out image of the next caption)",
    "baseline similarity": "cos(text embedding, held-out image); never aligned here, so about 0",
    "similarity with text": "cos(text embedding, sampled)",
    "similarity with unrelated caption": "cos(text embedding of the next caption, sampled)",
    "right digit, sampled": "share that a classifier of real images reads as the caption's digit",
    "right digit, real": "the same for the held-out images",
}


class Uncached(nn.Module):
    """A network known by its calls only, so that the sampler runs the whole of it at every step."""

    def __init__(self, net: DiffusionPriorNetwork):
        super().__init__()
        self.net, self.dim, self.self_cond = net, net.dim, net.self_cond

    def forward(self, *args, **kwargs) -> Tensor:
        return self.net(*args, **kwargs)

    def forward_with_cond_scale(self, *args, **kwargs) -> Tensor:
        return self.net.forward_with_cond_scale(*args, **kwargs)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Run with seeded random numbers on one thread, and put both back.

    One thread, because a model this small gains nothing from more, and its results then do not depend on their number.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


def make_prior() -> DiffusionPrior:
    """An untrained prior, 64 wide and 4 layers deep."""
    net = DiffusionPriorNetwork(
        dim=digits.DIM, depth=4, dim_head=16, heads=4, max_text_len=digits.MAX_WORDS, normformer=True
    )
    return DiffusionPrior(net, image_embed_dim=digits.DIM, image_channels=1, timesteps=1000, cond_drop_prob=0.1)


def sample(prior: DiffusionPrior, text_cond: dict, seed: int, steps: int = SAMPLE_STEPS, cond_scale: float = 1.0):
    """One embedding (rows, 64) for each row of the text condition."""
    shape, generator = (len(text_cond["text_embed"]), prior.image_embed_dim), torch.Generator().manual_seed(seed)
    options = dict(cond_scale=cond_scale, timesteps=steps, generator=generator, progress=False)
    return prior.p_sample_loop(shape, text_cond, **options)


def train(train_set: Pairs, held_out: Pairs, steps: int, batch: int, seed: int, progress: bool):
    """Train a prior: the moving average of its weights, in eval mode, and its curves.

    The curves are "loss", of every step, and "similarity", (step, similarity with the original image) every so often.
    """
    from fastprior.trainer import DiffusionPriorTrainer

    trainer = DiffusionPriorTrainer(
        make_prior(), lr=LEARNING_RATE, warmup_steps=round(WARMUP * steps), cosine_decay_max_steps=steps,
        ema_beta=EMA_DECAY, ema_update_after_step=0, ema_update_every=1, device="cpu",
    )  # fmt: skip
    probe, losses, similarity = held_out[:CURVE_CAPTIONS], [], []
    with tqdm(total=steps, desc="training", unit="step", disable=not progress) as bar:
        for step in range(1, steps + 1):
            pairs = train_set[torch.randint(len(train_set), (batch,))]
            losses.append(trainer(**pairs.text_cond, image_embed=pairs.image_embed))
            trainer.update()
            if step % max(1, steps // CURVE_POINTS) == 0 or step == steps:
                sampled = sample(trainer.sampling_prior, probe.text_cond, seed, CURVE_SAMPLE_STEPS)
                similarity.append((step, F.cosine_similarity(sampled, probe.image_embed).mean().item()))
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            bar.update()
    return trainer.sampling_prior, dict(loss=losses, similarity=similarity)


@torch.no_grad()
def measure(prior: DiffusionPrior, train_set: Pairs, held_out: Pairs, seed: int) -> dict[str, float]:
    """The metrics named in METRICS; the next caption is that of the next held-out row."""
    from sklearn.svm import SVC

    classifier = SVC().fit(train_set.image_embed.numpy(), train_set.digits.numpy())

    def right(embeds: Tensor) -> float:
        return float((classifier.predict(embeds.numpy()) == held_out.digits.numpy()).mean())

    sampled = F.normalize(sample(prior, held_out.text_cond, seed), dim=-1)
    real, batch = held_out.image_embed, dict(held_out.text_cond, image_embed=held_out.image_embed)
    losses = evaluate(prior, [batch] * 8, timesteps=(), seed=seed)  # each batch draws times and noise of its own
    same_digit = (held_out.digits[:, None] == held_out.digits).fill_diagonal_(False)
    metrics = {name: value.mean().item() for name, value in similarities(held_out.text_embed, real, sampled).items()}
    metrics |= {
        "validation loss": losses["l2-loss"],
        "similarity of samples of one digit": (sampled @ sampled.T)[same_digit].mean().item(),
        "similarity of real images of one digit": (real @ real.T)[same_digit].mean().item(),
        "similarity with unrelated image": F.cosine_similarity(sampled, real.roll(-1, 0)).mean().item(),
        "right digit, sampled": right(sampled),
        "right digit, real": right(real),
    }
    return {name: metrics[name] for name in METRICS}


def compare_samplers(prior: DiffusionPrior, held_out: Pairs, seed: int) -> list[dict]:
    """Time the cached sampler against running the whole network every step, with the same weights and seeds.

    Both run without guidance and with it, in turns, and the fastest run of each counts.
    """
    uncached = DiffusionPrior(Uncached(prior.net), **prior.config).eval()
    text_cond = held_out[:TIMED_CAPTIONS].text_cond
    rows = []
    for cond_scale in (1.0, 2.0):
        seconds, embeds = {"cached": [], "plain": []}, {}
        for _ in range(TIMED_ROUNDS):
            for sampler in (prior, uncached):
                path = sampler.sampling_plan(SAMPLE_STEPS, cond_scale).path
                start = time.perf_counter()
                embeds[path] = sample(sampler, text_cond, seed, cond_scale=cond_scale)
                seconds[path].append(time.perf_counter() - start)
        cached_s, uncached_s = min(seconds["cached"]), min(seconds["plain"])
        rows.append(
            dict(
                cond_scale=cond_scale,
                cached_s=cached_s,
                uncached_s=uncached_s,
                speedup=uncached_s / cached_s,
                largest_difference=(embeds["cached"] - embeds["plain"]).abs().max().item(),
            )
        )
    return rows


def draw_figure(path: str, prior: DiffusionPrior, held_out: Pairs, curves: dict, metrics: dict, seed: int) -> None:
    """Write a PNG: real and sampled digits, a row for each digit, beside the curves of the training."""
    from matplotlib.figure import Figure

    columns = 6
    clip = digits.DigitsClip()
    captions = [digits.PHRASINGS[0].format(number) for number in digits.NUMBERS for _ in range(columns)]
    sampled = sample(prior, clip.embed_text(clip.tokenize(captions))._asdict(), seed)
    real = torch.cat([held_out.image_embed[held_out.digits == digit][:columns] for digit in range(10)])

    def mosaic(embeds: Tensor) -> np.ndarray:
        tiles = F.normalize(embeds, dim=-1).clamp(min=0).view(10, columns, digits.SIDE, digits.SIDE)
        tiles = F.pad(tiles / tiles.amax(dim=(2, 3), keepdim=True), (1, 1, 1, 1))
        return tiles.permute(0, 2, 1, 3).reshape(10 * (digits.SIDE + 2), -1).numpy()

    figure = Figure(figsize=(12, 6.2), layout="constrained")
    grid = figure.add_gridspec(2, 3, width_ratios=(1, 1, 1.3))
    for column, (title, embeds) in enumerate((("real, held out", real), ("sampled from the caption", sampled))):
        axes = figure.add_subplot(grid[:, column])
        axes.imshow(mosaic(embeds), cmap="gray_r", interpolation="nearest")
        axes.set_title(title)
        axes.set_xticks([])
        centres = (np.arange(10) + 0.5) * (digits.SIDE + 2) - 0.5
        axes.set_yticks(centres, digits.NUMBERS if column == 0 else [""] * 10)
        axes.tick_params(length=0)
        axes.spines[:].set_color("0.8")

    steps = np.arange(1, len(curves["loss"]) + 1)
    axes = figure.add_subplot(grid[0, 2])
    window = max(1, len(steps) // 25)
    smooth = np.convolve(curves["loss"], np.ones(window) / window, mode="valid")
    axes.plot(steps, curves["loss"], color="0.8", linewidth=0.8, label="each step")
    axes.plot(steps[window - 1 :], smooth, color="tab:blue", label=f"mean of {window}")
    axes.set(title="training loss", xlabel="step", ylim=(0, None))
    axes.legend(frameon=False)

    axes = figure.add_subplot(grid[1, 2])
    axes.plot(*zip(*curves["similarity"]), "o-", color="tab:orange", label="sampled")
    bound = metrics["similarity of real images of one digit"]
    axes.axhline(bound, color="0.5", linestyle="--", label="between real images of one digit")
    axes.set(title="similarity with original image", xlabel="step", ylim=(None, 1))
    axes.legend(frameon=False, loc="upper right")
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _check(steps: int, batch: int, seed: int) -> None:
    for name, value in (("steps", steps), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name}={value}; it must be at least 1")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed}; it must be between 0 and 2**63 - 1")
    try:
        for package in ("accelerate", "matplotlib", "pandas", "pyarrow", "sklearn"):
            importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f'the quickstart needs {error.name}: pip install "fastprior[quickstart]"') from error


def run(
    out: str | Path = "quickstart-out", *, steps: int = STEPS, batch: int = BATCH, seed: int = 0, progress: bool = True
) -> dict:
    """Train, measure, and leave prior.safetensors, digits.png, metrics.json and the data in a folder.

    Args:
        out: the folder; made where it does not exist.
        steps, batch: length of the training, and pairs in a step.
        seed: of everything random.
        progress: show a bar.
    Returns:
        what metrics.json holds: arguments, metrics, samplers, and the goal.
    Raises:
        ValueError: for arguments that do not fit.
        ImportError: without the packages of the extra `quickstart`.
        KeyboardInterrupt: when interrupted, with a message; files are whole or not there.
    """
    _check(steps, batch, seed)
    out, arguments = Path(out), dict(steps=steps, batch=batch, seed=seed)
    names = dict(checkpoint="prior.safetensors", figure="digits.png", metrics="metrics.json", data="data")
    files = {kind: str(out / name) for kind, name in names.items()}
    digits.write_digits(out / "data", seed)
    pairs = digits.load_pairs(out / "data")
    held = round(len(pairs) * HELD_OUT)
    train_set, held_out = pairs[:-held], pairs[-held:]
    with _seeded(seed):
        start = time.perf_counter()
        try:
            prior, curves = train(train_set, held_out, steps, batch, seed, progress)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("training was interrupted; no checkpoint was written") from None
        training_s = time.perf_counter() - start
        if progress:
            print("measuring on held-out captions and images", file=sys.stderr)
        metrics = measure(prior, train_set, held_out, seed)
        samplers = compare_samplers(prior, held_out, seed)
        metadata = dict(text_encoder=digits.NAME, **arguments, metrics=metrics)
        checkpoints.save(prior, files["checkpoint"], metadata=metadata)
        draw_figure(files["figure"], prior, held_out, curves, metrics, seed)
    summary = dict(
        fastprior=__version__,
        torch=torch.__version__,
        arguments=arguments,
        images=dict(training=len(train_set), held_out=len(held_out)),
        metrics=metrics,
        curves=curves,
        training_s=training_s,
        samplers=dict(
            captions=len(held_out[:TIMED_CAPTIONS]),
            steps=SAMPLE_STEPS,
            rows=samplers,
            agree=all(row["largest_difference"] <= TOLERANCE for row in samplers),
        ),
        goal=dict(
            metric="right digit, sampled",
            at_least=GOAL,
            judged=steps * batch >= STEPS * BATCH,
            reached=metrics["right digit, sampled"] >= GOAL,
        ),
        files=files,
    )
    with atomic(files["metrics"]) as temporary:
        temporary.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def report(summary: dict) -> str:
    """A summary of `run` as tables to print."""
    images, samplers = summary["images"], summary["samplers"]
    rows = [(name, f"{value:.3f}", METRICS[name]) for name, value in summary["metrics"].items()]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    lines = [
        f"trained on {images['training']} images in {summary['training_s']:.1f} s",
        "",
        f"prior metrics, {images['held_out']} held-out captions and images, {samplers['steps']} DDIM steps",
        *(f"  {name:<{widths[0]}}  {value:>{widths[1]}}  {meaning}" for name, value, meaning in rows),
        "",
        f"sampling {samplers['captions']} captions, {samplers['steps']} steps, same weights and seed, CPU, one thread",
    ]
    for row in samplers["rows"]:
        guidance = f"cond_scale {row['cond_scale']:g}"
        lines.append(
            f"  {guidance}  cached {row['cached_s'] * 1e3:6.0f} ms  uncached {row['uncached_s'] * 1e3:6.0f} ms  "
            f"{row['speedup']:.1f}x faster, largest difference {row['largest_difference']:.0e}"
        )
    return "\n".join(lines)

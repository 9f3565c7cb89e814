"""How good a prior is: dalle2-pytorch's metrics and the rank in retrieval, over held-out pairs."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastprior.batches import map_rows
from fastprior.prior.diffusion_prior import DiffusionPrior
from fastprior.prior.plan import is_overridden

RETRIEVAL_PAIRS = 10_000  # at most, over all processes: the images that a sampled embedding is ranked against
RECALL_AT = (1, 5)
METRICS = {
    "loss": "training loss",
    "baseline similarity": "cos(text, original image)",
    "similarity with original image": "cos(sampled, original image)",
    "difference from baseline similarity": "similarity with text less baseline similarity",
    "similarity with text": "cos(sampled, text)",
    "similarity with unrelated caption": "cos(sampled, text of another pair)",
    "median rank": "of the original image among all, by similarity with the sampled embedding",
    **{f"recall@{k}": f"share of sampled embeddings for which that rank is at most {k}" for k in RECALL_AT},
}
SIMILARITIES = tuple(name for name in METRICS if "similarity" in name and not name.startswith("difference"))


@contextmanager
def _own_randomness(device: torch.device) -> Iterator[None]:
    """Leave the global random generators as they were."""
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(state)


def _seed(*key: int) -> None:
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
    torch.manual_seed(seed)
    random.seed(seed)


class _Means:
    """Means by name, of values that come in batches of any size on any process."""

    def __init__(self, names: Iterable[str]):
        self.sums = {name: [0.0, 0] for name in names}  # the same names on all processes, which add them up as one

    def add(self, name: str, values: Tensor) -> None:
        self.sums[name][0] += values.double().sum().item()
        self.sums[name][1] += values.numel()

    def reduced(self, accelerator) -> dict[str, float]:
        sums = torch.tensor(list(self.sums.values()), dtype=torch.float64)
        if accelerator is not None:
            sums = accelerator.reduce(sums.to(accelerator.device), reduction="sum").cpu()
        return {name: total / count for name, (total, count) in zip(self.sums, sums.tolist()) if count}


def retrieval_ranks(sampled: Tensor, images: Tensor, chunk: int = 1024) -> Tensor:
    """The rank (n,), from 1, of each row's own image among all images by cosine similarity with the sampled embedding.

    Args:
        sampled, images: (n, dim), of any length. Images that are equally similar share the mean of their ranks.
    """
    images = F.normalize(images, dim=-1)
    ranks = []
    for start in range(0, len(sampled), chunk):
        similarity = F.normalize(sampled[start : start + chunk], dim=-1) @ images.T
        original = similarity.diagonal(start)[:, None]
        ranks.append((similarity > original).sum(dim=1) + ((similarity == original).sum(dim=1) + 1) / 2)
    return torch.cat(ranks).double()


class _Gallery:
    """The first pairs of each process, for retrieval."""

    def __init__(self, dim: int, device: torch.device, accelerator):
        self.accelerator = accelerator
        self.room = RETRIEVAL_PAIRS // (1 if accelerator is None else accelerator.num_processes)
        self.rows = defaultdict(lambda: [torch.empty(0, dim, device=device)])

    def add(self, key: str | int, embeds: Tensor) -> None:
        self.rows[key].append(embeds[: max(0, self.room - sum(map(len, self.rows[key])))])

    def gathered(self, key: str | int) -> Tensor:
        """The rows (n, dim) of all processes, which have different numbers of them."""
        rows, accelerator = torch.cat(self.rows[key]), self.accelerator
        if accelerator is None:
            return rows
        real = torch.ones(len(rows), device=rows.device)
        rows, real = (accelerator.gather(accelerator.pad_across_processes(t, dim=0)) for t in (rows, real))
        return rows[real.bool()]


def _inputs(prior: DiffusionPrior, batch: dict) -> tuple[Tensor, dict]:
    """The image embeddings (batch, dim) and the text condition of a batch, on the prior's device."""
    batch = map_rows(batch, lambda t: t.to(prior.device))
    image = batch.get("image_embed")
    if image is None or image.shape[1:] != (prior.image_embed_dim,):
        found = f"the keys {sorted(batch)}" if image is None else f"an image_embed of shape {tuple(image.shape)}"
        raise ValueError(f"a batch has {found}; it must have an image_embed (batch, {prior.image_embed_dim})")
    keys = "text", "text_embed", "text_encodings", "conditions"
    text_cond = prior.text_condition(**{key: batch.get(key) for key in keys})
    if len(text_cond["text_embed"]) != len(image):
        raise ValueError(
            f"a batch has {len(image)} images and {len(text_cond['text_embed'])} texts; they must be pairs"
        )
    return image.float(), text_cond


def similarities(text: Tensor | None, image: Tensor, sampled: Tensor) -> dict[str, Tensor]:
    """Cosine similarities (batch,) by name, in fp64; of a text that cannot be compared, None, those without it."""
    image, sampled = image.double(), sampled.double()
    found = {"similarity with original image": F.cosine_similarity(sampled, image)}
    if text is not None:
        text = text.double()
        # a caption's neighbour has been sampled too: no second run is needed
        unrelated = F.cosine_similarity(text, sampled.roll(1, 0))
        found["baseline similarity"] = F.cosine_similarity(text, image)
        found["similarity with text"] = F.cosine_similarity(sampled, text)
        found["similarity with unrelated caption"] = unrelated[: 0 if len(text) == 1 else None]
    return found


def _named(name: str, steps: int) -> str:
    return f"{name} [steps={steps}]"


@torch.no_grad()
def evaluate(
    prior: DiffusionPrior,
    batches: Iterable[dict],
    *,
    cond_scale: float = 1.0,
    timesteps: Sequence[int] = (64,),
    accelerator=None,
    seed: int = 0,
) -> dict[str, float]:
    """Measure a prior on pairs of text and image, in eval mode.

    Every pair weighs the same, whatever its batch and process. The same seed gives the same result on as many
    processes, and the same loss whatever the timesteps; the global random generators are not touched. All processes
    must call, and all get the result.

    Args:
        prior: the online prior, or the `ema_model` of its average.
        batches: this process's share: dicts of `image_embed` (batch, dim) with `text_embed` (batch, dim) and, where the
            prior is conditioned on them, `text_encodings` (batch, length, dim); or with `text`, strings or tokens
            (batch, length), for a prior that has a CLIP. `conditions` is a dict of the values of extra conditions.
        cond_scale: guidance of the sampling.
        timesteps: the numbers of sampling steps to measure with; none measures the loss alone.
        accelerator: from accelerate; None is one process.
    Returns:
        "<loss type>-loss" and, with " [steps=N]" behind them, the other METRICS. The unrelated caption is another of
        the batch: a batch of one pair does not count for it. Ranks are among the first RETRIEVAL_PAIRS pairs.
    Raises:
        ValueError: there are no pairs, or arguments that do not fit the prior.
    """
    if accelerator is not None:
        prior = accelerator.unwrap_model(prior)
    for steps in timesteps:
        prior.sampling_plan(steps, cond_scale)  # raises before anything is read
    options = dict(cond_scale=cond_scale)
    if not is_overridden(prior, "p_sample_loop"):
        options["progress"] = False
    loss_name = f"{prior.noise_scheduler.loss_type}-loss"
    means = _Means([loss_name, *(_named(name, steps) for steps in timesteps for name in SIMILARITIES)])
    gallery = _Gallery(prior.image_embed_dim, prior.device, accelerator)
    rank = 0 if accelerator is None else accelerator.process_index
    was_training = prior.training
    prior.eval()
    try:
        with _own_randomness(prior.device):
            for index, batch in enumerate(batches):
                image, text_cond = _inputs(prior, batch)
                text = text_cond["text_embed"] if prior.can_compare_text else None
                gallery.add("image", image)
                _seed(seed, rank, index, 0)
                means.add(loss_name, prior(image_embed=image, **text_cond).expand(len(image)))
                for steps in timesteps:
                    _seed(seed, rank, index, steps)
                    sampled = prior.p_sample_loop(image.shape, text_cond=text_cond, timesteps=steps, **options)
                    gallery.add(steps, sampled)
                    for name, values in similarities(text, image, sampled).items():
                        means.add(_named(name, steps), values)
    finally:
        prior.train(was_training)
    metrics = means.reduced(accelerator)
    if loss_name not in metrics:
        raise ValueError("batches holds no pairs; there must be at least one")
    images = gallery.gathered("image") if timesteps else None
    for steps in timesteps:
        if prior.can_compare_text:
            similarity, baseline = (
                metrics[_named(name, steps)] for name in ("similarity with text", "baseline similarity")
            )
            metrics[_named("difference from baseline similarity", steps)] = similarity - baseline
        metrics |= {_named(name, steps): value for name, value in _ranking(gallery.gathered(steps), images).items()}
    return metrics


def _ranking(sampled: Tensor, images: Tensor) -> dict[str, float]:
    ranks = retrieval_ranks(sampled, images)
    recall = {f"recall@{k}": (ranks <= k).double().mean().item() for k in RECALL_AT}
    return {"median rank": ranks.quantile(0.5).item(), **recall}

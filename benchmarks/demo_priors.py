"""The demo priors, trained in minutes, whose samples are held against a long run's; and prompts for each."""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from torch import nn

import fastprior
from fastprior.demos import digits, quickstart
from fastprior.demos.synthetic import SyntheticPairs
from fastprior.models.prior_transformer.as_network import PriorTransformerNet
from fastprior.trainer import DiffusionPriorTrainer

STEPS, BATCH, LEARNING_RATE, WARMUP = 3000, 64, 5e-3, 50
LENGTH = 8  # tokens of a synthetic caption
PROMPTS = 64
TINY_TIMESTEPS = 30
CAPTIONS = [(number, phrase) for number in digits.NUMBERS for phrase in digits.PHRASINGS]


def synthetic_pairs() -> SyntheticPairs:
    return SyntheticPairs(length=LENGTH)


def synthetic_network() -> nn.Module:
    torch.manual_seed(0)
    return fastprior.DiffusionPriorNetwork(dim=32, depth=3, dim_head=32, heads=2, max_text_len=LENGTH)


def transformer_network() -> nn.Module:
    """A `PriorTransformer` with statistics of the images, and a text of one token that stands for none."""
    torch.manual_seed(0)
    transformer = fastprior.PriorTransformer(
        num_attention_heads=2, attention_head_dim=32, num_layers=3, embedding_dim=32, num_embeddings=LENGTH
    )
    net, draw = PriorTransformerNet(transformer), torch.Generator().manual_seed(1)
    net.set_statistics(synthetic_pairs().batch(4096, draw)["image_embed"])
    net.set_null_text(torch.zeros(1, 32), torch.ones(1, 1, 32))
    return net


NETWORKS = {"synthetic": synthetic_network, "transformer": transformer_network}
NAMES = "digits", *NETWORKS


def train_synthetic(network: nn.Module, steps: int = STEPS, timesteps: int = 1000) -> fastprior.DiffusionPrior:
    """Train on synthetic pairs, all of them fresh, on a learning rate that ends at 0: the average of the weights.

    The cosine schedule of 1000 times, with x0 predicted, is that of DALLE2-pytorch's priors and of Kandinsky's.
    """
    prior = fastprior.DiffusionPrior(network, image_embed_dim=32, timesteps=timesteps, cond_drop_prob=0.1)
    trainer = DiffusionPriorTrainer(
        prior, lr=LEARNING_RATE, warmup_steps=WARMUP, cosine_decay_max_steps=steps, max_grad_norm=1.0, draws=8,
        ema_beta=0.99, ema_update_after_step=0, ema_update_every=1, device="cpu",
    )  # fmt: skip
    pairs, data = synthetic_pairs(), torch.Generator().manual_seed(0)
    for _ in range(steps):
        trainer(**pairs.batch(BATCH, data))
        trainer.update()
    AcceleratorState._reset_state(reset_partial_state=True)
    return trainer.sampling_prior


def train_digits(out: Path) -> fastprior.DiffusionPrior:
    return fastprior.load(quickstart.run(out, progress=False)["files"]["checkpoint"])


def prompts(name: str, count: int = PROMPTS) -> dict:
    """Every caption of the digits, or captions that the synthetic priors were not trained on."""
    if name == "digits":
        clip = digits.DigitsClip()
        found = clip.embed_text(clip.tokenize([phrase.format(number) for number, phrase in CAPTIONS]))._asdict()
    else:
        found = synthetic_pairs().batch(count, torch.Generator().manual_seed(1000))
    return {key: found[key] for key in ("text_embed", "text_encodings")}


def images(name: str, folder: Path, count: int = 64) -> torch.Tensor:
    """True images of each prompt, (prompts, count or as many as there are, dim), of length 1, not trained on."""
    if name != "digits":
        text = prompts(name)["text_embed"].repeat_interleave(count, dim=0)
        return synthetic_pairs().images(text, torch.Generator().manual_seed(2000)).view(PROMPTS, count, -1)
    pairs = digits.load_pairs(folder / "quickstart" / "data")
    pairs = pairs[-round(len(pairs) * quickstart.HELD_OUT) :]
    of = [F.normalize(pairs.image_embed[pairs.digits == digit], dim=-1) for digit in range(len(digits.NUMBERS))]
    least = min(map(len, of))
    return torch.stack([of[digits.NUMBERS.index(number)][:least] for number, _ in CAPTIONS])


class Demo(NamedTuple):
    """A prior that was trained, and prompts such as its users have."""

    name: str
    prior: fastprior.DiffusionPrior
    text: dict


def make(name: str, folder: Path) -> fastprior.DiffusionPrior:
    """A trained prior."""
    if name == "digits":
        return train_digits(folder / "quickstart")
    return train_synthetic(NETWORKS[name]())


def tiny(name: str) -> fastprior.DiffusionPrior:
    """A prior with a short schedule that was trained on next to nothing, to try out what measures one."""
    if name == "digits":
        prior = quickstart.make_prior()
        return fastprior.DiffusionPrior(prior.net, **prior.config | dict(timesteps=TINY_TIMESTEPS)).eval()
    return train_synthetic(NETWORKS[name](), steps=2, timesteps=TINY_TIMESTEPS)


def demo(name: str, folder: Path) -> Demo:
    """The prior of that name, trained where the folder does not hold it yet."""
    file = folder / f"{name}.safetensors"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        fastprior.save(make(name, folder), file)
    return Demo(name, fastprior.load(file), prompts(name))

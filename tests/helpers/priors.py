"""Tiny priors, texts for them, and the comparison every parity test uses."""

import copy

import torch
from torch import nn

import fastprior
from fastprior.clip import BaseClipAdapter, EmbeddedImage, EmbeddedText
from fastprior.models.dalle2.layers import l2norm

NETWORK = dict(dim=32, depth=2, dim_head=16, heads=4, max_text_len=7)


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference over the largest magnitude of `theirs`; infinite where anything is not finite or zero."""
    if ours.shape != theirs.shape:
        return float("inf")
    error = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()
    return error.item() if error.isfinite() else float("inf")


def make_prior(net: dict | None = None, *, seed: int = 0, module=fastprior, **prior) -> torch.nn.Module:
    """A tiny prior of `module` (fastprior, or the peer), in eval mode, with weights that depend on the seed alone."""
    net = NETWORK | (net or {})
    prior = dict(image_embed_dim=net["dim"], timesteps=20, cond_drop_prob=0.2) | prior
    torch.manual_seed(seed)
    return module.DiffusionPrior(module.DiffusionPriorNetwork(**net), **prior).eval()


def make_text(prompts: int, dim: int, length: int = 5, seed: int = 0) -> dict:
    """Normalised text embeddings, and encodings with full, padded and empty captions among them."""
    draw = torch.Generator().manual_seed(seed)
    encodings = torch.randn(prompts, length, dim, generator=draw)
    for row in range(prompts):
        encodings[row, (length, length // 2, 0)[row % 3] :] = 0
    return dict(text_embed=l2norm(torch.randn(prompts, dim, generator=draw)), text_encodings=encodings)


def sample(prior, text_cond: dict, *, rows: int | None = None, seed: int = 1, **kwargs) -> torch.Tensor:
    torch.manual_seed(seed)
    if isinstance(prior, fastprior.DiffusionPrior):
        kwargs.setdefault("progress", False)
    rows = rows or len(text_cond["text_embed"])
    return prior.p_sample_loop((rows, prior.image_embed_dim), text_cond=text_cond, **kwargs)


class Foreign(nn.Module):
    """A user's own network: it has only what the peer asks of one, so it takes the plain path."""

    def __init__(self, net):
        super().__init__()
        self.inner, self.dim, self.self_cond = net, net.dim, net.self_cond
        self.calls = 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return self.inner(*args, **kwargs)

    def forward_with_cond_scale(self, *args, **kwargs):
        self.calls += 1
        return self.inner.forward_with_cond_scale(*args, **kwargs)


def plain(prior):
    """The same prior on the plain path."""
    other = copy.deepcopy(prior)
    other.net = Foreign(other.net)
    return other


class WordClip(BaseClipAdapter):
    """A stand-in CLIP: tokens are letters, embeddings are fixed random vectors."""

    dim_latent, image_size, image_channels, max_text_len = 32, 4, 3, 7

    def __init__(self):
        super().__init__(nn.Embedding(128, 32))
        self.calls = 0

    def tokenize(self, texts):
        return torch.tensor([[ord(c) for c in text[:7].ljust(7, chr(0))] for text in texts])

    def embed_text(self, text):
        self.calls += 1
        encodings = self.clip(text).masked_fill((text == 0)[..., None], 0)
        return EmbeddedText(l2norm(encodings.sum(dim=1)), encodings)

    def embed_image(self, image):
        return EmbeddedImage(l2norm(image.flatten(1)[:, :32]), None)

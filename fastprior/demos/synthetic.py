"""Pairs of captions and images whose conditional distribution is known, to hold what a prior learned against."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastprior.models.dalle2.layers import l2norm


def mean_length(latent: int, concentration: float) -> float:
    """|E[x / |x|]| for x ~ N(r μ, I) in R^m, with μ of length 1, m = latent and r = concentration; 0 < r.

    x / |x| is the gradient of |x| by the mean of x, so this is the derivative by r of E|x|, the mean of the noncentral
    chi distribution, √2 Γ((m+1)/2) / Γ(m/2) · 1F1(-1/2; m/2; -r²/2):

        A = r/√2 · Γ((m+1)/2) / Γ(m/2+1) · 1F1(1/2; m/2+1; -r²/2)
    """
    try:
        from scipy.special import hyp1f1
    except ImportError as error:
        raise ImportError('scipy is not installed: pip install "fastprior[quickstart]"') from error
    ratio = math.exp(math.lgamma((latent + 1) / 2) - math.lgamma(latent / 2 + 1))
    return concentration / math.sqrt(2) * ratio * float(hyp1f1(0.5, latent / 2 + 1, -(concentration**2) / 2))


class SyntheticPairs:
    """Captions of random tokens, and images scattered around the concept that a caption's tokens have in common.

    A caption is `length` tokens z ~ N(0, I) in R^dim. Its concept c = l2norm(T' Σ z) is uniform on the unit sphere in
    R^latent, and its text embedding is T c. The image embedding is V l2norm(r c + ε), ε ~ N(0, I): a projected normal
    distribution (Mardia & Jupp, Directional Statistics, 2000) around V c. T and V (dim, latent) have orthonormal
    columns, so all embeddings have length 1.

    Let y be an image of a text, m = E[y | text] = A V c with A of `mean_length`, and x, x' two independent samples of a
    prior for that text, of length 1, with mean M. Then

        similarity       = E[x·y]  = M·m    A² for a perfect prior, but A for one that always returns V c
        self-similarity  = E[x·x'] = |M|²   A² for a perfect prior, but 1 for that one
        score            = 2 M·m - |M|² = A² - |M - m|²

    The score, a kernel score (Gneiting & Raftery 2007, section 5), is at most `best_similarity` = A², and reaches it
    only where M = m: with the right direction and, because lengths are 1, the right scatter.

    Args:
        dim: of tokens and embeddings.
        latent: of the concepts; at least 2 and at most dim. Well below dim it leaves the network, whose last norm fixes
            the length of its output, room to predict something shorter.
        length: tokens of a caption.
        concentration: r above, greater than 0.
        seed: of T and V.

    Attributes:
        best_similarity: A², the Bayes-optimal similarity of a sample with another image of its text.
    """

    def __init__(self, dim: int = 32, latent: int = 8, length: int = 8, *, concentration: float = 2.75, seed: int = 0):
        if not 2 <= latent <= dim:
            raise ValueError(f"latent={latent}; it must be at least 2 and at most dim, {dim}")
        if length < 1:
            raise ValueError(f"length={length}; it must be at least 1")
        if not concentration > 0:
            raise ValueError(f"concentration={concentration}; it must be greater than 0")
        self.dim, self.latent, self.length, self.concentration = dim, latent, length, concentration
        self.mean_length = mean_length(latent, concentration)
        self.best_similarity = self.mean_length**2
        draw = torch.Generator().manual_seed(seed)
        self.text_basis, self.image_basis = torch.linalg.qr(torch.randn(2, dim, latent, generator=draw)).Q

    def images(self, text_embed: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """An image embedding for each text embedding: both (rows, dim), fp32, on the CPU."""
        concept = text_embed @ self.text_basis
        noise = torch.randn(concept.shape, generator=generator)
        return l2norm(self.concentration * concept + noise) @ self.image_basis.T

    def mean_images(self, text_embed: Tensor) -> Tensor:
        """The expected image embedding, of length `mean_length`, of each text embedding: both (rows, dim)."""
        return self.mean_length * text_embed @ self.text_basis @ self.image_basis.T

    def batch(self, pairs: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Fresh pairs: text_embed and image_embed (pairs, dim), text_encodings (pairs, length, dim), fp32."""
        tokens = torch.randn(pairs, self.length, self.dim, generator=generator)
        text_embed = l2norm(tokens.sum(dim=1) @ self.text_basis) @ self.text_basis.T
        image_embed = self.images(text_embed, generator)
        return dict(text_embed=text_embed, text_encodings=tokens, image_embed=image_embed)

    def measure(self, sampled: Tensor, text_embed: Tensor) -> dict[str, float]:
        """The class's three statistics of samples; `best_similarity` is the aim of each.

        Args:
            sampled: (texts * n, dim), of any length; the n ≥ 2 samples of a text lie together.
            text_embed: (texts, dim).
        Returns:
            "similarity", "self-similarity" and "score": means over the texts, unbiased for any n.
        """
        texts = len(text_embed)
        n = len(sampled) // max(texts, 1)
        if n < 2 or sampled.shape != (texts * n, self.dim):
            wanted = f"(n * {texts}, {self.dim}) with n of at least 2"
            raise ValueError(f"sampled has shape {tuple(sampled.shape)}; it must be {wanted}")
        sampled, mean = l2norm(sampled.double().cpu()).view(texts, n, -1), self.mean_images(text_embed.cpu()).double()
        similarity = (sampled.mean(dim=1) * mean).sum(dim=-1).mean().item()
        itself = ((sampled.sum(dim=1).square().sum(dim=-1) - n) / (n * (n - 1))).mean().item()
        return {"similarity": similarity, "self-similarity": itself, "score": 2 * similarity - itself}

"""What the network of a prior is conditioned on: made of what users give, checked, and compared with the samples."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from fastprior.checks import check_count
from fastprior.kernels import ops
from fastprior.models.dalle2.layers import l2norm
from fastprior.models.dalle2.network import DiffusionPriorNetwork

NORM_TOLERANCE = 0.05  # how far from 1 the norm of a CLIP's embedding may be


def check_tensors(**values: Tensor | None) -> None:
    """Raise TypeError, with its name, for what is given and is no tensor, such as an array."""
    for name, value in values.items():
        if value is not None and not torch.is_tensor(value):
            kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
            raise TypeError(f"{name} is a {kind}; it must be a torch.Tensor (torch.as_tensor makes one)")


def _strings(text) -> list[str]:
    """Texts, from one or several. Raises TypeError for anything else."""
    texts = [text] if isinstance(text, (str, bytes)) or not isinstance(text, Iterable) else list(text)
    for each in texts:
        if not isinstance(each, str):
            rule = "it must be strings, or a tensor of tokens (batch, length)"
            raise TypeError(f"text has an item of type {type(each).__name__}; {rule}")
    return texts


def check_conditions(net: nn.Module, text_cond: dict) -> None:
    """Raise ValueError unless values of extra conditions are what the network takes."""
    own = isinstance(net, DiffusionPriorNetwork) and net.conditions is not None
    if own and text_cond.get("conditions"):
        net.conditions.check_values(text_cond["conditions"], len(text_cond["text_embed"]))


class TextConditioned:
    """The methods of a `DiffusionPrior` for its text condition."""

    _warned_of_norm = False

    def text_condition(self, text, text_embed, text_encodings, mask=None, conditions=None) -> dict:
        """What the network is conditioned on, from arguments as `sample` takes them: text_embed, text_encodings, …"""
        if (text is None) == (text_embed is None):
            raise ValueError("exactly one of text and text_embed must be given")
        if isinstance(self.net, DiffusionPriorNetwork):  # a foreign one may take anything
            check_tensors(text_embed=text_embed, text_encodings=text_encodings, mask=mask)
        if text is not None:
            if self.clip is None:
                raise ValueError("text was given, but this prior has no clip; give text_embed and text_encodings")
            if not torch.is_tensor(text):
                text = self.clip.tokenize(_strings(text))
            text_embed, text_encodings = self.clip.embed_text(text.to(self.device))
        extra = dict(conditions=conditions) if conditions else {}
        if not self.condition_on_text_encodings:
            return dict(text_embed=text_embed, **extra)
        if text_encodings is None:
            raise ValueError("text_encodings=None; this prior is conditioned on text encodings")
        if mask is not None:
            text_encodings = text_encodings.masked_fill(~mask.bool()[..., None], 0)
        return dict(text_embed=text_embed, text_encodings=text_encodings, **extra)

    def check_text_condition(self, shape: tuple[int, ...], text_cond: dict) -> None:
        """Raise ValueError unless embeddings of this shape can be sampled for it; warn of a norm not CLIP's."""
        if shape[0] < 1:
            raise ValueError(f"shape={tuple(shape)}; the batch must not be empty")
        if not isinstance(text_cond, Mapping):
            kind = type(text_cond).__name__
            raise TypeError(f"text_cond is a {kind}; it must be a dict of text_embed and what else the network takes")
        embed = text_cond.get("text_embed")
        if isinstance(self.net, DiffusionPriorNetwork):
            check_tensors(text_embed=embed, text_encodings=text_cond.get("text_encodings"))
        if embed is None:
            if not isinstance(self.net, DiffusionPriorNetwork):
                return  # a foreign network's own condition
            raise ValueError(f"text_cond has the keys {sorted(text_cond)}; it must hold 'text_embed'")
        if len(embed) == 0 or shape[0] % len(embed):
            raise ValueError(f"shape={tuple(shape)}; its rows must be a multiple of text_embed's, {len(embed)}")
        check_conditions(self.net, text_cond)
        tensors = {name: t for name, t in text_cond.items() if torch.is_tensor(t)}
        with ops.one_thread(max(tensors.values(), key=Tensor.numel, default=torch.empty(0))):
            for name, t in tensors.items():
                if len(t) != len(embed):
                    rows = f"{len(t)} rows and text_embed {len(embed)}"
                    raise ValueError(f"text_cond[{name!r}] has {rows}; they must agree")
                if t.is_floating_point() and not t.isfinite().all():
                    raise ValueError(f"text_cond[{name!r}] holds NaN or infinity")
        clip_like = embed.ndim == 2 and self.can_compare_text and not hasattr(self.net, "normalize")
        if self._warned_of_norm or not clip_like:
            return
        norms = embed.float().norm(dim=-1)
        if (norms - 1).abs().max() > NORM_TOLERANCE:
            self._warned_of_norm = True
            rule = "CLIP priors are trained on embeddings of norm 1 (this is said once)"
            warnings.warn(f"text_embed rows have norms up to {norms.max():.3g}; {rule}", stacklevel=4)

    def check_best_of(self, candidates: int, name: str) -> None:
        """Raise ValueError where there are no candidates, or no telling which of them is the best."""
        check_count(name, candidates)
        if candidates > 1 and not self.can_compare_text:
            raise ValueError(
                f"{name}={candidates}; it must be 1, since a text_embed of width {self.net.text_embed_dim} cannot be "
                "compared with image embeddings"
            )

    def best_of(self, embeds: Tensor, text_embed: Tensor) -> Tensor:
        """Choose from embeds (prompts, candidates, dim) those most similar to text_embed (prompts, dim)."""
        if embeds.shape[1] == 1:
            return embeds[:, 0]
        best = (l2norm(text_embed)[:, None] * l2norm(embeds)).sum(dim=-1).argmax(dim=-1)
        return embeds[torch.arange(len(embeds), device=embeds.device), best]

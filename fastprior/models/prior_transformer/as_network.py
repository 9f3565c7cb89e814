"""A `PriorTransformer` in the place of a `DiffusionPriorNetwork`: trained, evaluated and sampled by the same code."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprior.draws import prob_mask_like
from fastprior.kernels import ops
from fastprior.models.dalle2.network import DiffusionPriorNetwork
from fastprior.models.loading import NoticesForeignStates
from fastprior.models.prior_transformer import prompt_memory
from fastprior.models.prior_transformer.forward import PriorTransformerConditioning
from fastprior.models.prior_transformer.model import PriorTransformer


class PriorTransformerNet(NoticesForeignStates, nn.Module):
    """The network of a `DiffusionPrior`, for training Kandinsky's and Karlo's priors or new ones of their kind.

    Diffusion runs on normalised embeddings, `(image_embed - clip_mean) / clip_std`. All-zero rows of `text_encodings`
    are padding: real tokens alone are computed, and one prefix serves all draws of a pair. Dropped text, and the
    unconditional branch of guidance, are the empty text's encoding, as diffusers' pipelines have it; the noisy image is
    never dropped.

    Args:
        prior: ours, or diffusers' after `accelerate_prior`; with a "prd" token. Export it by its `save_pretrained`.

    Attributes:
        null_text_embed, null_text_encodings: of the empty text, (1, embedding_proj_dim) and (1, num_embeddings,
            embedding_dim), zeros until `set_null_text`.
    """

    self_cond = False
    conditions = None
    null_sees_image = True

    def __init__(self, prior: PriorTransformer):
        super().__init__()
        config = prior.config
        if prior.prd_embedding is None or prior.encoder_hidden_states_proj is None or prior.clip_mean is None:
            raise ValueError("prior must have a 'prd' token, text encodings, and clip_mean and clip_std")
        self.prior = prior
        self.dim = config["clip_embed_dim"] or config["embedding_dim"]
        if self.dim != config["embedding_dim"]:
            raise ValueError(f"clip_embed_dim={self.dim}; it must be embedding_dim, {config['embedding_dim']}")
        self.max_text_len, self.text_dim = config["num_embeddings"], config["embedding_dim"]
        self.text_embed_dim = config["embedding_proj_dim"] or self.text_dim
        self.config = dict(make="prior_transformer", **{name: config[name] for name in config if name[0] != "_"})
        for statistics in (prior.clip_mean, prior.clip_std):
            statistics.requires_grad_(False)  # no gradient reaches them, which DDP would wait for
        self.register_buffer("null_text_embed", torch.zeros(1, self.text_embed_dim))
        self.register_buffer("null_text_encodings", torch.zeros(1, self.max_text_len, self.text_dim))

    @property
    def prefix_tokens(self) -> int:
        return self.max_text_len + 1

    @property
    def suffix_tokens(self) -> int:
        return 3

    @torch.no_grad()
    def set_statistics(self, image_embed: Tensor) -> None:
        """Take `clip_mean` and `clip_std` from image embeddings (n, dim), n at least 2."""
        if image_embed.ndim != 2 or image_embed.shape[1] != self.dim or len(image_embed) < 2:
            raise ValueError(f"image_embed has shape {tuple(image_embed.shape)}; it must be (2 or more, {self.dim})")
        self.prior.clip_mean.copy_(image_embed.double().mean(dim=0))
        self.prior.clip_std.copy_(image_embed.double().std(dim=0))

    @torch.no_grad()
    def set_null_text(self, text_embed: Tensor, text_encodings: Tensor) -> None:
        """Take the encoding of the empty text: (1, embedding_proj_dim) and (1, length, embedding_dim)."""
        self._check(text_embed, text_encodings)
        self.null_text_embed.copy_(text_embed)
        self.null_text_encodings.zero_()[:, : text_encodings.shape[1]].copy_(text_encodings)

    def normalize(self, image_embed: Tensor) -> Tensor:
        """Normalise embeddings, which diffusion runs on then. Raises ValueError where `clip_std` is not set."""
        if not torch.compiler.is_compiling() and not self.prior.clip_std.all():
            raise ValueError("clip_std holds zeros; it must be loaded, or taken from data by `set_statistics`")
        return (image_embed - self.prior.clip_mean) / self.prior.clip_std

    def denormalize(self, image_embed: Tensor) -> Tensor:
        return self.prior.post_process_latents(image_embed)

    def enable_gradient_checkpointing(self) -> None:
        self.prior.enable_gradient_checkpointing()

    def obstacles(self, dropout: bool = False) -> list[str]:
        """Why the network cannot run as prefill and steps; empty when it can. Dropout always stands in the way."""
        return prompt_memory.prefix_obstacles(self.prior, self.suffix_tokens)

    def _check(self, text_embed: Tensor, text_encodings: Tensor | None) -> None:
        prompts = text_embed.shape[0]
        if text_embed.shape != (prompts, self.text_embed_dim):
            rule = f"it must be {(prompts, self.text_embed_dim)}"
            raise ValueError(f"text_embed has shape {tuple(text_embed.shape)}; {rule}")
        if text_encodings is None:
            raise ValueError("text_encodings=None; a PriorTransformer is conditioned on text encodings")
        length = text_encodings.shape[1]
        if text_encodings.shape != (prompts, length, self.text_dim) or length > self.max_text_len:
            rule = f"it must be ({prompts}, at most {self.max_text_len}, {self.text_dim})"
            raise ValueError(f"text_encodings has shape {tuple(text_encodings.shape)}; {rule}")

    def _text(self, text_embed: Tensor, text_encodings: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The text as the prior takes it, with a mask; rows that are not kept (prompts, 1, 1) are the empty text."""
        self._check(text_embed, text_encodings)
        dtype = self.prior.dtype
        embed = torch.where(keep[:, 0], text_embed.to(dtype), self.null_text_embed.to(dtype))
        encodings = F.pad(text_encodings, (0, 0, 0, self.max_text_len - text_encodings.shape[1])).to(dtype)
        encodings = torch.where(keep, encodings, self.null_text_encodings.to(dtype))
        return embed, encodings, encodings.ne(0).any(dim=-1)

    def forward(
        self,
        image_embed: Tensor,
        diffusion_timesteps: Tensor,
        *,
        text_embed: Tensor,
        text_encodings: Tensor,
        self_cond: None = None,
        text_cond_drop_prob: float = 0.0,
        image_cond_drop_prob: float = 0.0,
    ) -> Tensor:
        """Predict from noisy, normalised embeddings: see `DiffusionPriorNetwork.forward`.

        `text_cond_drop_prob` is the chance per prompt of the empty text; `self_cond` and `image_cond_drop_prob` are not
        used.
        """
        rows, prompts, prior = image_embed.shape[0], text_embed.shape[0], self.prior
        if rows != prompts and rows % prompts:
            raise ValueError(f"image_embed has {rows} rows; they must be a multiple of the {prompts} of text_embed")
        keep = prob_mask_like((prompts, 1, 1), 1 - text_cond_drop_prob, image_embed.device)
        text = self._text(text_embed, text_encodings, keep)
        x = image_embed.to(prior.dtype)
        looks = not (torch.compiler.is_compiling() or ops.is_recorded())  # at values, as packing a prefix does
        if looks and not prior.gradient_checkpointing and not self.obstacles():
            prefix = prior.encode_prefix(*text, self.suffix_tokens)
            return prior.predict_behind(x, prior.time_tokens(diffusion_timesteps), prefix)
        text = (t.repeat_interleave(rows // prompts, dim=0) for t in text)
        return prior.predict_whole(x, diffusion_timesteps, *text)

    forward_with_cond_scale = DiffusionPriorNetwork.forward_with_cond_scale

    def prefill(
        self, text_embed: Tensor, text_encodings: Tensor, times: Tensor, null_rows: int = 0, conditions: None = None
    ) -> PriorTransformerConditioning:
        """Run the text once, for any number of steps: see `DiffusionPriorNetwork.prefill`."""
        keep = torch.ones(len(text_embed), 1, 1, dtype=torch.bool, device=text_embed.device)
        text = self._text(text_embed, text_encodings, keep)
        if null_rows:
            null = self._text(text_embed[:1], text_encodings[:1], ~keep[:1])
            text = (torch.cat((t, empty.expand(null_rows, *t.shape[1:]))) for t, empty in zip(text, null))
        prefix = self.prior.encode_prefix(*text, self.suffix_tokens)
        return PriorTransformerConditioning(prefix, self.prior.time_tokens(times), null_rows)

    def share(self, cond: PriorTransformerConditioning, samples: int) -> PriorTransformerConditioning:
        """Make a conditioning ready for several samples of each prompt: see `DiffusionPriorNetwork.share`."""
        return self.prior.share(cond, samples)

    def step(self, x: Tensor, index: Tensor, cond: PriorTransformerConditioning, self_cond: None = None) -> Tensor:
        """One evaluation behind the cached prefix: see `DiffusionPriorNetwork.step`."""
        return self.prior.step(x, index, cond)

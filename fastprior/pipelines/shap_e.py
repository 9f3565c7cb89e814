"""Shap-E's prior: latents of 3-D shapes from texts, without diffusers."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprior.checkpoints.for_serving import Weights, of_transformer
from fastprior.checks import check_count, check_number
from fastprior.diffusion.diffusers_schedules import DiffusersSchedule
from fastprior.engine.steps import Generators, Noise, StepInputs, bind, run_table, solver_step
from fastprior.models.prior_transformer.model import PriorTransformer
from fastprior.models.weight_lock import lock_of
from fastprior.pipelines.parts import Encoders, check_prior, first_state, load
from fastprior.pipelines.text_encoding import TextEncoding


class ShapEPrior:
    """Sample Shap-E's latents: what diffusers' ShapEPipeline hands to its renderer, for the same generator.

    Attention is in both directions here, so that nothing of the text can be kept: every step is a full pass.

    Args: see `PriorPipeline`.
    """

    def __init__(
        self,
        prior: PriorTransformer,
        schedule: DiffusersSchedule,
        *,
        folder: str | os.PathLike | None = None,
        variant: str | None = None,
        text_encoder: Any = None,
        tokenizer: Any = None,
    ):
        check_prior(prior)
        self.prior, self.schedule = prior, schedule
        self._encoders = Encoders(folder, variant, text_encoder, tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike,
        *,
        variant: str | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        text_encoder: Any = None,
        tokenizer: Any = None,
    ) -> ShapEPrior:
        """Read a pipeline's folder, as diffusers saves it: see `PriorPipeline.from_pretrained`."""
        options = {name: value for name, value in locals().items() if name not in ("cls", "dtype", "device")}
        return cls(*load(folder, variant, dtype, device), **options)

    def encode_text(self, texts: str | list[str]) -> TextEncoding:
        """Encode texts; those that are longer than the text encoder takes are cut, with a warning."""
        return self._encoders.encode_text(texts, self.prior.device, self.prior.dtype)

    def update(self, weights: Weights) -> None:
        """Serve other weights of the prior from the next call on: see `PriorPipeline.update`."""
        fitting = of_transformer(self.prior, weights)
        self.prior.load_state_dict(fitting)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | Tensor,
        *,
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 25,
        guidance_scale: float = 4.0,
        generator: Generators = None,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Sample.

        Args:
            prompt: texts, or their CLIP embeddings (prompts, embedding_proj_dim).
            num_images_per_prompt: samples of each prompt, which lie together.
            guidance_scale: classifier-free guidance; none at 1 and below.
            generator: one, or one for each row.
            latents: (rows, num_embeddings * embedding_dim), the initial noise.
        Returns:
            (prompts * num_images_per_prompt, num_embeddings, embedding_dim).
        Raises:
            ValueError, TypeError: naming the argument, its value and the rule.
        """
        check_count("num_images_per_prompt", num_images_per_prompt)
        check_number("guidance_scale", guidance_scale)
        prior, guidance, device = self.prior, guidance_scale > 1, self.prior.device
        config, dtype = prior.config, prior.dtype
        tokens, dim = config["num_embeddings"], config["embedding_dim"]
        embeds = prompt if torch.is_tensor(prompt) else self.encode_text(prompt).embeds
        wanted = config["embedding_proj_dim"] or dim
        if embeds.ndim != 2 or embeds.shape[1] != wanted:
            raise ValueError(f"prompt has shape {tuple(embeds.shape)}; it must be (prompts, {wanted})")
        embeds = F.normalize(embeds, dim=-1).repeat_interleave(num_images_per_prompt, dim=0) * wanted**0.5
        rows = len(embeds)
        table = self.schedule.table(num_inference_steps)
        noise = Noise((rows, tokens * dim), device, generator, embeds.dtype)
        x = next(noise) if latents is None else first_state(latents, (rows, tokens * dim), device)
        x = (x * table.noise_scale).view(rows * tokens, dim)
        if guidance:
            embeds = torch.cat((embeds, torch.zeros_like(embeds)))
        times = torch.tensor(table.times, device=device)

        def predict(cond, x, x0, index):
            hidden = x.view(rows, tokens, dim).to(dtype).repeat(1 + guidance, 1, 1)
            pred = prior(hidden, times[index], cond).predicted_image_embedding[..., :dim].reshape(-1, dim)
            return pred.chunk(2) if guidance else (pred, None)

        step = solver_step(predict, self.schedule.clamp, self.schedule.radius, table.uses_prediction)
        scale = torch.tensor(guidance_scale, dtype=x.dtype, device=device)
        step = bind(step, StepInputs(embeds, table.rows.to(device, x.dtype)), scale)
        with lock_of(prior):
            x = run_table(table, step, x, (t.view_as(x) for t in noise))
        return x.view(rows, tokens, dim).to(embeds.dtype)

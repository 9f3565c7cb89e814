"""Shap-E's prior: latents of 3-D shapes from texts, without diffusers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprior.pipelines.parts import PipelineParts
from fastprior.pipelines.runs import update
from fastprior.pipelines.text_encoding import Generators
from fastprior.prior.loop import run_table


class ShapEPrior(PipelineParts):
    """Sample Shap-E's latents: what diffusers' ShapEPipeline hands to its renderer, for the same generator.

    Attention is in both directions here, so that nothing of the text can be kept: every step is a full pass.
    """

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
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt={num_images_per_prompt}; it must be at least 1")
        config, guidance = self.prior.config, guidance_scale > 1
        tokens, dim = config["num_embeddings"], config["embedding_dim"]
        embeds = prompt if torch.is_tensor(prompt) else self.encode_text(prompt).embeds
        wanted = config["embedding_proj_dim"] or dim
        if embeds.ndim != 2 or embeds.shape[1] != wanted:
            raise ValueError(f"prompt has shape {tuple(embeds.shape)}; it must be (prompts, {wanted})")
        embeds = F.normalize(embeds, dim=-1).repeat_interleave(num_images_per_prompt, dim=0) * wanted**0.5
        rows = len(embeds)
        table = self.schedule.table(num_inference_steps)
        draw = self.noise(rows, tokens * dim, generator, embeds.dtype)
        x = self.pure_noise(table, draw, latents, (rows, tokens * dim)).view(rows * tokens, dim)
        if guidance:
            embeds = torch.cat((embeds, torch.zeros_like(embeds)))
        coefficients = table.rows.to(self.device, x.dtype)
        scale = torch.tensor(guidance_scale, dtype=x.dtype, device=self.device)
        indices = torch.arange(len(table), device=self.device)
        times = torch.tensor(table.times, device=self.device)

        def step(x, x0, noise, index):
            given = x.view(rows, tokens, dim).to(self.dtype).repeat(1 + guidance, 1, 1)
            pred = self.prior(given, times[index], embeds).predicted_image_embedding[..., :dim].reshape(-1, dim)
            pred, null = pred.chunk(2) if guidance else (pred, None)
            fixed = coefficients, indices[index], self.schedule.clamp, self.schedule.radius, table.uses_prediction
            return update(pred, null, scale, x, x0, noise().view_as(x), *fixed)

        return run_table(table, step, x, draw).view(rows, tokens, dim).to(embeds.dtype)

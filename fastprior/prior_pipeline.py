"""Image embeddings of prompts from the folder of a diffusers pipeline (Kandinsky, Karlo, StableUnCLIP), without it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fastprior.diffusers_schedules import DiffusersSchedule
from fastprior.kernels import ops
from fastprior.sampler import run_table

if TYPE_CHECKING:
    from fastprior.prior_transformer import PriorTransformer

# the parts of a pipeline besides the prior and the scheduler, which transformers loads when they are first needed
PARTS = {
    "text_encoder": "CLIPTextModelWithProjection",
    "tokenizer": "CLIPTokenizer",
    "image_encoder": "CLIPVisionModelWithProjection",
    "image_processor": "CLIPImageProcessor",
}
Generators = torch.Generator | Sequence[torch.Generator] | None


class TextEncoding(NamedTuple):
    """What a prior is conditioned on, as CLIP gives it.

    Attributes:
        embeds: (prompts, embedding_proj_dim), the projected text embeddings.
        encodings: (prompts, num_embeddings, embedding_dim), the last hidden states.
        mask: (prompts, num_embeddings) bool, False where a token is padding.
    """

    embeds: Tensor
    encodings: Tensor
    mask: Tensor


class ImageEmbeddings(NamedTuple):
    """image_embeds (rows, dim), and negative_image_embeds of the same shape, None where nothing says what they are."""

    image_embeds: Tensor
    negative_image_embeds: Tensor | None


def guided_step(
    prior: PriorTransformer,
    cond: Any,
    rows: Tensor,
    scale: Tensor,
    x: Tensor,
    x0: Tensor,
    noise: Tensor,
    index: Tensor,
    guided: int,
    clamp: str | None,
    radius: float,
    uses_prediction: bool,
) -> tuple[Tensor, Tensor]:
    """One step of any solver for the first `guided` rows with guidance, and for the rest without.

    Args:
        cond: from `prior.prefill`: the conditions of all rows, then the unconditional ones of the guided rows.
        rows: (steps, 6), the solver's coefficients.
        scale: 0-d.
        x, x0, noise: (rows, dim): the state, the last clean estimate and this step's noise.
        index: 0-d int64, the step.
        uses_prediction: see `StepTable`.
    Returns:
        the next x, and the clean estimate.
    """
    null = None
    if guided:
        pred, null = prior.step(torch.cat((x, x[:guided])), index, cond).split((len(x), guided))
        null = torch.cat((null, pred[guided:]))
    else:
        pred = prior.step(x, index, cond)
    if uses_prediction:
        x0 = pred = (pred if null is None else torch.lerp(null, pred, scale)).to(x.dtype)
        null = None
    return ops.diffusion_step(x, pred, null, scale, x0, noise, rows, index, clamp, radius)


def _subfolder(folder: Path, name: str) -> Path:
    """Of a part; pipelines that hold a decoder as well say `prior_` in front of what is the prior's."""
    own = folder / f"prior_{name}"
    return own if own.is_dir() else folder / name


def _listed(name: str, texts: str | list[str]) -> list[str]:
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{name}={texts!r}; it must be a string, a list of strings, or a TextEncoding")
    return list(texts)


class PriorPipeline:
    """Sample CLIP image embeddings of prompts: what diffusers' prior pipelines give, for the same generator.

    The text is encoded once per different prompt, and its prefix computed once, however many images and steps there
    are. The state of a run is fp32 (or wider), whatever the dtype of the prior.

    Args:
        prior: in eval mode.
        schedule: of the noise.
        folder: of the pipeline, from where `PARTS` are loaded when they are needed.
        variant: of the weights' files, such as "fp16", where a part has it.
        **parts: those of `PARTS` that are not in the folder, or in place of the folder's.
    """

    def __init__(
        self,
        prior: PriorTransformer,
        schedule: DiffusersSchedule,
        *,
        folder: str | os.PathLike | None = None,
        variant: str | None = None,
        **parts: Any,
    ):
        if unknown := sorted(set(parts) - set(PARTS)):
            raise TypeError(f"{unknown[0]}= is no part of a pipeline; it must be one of {', '.join(PARTS)}")
        self.prior, self.schedule, self.variant = prior, schedule, variant
        self.folder = None if folder is None else Path(folder)
        self._parts = {name: part for name, part in parts.items() if part is not None}
        self._zero: Tensor | None = None

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike,
        *,
        variant: str | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
    ) -> PriorPipeline:
        """Read a pipeline's folder, as diffusers saves it: the prior and the scheduler now, the rest when needed.

        Args:
            folder: of a Kandinsky prior, a Karlo (UnCLIP) or a StableUnCLIP pipeline.
            variant: see `PriorPipeline`.
            dtype: of the prior and the encoders, fp32 by default.
        Raises:
            FileNotFoundError: there is no such folder, or no prior or scheduler in it.
        """
        from fastprior.prior_transformer import PriorTransformer

        if not (Path(folder) / "prior").is_dir():
            raise FileNotFoundError(f"{folder} has no folder 'prior'; it must be the folder of a pipeline with a prior")
        schedule = DiffusersSchedule.from_pretrained(_subfolder(Path(folder), "scheduler"))
        prior = PriorTransformer.from_pretrained(folder, subfolder="prior", variant=variant, torch_dtype=dtype)
        return cls(prior.to(device), schedule, folder=folder, variant=variant)

    @property
    def device(self) -> torch.device:
        return self.prior.device

    @property
    def dtype(self) -> torch.dtype:
        return self.prior.dtype

    def _has(self, name: str) -> bool:
        return name in self._parts or (self.folder is not None and _subfolder(self.folder, name).is_dir())

    def _part(self, name: str) -> Any:
        """A part of the pipeline, loaded when it is first needed."""
        if name not in self._parts:
            if not self._has(name):
                where = f"{self.folder} has no folder {name!r}" if self.folder else "no folder was given"
                raise ValueError(f"{name}=None; it is needed here and {where}: give {name}= or ready embeddings")
            try:
                import transformers
            except ImportError as error:
                raise ImportError(
                    f"the {name} of {self.folder} needs transformers: pip install transformers"
                ) from error
            folder, options = _subfolder(self.folder, name), {}
            if self.variant and any(folder.glob(f"*.{self.variant}.*")):
                options["variant"] = self.variant
            part = getattr(transformers, PARTS[name]).from_pretrained(folder, local_files_only=True, **options)
            if isinstance(part, nn.Module):
                part = part.to(device=self.device, dtype=self.dtype).eval()
            self._parts[name] = part
        return self._parts[name]

    @torch.no_grad()
    def encode_text(self, texts: str | list[str]) -> TextEncoding:
        """Encode texts; those that are longer than the text encoder takes are cut, with a warning."""
        texts, tokenizer = _listed("texts", texts), self._part("tokenizer")
        length = tokenizer.model_max_length
        if cut := [text for text, tokens in zip(texts, tokenizer(texts).input_ids) if len(tokens) > length]:
            warnings.warn(
                f"{len(cut)} texts have more than {length} tokens, and are cut there; the first is {cut[0]!r}"
            )
        tokens = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        encoded = self._part("text_encoder")(tokens.input_ids.to(self.device))
        mask = tokens.attention_mask.bool().to(self.device)
        return TextEncoding(encoded.text_embeds, encoded.last_hidden_state, mask)

    @torch.no_grad()
    def encode_image(self, image: Any) -> Tensor:
        """CLIP embeddings (images, dim) of a PIL image, a list of them, or preprocessed pixels (images, 3, h, w)."""
        if isinstance(image, (list, tuple)) and image and all(torch.is_tensor(pixels) for pixels in image):
            image = torch.cat(list(image))
        if not torch.is_tensor(image):
            image = self._part("image_processor")(image, return_tensors="pt").pixel_values
        if image.ndim != 4:
            raise ValueError(f"image has shape {tuple(image.shape)}; it must be (images, 3, height, width)")
        return self._part("image_encoder")(image.to(self.device, self.dtype)).image_embeds

    def zero_embed(self) -> Tensor:
        """(1, dim), the embedding of an all-zero image: what decoders are guided away from by default."""
        if self._zero is None:
            size = self._part("image_encoder").config.image_size
            self._zero = self.encode_image(torch.zeros(1, 3, size, size))
        return self._zero

    def _texts(
        self, prompt: str | list[str] | TextEncoding, negative: str | list[str] | TextEncoding | None
    ) -> tuple[TextEncoding, list[int], list[int]]:
        """All different texts, and which of them each prompt, and the negative of each prompt, is."""
        parts, choices, count = [], [], 0
        for name, given in (("prompt", prompt), ("negative_prompt", negative)):
            if given is None:
                continue
            if isinstance(given, TextEncoding):
                choice = list(range(len(given.embeds)))
            else:
                listed = _listed(name, given)
                different = list(dict.fromkeys(listed))
                choice, given = [different.index(text) for text in listed], self.encode_text(different)
            self._check(name, given)
            parts.append(given)
            choices.append([count + number for number in choice])
            count += len(given.embeds)
        prompts, negatives = choices[0], choices[1] if len(choices) > 1 else []
        if len(negatives) == 1:
            negatives = negatives * len(prompts)
        if negatives and len(negatives) != len(prompts):
            raise ValueError(
                f"negative_prompt has {len(negatives)} texts; it must have 1, or as many as prompt, {len(prompts)}"
            )
        return TextEncoding(*(torch.cat(tensors) for tensors in zip(*parts))), prompts, negatives

    def _check(self, name: str, text: TextEncoding) -> None:
        config, prompts = self.prior.config, len(text.embeds)
        length, dim = config["num_embeddings"], config["embedding_dim"]
        wanted = (prompts, config["embedding_proj_dim"] or dim), (prompts, length, dim), (prompts, length)
        for field, tensor, shape in zip(text._fields, text, wanted):
            if tensor.shape != shape or not prompts:
                raise ValueError(f"{name}.{field} has shape {tuple(tensor.shape)}; for this prior it must be {shape}")

    def _draw(self, rows: int, generator: Generators, dtype: torch.dtype) -> Callable[[], Tensor]:
        """Draws noise (rows, dim) as diffusers does: in the dtype of the text, where the generator lives."""
        dim, generators = self.prior.config["embedding_dim"], [generator]
        if isinstance(generator, (list, tuple)):
            generators = list(generator)
            if len(generators) not in (1, rows):
                raise ValueError(
                    f"generator has {len(generators)} entries; it must be one, or one for each of {rows} rows"
                )

        def draw() -> Tensor:
            noise = [
                torch.randn(
                    rows // len(generators), dim, generator=one, device=one.device if one else self.device, dtype=dtype
                )
                for one in generators
            ]
            return torch.cat(noise).to(self.device, torch.promote_types(dtype, torch.float32))

        return draw

    def _start(self, draw, table, rows: int, latents: Tensor | None, image: Any, repeats: int) -> Tensor:
        """The noise that a run begins with, or the image embeddings with noise on them."""
        if image is None:
            if latents is None:
                return draw() * table.noise_scale
            shape = rows, self.prior.config["embedding_dim"]
            if latents.shape != shape:
                raise ValueError(f"latents has shape {tuple(latents.shape)}; it must be {shape}")
            return latents.to(self.device, torch.promote_types(latents.dtype, torch.float32)) * table.noise_scale
        if latents is not None:
            raise ValueError("latents and image were both given; a run begins with only one of them")
        embeds = image if torch.is_tensor(image) and image.ndim == 2 else self.encode_image(image)
        embeds = embeds.to(self.device).repeat_interleave(repeats, dim=0)
        if rows % len(embeds):
            raise ValueError(
                f"image has {len(embeds) // repeats} images; the number of prompts must be a multiple of it"
            )
        noise = draw()
        return self.schedule.add_noise(embeds.to(noise.dtype).repeat(rows // len(embeds), 1), noise, table.times[0])

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | TextEncoding,
        negative_prompt: str | list[str] | TextEncoding | None = None,
        *,
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 25,
        guidance_scale: float = 4.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        eta: float = 0.0,
        image: Any = None,
        strength: float = 0.3,
        zero_embed: Tensor | None = None,
    ) -> ImageEmbeddings:
        """Sample.

        Args:
            prompt: texts, or their encoding.
            negative_prompt: guide away from these instead of the empty text: one for all prompts, or one for each.
            num_images_per_prompt: samples of each prompt, which lie together.
            guidance_scale: classifier-free guidance, `null + (prediction - null) * scale`; none at 1 and below.
            generator: one, or one for each row. A seed means the same as in diffusers' pipelines; as there, sampling
                for a negative prompt doubles the rows.
            latents: (rows, dim), the initial noise.
            eta: noise of a DDIM scheduler.
            image: begin with noise on images, or on their embeddings (images, dim), instead of pure noise.
            strength: with `image`, the part of the steps that is run.
            zero_embed: (1, dim), the `negative_image_embeds`, so that none are computed.
        Returns:
            image_embeds (prompts * num_images_per_prompt, dim), and negative_image_embeds: `zero_embed` where given,
            else samples for the negative prompts where given, else the embedding of the zero image, else (for want of
            an image encoder) None.
        Raises:
            ValueError, TypeError: naming the argument, its value and the rule.
        """
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt={num_images_per_prompt}; it must be at least 1")
        guidance, sample_negatives = guidance_scale > 1, negative_prompt is not None and zero_embed is None
        null_text = "" if guidance and negative_prompt is None else negative_prompt
        text, prompts, negatives = self._texts(prompt, null_text if guidance or sample_negatives else None)
        conditions = prompts + negatives if sample_negatives else prompts
        wanted = len(prompts) * num_images_per_prompt
        rows, guided = len(conditions) * num_images_per_prompt, wanted if guidance else 0
        table = self.schedule.table(num_inference_steps, eta=eta, strength=1.0 if image is None else strength)

        draw = self._draw(rows, generator, text.embeds.dtype)
        x = self._start(draw, table, rows, latents, image, num_images_per_prompt)
        step = self._step(table, text, conditions + (negatives if guidance else []), guided, guidance_scale, x.dtype)
        embeds = self.prior.post_process_latents(run_table(table, step, x, draw)).to(text.embeds.dtype)
        if sample_negatives:
            return ImageEmbeddings(*embeds.split(wanted))
        if zero_embed is None and self._has("image_encoder"):
            zero_embed = self.zero_embed()
        return ImageEmbeddings(embeds, None if zero_embed is None else zero_embed.expand(wanted, -1))

    def _step(self, table, text: TextEncoding, prefixes: list[int], guided: int, scale: float, dtype: torch.dtype):
        """The steps of a run, of which `prefixes` are the texts."""
        index = torch.tensor(prefixes, device=self.device)
        times = torch.tensor(table.times, device=self.device)
        cond = self.prior.prefill(*(tensor[index] for tensor in text), times)  # runs the same prompts once
        rows = table.rows.to(self.device, dtype)
        scale = torch.tensor(scale, dtype=dtype, device=self.device)
        indices = torch.arange(len(rows), device=self.device)
        run = partial(guided_step, self.prior, cond, rows, scale)

        def step(x, x0, noise, index):
            fixed = guided, self.schedule.clamp, self.schedule.radius, table.uses_prediction
            return run(x, x0, noise(), indices[index], *fixed)

        return step

    def interpolate(
        self,
        images_and_prompts: list,
        weights: list[float],
        *,
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 25,
        generator: Generators = None,
        negative_prior_prompt: str | None = None,
        negative_prompt: str = "",
        **kwargs,
    ) -> ImageEmbeddings:
        """The weighted sum of the embeddings of texts and images.

        Args:
            images_and_prompts: texts, PIL images, or preprocessed pixels (1, 3, height, width).
            weights: one for each.
            negative_prior_prompt: the negative prompt of every text.
            negative_prompt: what `negative_image_embeds` are sampled for; as `__call__` says where it is empty.
            **kwargs: guidance_scale, latents, eta: see `__call__`.
        Returns:
            (num_images_per_prompt, dim) each. Texts are sampled one after the other, from one generator.
        """
        if not images_and_prompts or len(images_and_prompts) != len(weights):
            sizes = f"images_and_prompts has {len(images_and_prompts)} entries and weights {len(weights)}"
            raise ValueError(f"{sizes}; they must be as many, and at least one")
        options = dict(generator=generator, num_inference_steps=num_inference_steps, **kwargs)
        options["num_images_per_prompt"] = num_images_per_prompt
        embeds = 0.0
        for given, weight in zip(images_and_prompts, weights):
            if isinstance(given, str):
                embed = self(given, negative_prior_prompt, **options).image_embeds
            else:
                embed = self.encode_image(given)
            embeds = embeds + embed * weight
        empty = self(negative_prompt, negative_prior_prompt, **options)
        return ImageEmbeddings(embeds, empty.negative_image_embeds if negative_prompt == "" else empty.image_embeds)

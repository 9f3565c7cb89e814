"""Image embeddings of prompts from the folder of a diffusers pipeline (Kandinsky, Karlo, StableUnCLIP), without it."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastprior.checkpoints.for_serving import Weights, of_transformer
from fastprior.checks import check_count, check_number
from fastprior.diffusion.diffusers_schedules import DiffusersSchedule
from fastprior.diffusion.solvers import StepTable
from fastprior.engine.clock import Clock
from fastprior.engine.engine import Engine
from fastprior.engine.shapes import BATCH_SIZES
from fastprior.engine.steps import Generators, Noise
from fastprior.kernels import ops
from fastprior.models import quality, snapshot
from fastprior.models.prior_transformer.model import PriorTransformer
from fastprior.models.prior_transformer.prompt_memory import prefix_obstacles
from fastprior.models.quantise import check as check_quantise
from fastprior.models.quantise import quantised
from fastprior.models.weight_lock import lock_of, weights_locked
from fastprior.pipelines.outputs import ImageEmbeddings, arrays
from fastprior.pipelines.parts import Encoders, check_prior, first_state, listed, load
from fastprior.pipelines.runs import PromptRun, judged
from fastprior.pipelines.text_encoding import TextEncoding


class PriorPipeline:
    """Sample CLIP image embeddings of prompts: what diffusers' prior pipelines give, for the same generator.

    A text is encoded, and its prefix computed, once for all images and steps. The state of a run is fp32 (or wider),
    whatever the dtype of the prior.

    Args:
        prior: in eval mode.
        schedule: of the noise.
        folder: of a Kandinsky prior, or a Karlo or StableUnCLIP pipeline, from where encoders are loaded when they are
            needed.
        variant: of the weights' files, such as "fp16", where an encoder has it.
        text_encoder, tokenizer, image_encoder, image_processor: of transformers, those that are not in the folder, or
            in place of the folder's.
        compile: use torch.compile for the steps. Each batch size, and each text length up to a multiple of 16 tokens,
            takes a graph of its own, as do other numbers of images and steps; the first call with it is slow.
        batch_sizes: numbers of prompts that compiled steps run, see `PriorSampler`.
        quantise: "int8" or "float8": steps read linears of 8 bits. The next call after each change of the weights
            compares embeddings of random texts first, and fails where they differ too much, see `PriorSampler`.
        graphs: capture prefill and step as CUDA graphs, by default on CUDA. Each batch size, text length up to a
            multiple of 16 tokens, number of images and kind of guidance takes graphs of its own, whatever solver and
            steps (up to 64). They are captured again for other weights or modules. Runs by graphs wait for each other,
            also those of other threads and streams. See `PriorSampler` for captures that fail, and for threads.
        graph_memory: bytes that graphs may hold, without limit by default, see `PriorSampler`.

    Attributes:
        quality: with `quantise`, the median and the worst cosine that were found.
        graphs: as given; False after a capture that failed.
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
        image_encoder: Any = None,
        image_processor: Any = None,
        compile: bool = False,
        batch_sizes: tuple[int, ...] = BATCH_SIZES,
        quantise: str | None = None,
        graphs: bool | None = None,
        graph_memory: int | None = None,
    ):
        check_prior(prior)
        self.prior, self.schedule = prior, schedule
        self._encoders = Encoders(folder, variant, text_encoder, tokenizer, image_encoder, image_processor)
        check_quantise(quantise)
        self._engine = Engine(prior.device, batch_sizes, compile=compile, graphs=graphs, graph_memory=graph_memory)
        self.compile, self.batch_sizes, self.quantise = compile, self._engine.batch_sizes, quantise
        self.quality: quality.Quality | None = None
        self._quantised: PriorTransformer | None = None
        self._reasons: list[str] = []  # why the last run had no prefix
        self._steps = 0  # of the last run
        self._table: tuple[tuple, StepTable | None] = (), None  # of the last run, and what it was made for

    def __getstate__(self) -> dict:
        """What a copy, or what is unpickled, does not build again of its own prior."""
        return vars(self) | dict(_quantised=None, _engine=copy.copy(self._engine))

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
        image_encoder: Any = None,
        image_processor: Any = None,
        compile: bool = False,
        batch_sizes: tuple[int, ...] = BATCH_SIZES,
        quantise: str | None = None,
        graphs: bool | None = None,
        graph_memory: int | None = None,
    ) -> PriorPipeline:
        """Read a pipeline's folder, as diffusers saves it: the prior and the scheduler now, the rest when needed.

        Args:
            dtype: of the prior and the encoders, fp32 by default.
            device: where they are to lie.
            …: see the class.
        Raises:
            FileNotFoundError: there is no such folder, or no prior or scheduler in it.
        """
        options = {name: value for name, value in locals().items() if name not in ("cls", "dtype", "device")}
        return cls(*load(folder, variant, dtype, device), **options)

    @property
    def device(self) -> torch.device:
        return self.prior.device

    @property
    def dtype(self) -> torch.dtype:
        return self.prior.dtype

    @property
    def folder(self) -> Path | None:
        return self._encoders.folder

    @property
    def graphs(self) -> bool | None:
        return self._engine.graphs

    @graphs.setter
    def graphs(self, wanted: bool | None) -> None:
        self._engine.graphs = wanted

    def has(self, name: str) -> bool:
        """Whether there is an encoder of that name, loaded or not."""
        return self._encoders.has(name)

    def part(self, name: str) -> Any:
        """An encoder, loaded when it is first needed."""
        return self._encoders.part(name, self.device, self.dtype)

    def encode_text(self, texts: str | list[str]) -> TextEncoding:
        """Encode texts; those that are longer than the text encoder takes are cut, with a warning."""
        return self._encoders.encode_text(texts, self.device, self.dtype)

    def encode_image(self, image: Any) -> Tensor:
        """CLIP embeddings (images, dim) of a PIL image, a list of them, or preprocessed pixels (images, 3, h, w)."""
        return self._encoders.encode_image(image, self.device, self.dtype)

    def zero_embed(self) -> Tensor:
        """(1, dim), the embedding of an all-zero image: what decoders are guided away from by default."""
        return self._encoders.zero_embed(self.device, self.dtype)

    def noise(self, rows: int, dim: int, generator: Generators, dtype: torch.dtype) -> Noise:
        """Noise (rows, dim), fp32 or wider, as diffusers draws it: in the text's dtype, where the generator lives."""
        return Noise((rows, dim), self.device, generator, dtype)

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
                texts = listed(name, given)
                different = list(dict.fromkeys(texts))
                choice, given = [different.index(text) for text in texts], self.encode_text(different)
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
        device = self.device
        return TextEncoding(*(torch.cat(tensors).to(device) for tensors in zip(*parts))), prompts, negatives

    def _check(self, name: str, text: TextEncoding) -> None:
        config, prompts = self.prior.config, len(text.embeds)
        length, dim = config["num_embeddings"], config["embedding_dim"]
        wanted = (prompts, config["embedding_proj_dim"] or dim), (prompts, length, dim), (prompts, length)
        for field, tensor, shape in zip(text._fields, text, wanted):
            if tensor.shape != shape or not prompts:
                raise ValueError(f"{name}.{field} has shape {tuple(tensor.shape)}; for this prior it must be {shape}")

    def _step_table(self, steps: int, **options: Any) -> StepTable:
        """The solver's coefficients: those of the last run, where it asked for the same."""
        asked, (made_for, table) = (self.schedule, steps, options), self._table
        if made_for != asked:
            table = self.schedule.table(steps, **options)
            self._table = asked, table
        return table

    def _first_state(
        self, table: StepTable, noise: Iterator[Tensor], latents: Tensor | None, image: Any, rows: int, repeats: int
    ) -> Tensor:
        """What a run begins with: noise (rows, dim), or images, or their embeddings (images, dim), with noise added."""
        if image is None:
            shape = rows, self.prior.config["embedding_dim"]
            x = next(noise) if latents is None else first_state(latents, shape, self.device)
            return x * table.noise_scale
        if latents is not None:
            raise ValueError("latents and image were both given; a run begins with only one of them")
        embeds = image if torch.is_tensor(image) and image.ndim == 2 else self.encode_image(image)
        embeds = embeds.to(self.device).repeat_interleave(repeats, dim=0)
        if rows % len(embeds):
            images = len(embeds) // repeats
            raise ValueError(f"image has {images} images; the number of prompts must be a multiple of it")
        drawn = next(noise)
        return self.schedule.add_noise(embeds.to(drawn.dtype).repeat(rows // len(embeds), 1), drawn, table.times[0])

    @torch.no_grad()
    def update(self, weights: Weights) -> None:
        """Serve other weights of the prior from the next call on, while other threads call: see `PriorSampler.update`.

        `weights` are a state dict, a PriorTransformer, or the folder of one or of a pipeline; or what holds one: a
        DiffusionPrior, its state dict, or a file that `fastprior.load` reads.
        """
        prior, judgement = self.prior, None
        fitting = of_transformer(prior, weights)
        if self.quantise:
            with lock_of(prior):
                twin = copy.deepcopy(prior)
            twin.load_state_dict(fitting)
            _, judgement = judged(self.quantise, twin, self.schedule)
        with weights_locked(prior):
            prior.load_state_dict(fitting)
            if judgement:
                with self._engine.lock, snapshot.running(prior):
                    self._engine.refresh(prior, partial(self._build, judgement))

    def _build(self, judgement: quality.Quality | None = None) -> None:
        self._quantised, prior = None, snapshot.held(self.prior)
        self._look(prior)
        if judgement:
            self._quantised, self.quality = quantised(prior, self.quantise), judgement
        elif self.quantise:
            self._quantised, self.quality = judged(self.quantise, prior, self.schedule)

    def _look(self, prior: PriorTransformer) -> None:
        """Find what in the prior must be called with all tokens, at each step; a warning says so once."""
        reasons = prefix_obstacles(prior, 2 + (prior.prd_embedding is not None))
        if reasons and reasons != self._reasons:
            warnings.warn(f"every step of the prior runs all tokens, which is slow: {'; '.join(reasons)}", stacklevel=5)
        self._reasons = reasons

    def _run(self, run: PromptRun, x: Tensor, noise: Noise) -> Tensor:
        """The embeddings of a run that begins at x (rows, dim), the rows of a prompt together."""
        with lock_of(self.prior), snapshot.running(self.prior) as prior:
            return prior.post_process_latents(self._run_steps(replace(run, prior=prior), x, noise))

    def _run_steps(self, run: PromptRun, x: Tensor, noise: Noise) -> Tensor:
        engine, self._steps = self._engine, len(run.table.times)
        if engine.clock.device != x.device:  # the prior moved
            with engine.lock:
                engine.clock.wait()
                engine.clock = Clock(x.device)
        if (replays := engine.replays) or self.quantise:
            with engine.lock:
                engine.refresh(self.prior, self._build)
        else:
            self._look(run.prior)
        whole = bool(self._reasons)
        if replays and not whole:
            with engine.lock, engine.clock:
                sources = run.sources(engine.batch_sizes, x)
                x, engine.clock.read = run.run(engine, self._quantised or run.prior, x, noise, sources)
            return x
        clock = engine.clock
        with ops.sharing():
            began = clock.now()
            x, read = run.run(engine, self._quantised or run.prior, x, noise, whole=whole)
        clock.add(began, read)
        return x

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
        solver: str | None = None,
        spacing: str | None = None,
        zero_embed: Tensor | None = None,
        output_type: str = "pt",
        return_dict: bool = True,
    ) -> ImageEmbeddings | tuple:
        """Sample.

        Args:
            prompt: texts, or their encoding.
            negative_prompt: guide away from these instead of the empty text: one for all prompts, or one for each.
            num_images_per_prompt: samples of each prompt, which lie together.
            guidance_scale: classifier-free guidance, `null + (prediction - null) * scale`; none at 1 and below.
            generator: one, or one for each row. A seed means the same as in diffusers' pipelines; as there, sampling
                for a negative prompt doubles the rows.
            latents: (rows, dim), the initial noise.
            eta: noise of a DDIM scheduler, or of `solver="ddim_trailing"`.
            image: begin with noise on images, or on their embeddings (images, dim), instead of pure noise.
            strength: with `image`, the part of the steps that is run.
            solver, spacing: another way than the scheduler's, see `DiffusersSchedule.table`.
            zero_embed: (1, dim), the `negative_image_embeds`, so that none are computed.
            output_type: "pt" for tensors, "np" for NumPy's arrays, of bf16 as fp32.
            return_dict: return `ImageEmbeddings`, or else a tuple.
        Returns:
            image_embeds (prompts * num_images_per_prompt, dim), and negative_image_embeds: `zero_embed` where given,
            else samples for the negative prompts where given, else the embedding of the zero image, else (for want of
            an image encoder) None.
        Raises:
            ValueError, TypeError: naming the argument, its value and the rule.
        """
        check_count("num_images_per_prompt", num_images_per_prompt)
        check_number("guidance_scale", guidance_scale)
        if output_type not in ("pt", "np"):
            raise ValueError(f"output_type={output_type!r}; it must be 'pt' or 'np'")
        dim = self.prior.config["embedding_dim"]
        if zero_embed is not None and zero_embed.shape != (1, dim):
            raise ValueError(f"zero_embed has shape {tuple(zero_embed.shape)}; it must be {(1, dim)}")
        guidance, sample_negatives = guidance_scale > 1, negative_prompt is not None and zero_embed is None
        null_text = "" if guidance and negative_prompt is None else negative_prompt
        text, prompts, negatives = self._texts(prompt, null_text if guidance or sample_negatives else None)
        conditions = prompts + negatives if sample_negatives else prompts
        wanted, rows = (len(of) * num_images_per_prompt for of in (prompts, conditions))
        strength = 1.0 if image is None else strength
        table = self._step_table(num_inference_steps, eta=eta, strength=strength, solver=solver, spacing=spacing)
        noise = self.noise(rows, dim, generator, text.embeds.dtype)
        x = self._first_state(table, noise, latents, image, rows, num_images_per_prompt)
        prefixes = conditions + (negatives if guidance else [])
        what = self.prior, self.schedule, table, text, prefixes
        run = PromptRun(*what, len(prompts), num_images_per_prompt, guidance, guidance_scale)
        embeds = self._run(run, x, noise).to(text.embeds.dtype)
        found = embeds.split(wanted) if sample_negatives else (embeds, self._zero_embeds(zero_embed, embeds))
        if output_type == "np":
            found = arrays(found)
        return ImageEmbeddings(*found) if return_dict else tuple(found)

    def _zero_embeds(self, given: Tensor | None, embeds: Tensor) -> Tensor | None:
        """What decoders are guided away from, for each of the embeddings; None where nothing says what it is."""
        if given is None and self.has("image_encoder"):
            given = self.zero_embed()
        return None if given is None else given.to(embeds).expand(len(embeds), -1)

    def interpolate(
        self,
        images_and_prompts: list,
        weights: list[float],
        *,
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 25,
        guidance_scale: float = 4.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        eta: float = 0.0,
        solver: str | None = None,
        spacing: str | None = None,
        negative_prior_prompt: str | None = None,
        negative_prompt: str = "",
    ) -> ImageEmbeddings:
        """The weighted sum of the embeddings of texts and images.

        Args:
            images_and_prompts: texts, PIL images, or preprocessed pixels (1, 3, height, width).
            weights: one for each.
            num_images_per_prompt, num_inference_steps, guidance_scale, generator, latents, eta, solver, spacing: of
                each text, see `__call__`. Texts are sampled one after the other, from one generator.
            negative_prior_prompt: the negative prompt of every text.
            negative_prompt: what `negative_image_embeds` are sampled for; as `__call__` says where it is empty.
        Returns:
            (num_images_per_prompt, dim) each.
        """
        if not images_and_prompts or len(images_and_prompts) != len(weights):
            sizes = f"images_and_prompts has {len(images_and_prompts)} entries and weights {len(weights)}"
            raise ValueError(f"{sizes}; they must be as many, and at least one")
        for weight in weights:
            check_number("weights", weight)
        steps = dict(eta=eta, solver=solver, spacing=spacing)
        options = dict(num_images_per_prompt=num_images_per_prompt, num_inference_steps=num_inference_steps)
        options |= dict(guidance_scale=guidance_scale, generator=generator, latents=latents, **steps)
        embeds = 0.0
        for given, weight in zip(images_and_prompts, weights):
            if isinstance(given, str):
                embed = self(given, negative_prior_prompt, **options).image_embeds
            elif len(embed := self.encode_image(given)) != 1:
                raise ValueError(f"images_and_prompts has an entry of {len(embed)} images; each must be one")
            embeds = embeds + embed.expand(num_images_per_prompt, -1) * weight
        if negative_prompt == "" and negative_prior_prompt is None and self.has("image_encoder"):
            # only the zero image is asked for; but the run that diffusers makes here moves the generator on
            noise = self.noise(num_images_per_prompt, self.prior.config["embedding_dim"], generator, self.dtype)
            table = self.schedule.table(num_inference_steps, **steps)
            for _ in range(sum(table.draws_noise) + (latents is None)):
                next(noise)
            return ImageEmbeddings(embeds, self.zero_embed().expand(num_images_per_prompt, -1))
        negative = self(negative_prompt, negative_prior_prompt, **options)
        return ImageEmbeddings(embeds, negative[1] if negative_prompt == "" else negative[0])

    def stats(self, bandwidth: float | None = None) -> dict[str, float]:
        """How the last 1000 calls went, and what a step takes: see `PriorSampler.stats`.

        Times are of the prefill and all steps, without encoders. Bytes and launches are those of the last run, and of
        its last part where it had more prompts than the largest batch size.
        """
        return self._engine.stats(self._steps, bandwidth)

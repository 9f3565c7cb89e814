"""Image embeddings of prompts from the folder of a diffusers pipeline (Kandinsky, Karlo, StableUnCLIP), without it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprior import buckets, model_state
from fastprior import quantise as quantisation
from fastprior.graphs import Clock, GraphCache, StepGraph
from fastprior.kernels import ops
from fastprior.pipeline_parts import Generators, PipelineParts, TextEncoding, listed
from fastprior.prior_blocks import HIDDEN, Lead, Prefix
from fastprior.sampler import Step, leads, run_table
from fastprior.solvers import StepTable

if TYPE_CHECKING:
    from fastprior.prior_forward import Conditioning
    from fastprior.prior_transformer import PriorTransformer

TABLE_STEPS = 64  # of which the lengths of step tables in graphs are multiples


class ImageEmbeddings(NamedTuple):
    """image_embeds (rows, dim), and negative_image_embeds of the same shape, None where nothing says what they are."""

    image_embeds: Tensor
    negative_image_embeds: Tensor | None


def update(
    pred: Tensor,
    null: Tensor | None,
    scale: Tensor,
    x: Tensor,
    x0: Tensor,
    noise: Tensor,
    rows: Tensor,
    index: Tensor,
    clamp: str | None,
    radius: float,
    uses_prediction: bool,
) -> tuple[Tensor, Tensor]:
    """`ops.diffusion_step` for predictions (rows, dim) with guidance, or without where null is None."""
    if uses_prediction:
        x0 = pred = (pred if null is None else torch.lerp(null, pred, scale)).to(x.dtype)
        null = None
    return ops.diffusion_step(x, pred, null, scale, x0, noise, rows, index, clamp, radius)


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
    given, null = torch.cat((x, x[:guided])) if guided else x, None
    pred = prior.step(given, index, cond)
    if guided:
        pred, null = pred.split((len(x), guided))
        null = torch.cat((null, pred[guided:]))
    return update(pred, null, scale, x, x0, noise, rows, index, clamp, radius, uses_prediction)


def _padded(prefix: Prefix, longest: int) -> Prefix:
    """With hidden tokens behind, to the nearest text length; there is always a mask then."""
    tokens = prefix.k.shape[3]
    missing = buckets.text_length(tokens, longest) - tokens
    k, v = (F.pad(t, (0, 0, 0, missing)) for t in (prefix.k, prefix.v))
    mask = k.new_zeros(k.shape[1], tokens, dtype=torch.float32) if prefix.mask is None else prefix.mask
    return prefix._replace(k=k, v=v, mask=F.pad(mask, (0, missing), value=HIDDEN))


def _padded_part(t: Tensor, part: slice, batch: int) -> Tensor:
    """A part of (groups, prompts, …), with zeros up to a batch size."""
    t, missing = t[:, part], batch - (part.stop - part.start)
    return F.pad(t, (0, 0) * (t.ndim - 2) + (0, missing)) if missing else t


def _lengths(mask: Tensor) -> list[int]:
    """Of texts, up to the last token that a mask (texts, tokens) shows. Raises ValueError as `prefill` does."""
    mask = mask.float()
    ends = ((mask > 0) * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(dim=1)
    lengths = ends.where(((mask >= 0) & (mask <= 1)).all(dim=1), -1).tolist()
    if min(lengths) < 0:
        raise ValueError("mask has values beyond 0 and 1; it must not")
    return lengths


class PriorPipeline(PipelineParts):
    """Sample CLIP image embeddings of prompts: what diffusers' prior pipelines give, for the same generator.

    The text is encoded once per different prompt, and its prefix computed once, however many images and steps there
    are. The state of a run is fp32 (or wider), whatever the dtype of the prior.

    Args:
        *args, **kwargs: see `PipelineParts`; the folder is of a Kandinsky prior, or a Karlo or StableUnCLIP pipeline.
        compile: use torch.compile for the steps. Each batch size, and each text length up to a multiple of 16 tokens,
            takes a graph of its own, as do other numbers of images and steps; the first call with it is slow.
        batch_sizes: numbers of prompts that compiled steps run, see `PriorSampler`.
        quantise: "int8" or "float8": steps read linears of 8 bits. The next call after each change of the weights
            compares embeddings of random texts first, and fails where they differ too much, see `PriorSampler`.
        graphs: capture prefill and step as CUDA graphs, by default on CUDA. Each batch size, text length up to a
            multiple of 16 tokens, number of images and kind of guidance takes graphs of its own, whatever solver and
            steps (up to 64). They are captured again for other weights or modules. Where a capture fails, a warning
            says why, and all runs go on without. Runs by graphs wait for each other, also those of other threads and
            streams, and draw all their noise before the first step.
        graph_memory: bytes that graphs may hold, without limit by default, see `PriorSampler`.

    Attributes:
        quality: with `quantise`, the median and the worst cosine that were found.
        graphs: as given; False after a capture that failed.
    """

    def __init__(
        self,
        *args: Any,
        compile: bool = False,
        batch_sizes: tuple[int, ...] = buckets.BATCH_SIZES,
        quantise: str | None = None,
        graphs: bool | None = None,
        graph_memory: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        quantisation.check(quantise)
        self.quantise, self.quality = quantise, None
        self.compile, self.batch_sizes = compile, buckets.check_batch_sizes(batch_sizes)
        if graphs and self.device.type != "cuda":
            raise ValueError(f"graphs=True; the prior is on {self.device}, and CUDA graphs need CUDA")
        self.graphs, self._graphs = graphs, GraphCache(graph_memory)
        self._lock, self._clock, self._state = threading.Lock(), Clock(self.device), None
        self._quantised: PriorTransformer | None = None
        self._compiled: dict[tuple, Callable] = {}
        self._table: tuple[tuple, StepTable | None] = (), None  # of the last run, and what it was made for

    def _compiled_for(self, *shapes: Any) -> Callable:
        """`guided_step` compiled for given shapes."""
        if shapes not in self._compiled:
            self._compiled[shapes] = buckets.compiled(guided_step)
        return self._compiled[shapes]

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
        return TextEncoding(*(torch.cat(tensors).to(self.device) for tensors in zip(*parts))), prompts, negatives

    def _check(self, name: str, text: TextEncoding) -> None:
        config, prompts = self.prior.config, len(text.embeds)
        length, dim = config["num_embeddings"], config["embedding_dim"]
        wanted = (prompts, config["embedding_proj_dim"] or dim), (prompts, length, dim), (prompts, length)
        for field, tensor, shape in zip(text._fields, text, wanted):
            if tensor.shape != shape or not prompts:
                raise ValueError(f"{name}.{field} has shape {tuple(tensor.shape)}; for this prior it must be {shape}")

    def _noised(self, table: StepTable, draw: Callable[[], Tensor], image: Any, rows: int, repeats: int) -> Tensor:
        """What a run from images, or their embeddings (images, dim), begins with."""
        embeds = image if torch.is_tensor(image) and image.ndim == 2 else self.encode_image(image)
        embeds = embeds.to(self.device).repeat_interleave(repeats, dim=0)
        if rows % len(embeds):
            images = len(embeds) // repeats
            raise ValueError(f"image has {images} images; the number of prompts must be a multiple of it")
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
        if zero_embed is not None and zero_embed.shape != (1, self.prior.config["embedding_dim"]):
            wanted = 1, self.prior.config["embedding_dim"]
            raise ValueError(f"zero_embed has shape {tuple(zero_embed.shape)}; it must be {wanted}")
        guidance, sample_negatives = guidance_scale > 1, negative_prompt is not None and zero_embed is None
        null_text = "" if guidance and negative_prompt is None else negative_prompt
        text, prompts, negatives = self._texts(prompt, null_text if guidance or sample_negatives else None)
        conditions = prompts + negatives if sample_negatives else prompts
        wanted = len(prompts) * num_images_per_prompt
        rows, guided = len(conditions) * num_images_per_prompt, wanted if guidance else 0
        asked = self.schedule, num_inference_steps, eta, 1.0 if image is None else strength
        made_for, table = self._table
        if made_for != asked:
            table = self.schedule.table(num_inference_steps, eta=eta, strength=asked[-1])
            self._table = asked, table

        dim = self.prior.config["embedding_dim"]
        draw = self.noise(rows, dim, generator, text.embeds.dtype)
        if image is None:
            x = self.pure_noise(table, draw, latents, (rows, dim))
        elif latents is None:
            x = self._noised(table, draw, image, rows, num_images_per_prompt)
        else:
            raise ValueError("latents and image were both given; a run begins with only one of them")
        prefixes = conditions + (negatives if guidance else [])
        x = self._run(table, text, prefixes, len(prompts), guided, guidance_scale, x, draw)
        embeds = self.prior.post_process_latents(x).to(text.embeds.dtype)
        if sample_negatives:
            return ImageEmbeddings(*embeds.split(wanted))
        if zero_embed is None and self.has("image_encoder"):
            zero_embed = self.zero_embed()
        return ImageEmbeddings(embeds, None if zero_embed is None else zero_embed.to(embeds).expand(wanted, -1))

    def _run(
        self,
        table: StepTable,
        text: TextEncoding,
        prefixes: list[int],
        prompts: int,
        guided: int,
        scale: float,
        x: Tensor,
        draw: Callable[[], Tensor],
    ) -> Tensor:
        """All steps from x, of rows of which `prefixes` are the texts: see `_step`."""
        given = table, text, prefixes, prompts, guided, scale
        if self.device.type == "cuda" if self.graphs is None else self.graphs:
            with self._lock:
                if self._clock.device != self.device:
                    self._clock.wait()
                    self._clock = Clock(self.device)
                with self._clock:
                    self._refresh()
                    return self._run_by_graphs(*given, x, draw)
        if self.quantise:
            with self._lock:
                self._refresh()
        samples = (len(x) + guided) // len(prefixes)
        return run_table(table, self._step(*given, samples, x.dtype), x, draw)

    def _refresh(self) -> None:
        """Drop what depends on weights or modules that are no more, and quantise those that are."""
        state = model_state.state(self.prior)
        if state is not self._state:
            self._clock.wait()
            self._graphs.clear()
            self._quantised = self._judged() if self.quantise else None
            self._state = state  # at last: nothing is served of what was not found good

    def _judged(self) -> PriorTransformer:
        """The prior quantised, if embeddings of random texts are those of the prior as it is."""
        twin, embeds = quantisation.quantised(self.prior, self.quantise), []
        config, draw = self.prior.config, torch.Generator().manual_seed(0)
        length, dim, count = config["num_embeddings"], config["embedding_dim"], 16
        shapes = (count, config["embedding_proj_dim"] or dim), (count, length, dim)
        lengths = torch.randint(1, length + 1, (count, 1), generator=draw)
        drawn = (torch.randn(shape, generator=draw) for shape in shapes)
        text = TextEncoding(*(t.to(self.device) for t in (*drawn, torch.arange(length) < lengths)))
        null, zero = TextEncoding(*(t[:1] for t in text)), torch.zeros(1, dim, device=self.device)
        for prior in (self.prior, twin):
            pipeline = PriorPipeline(self.prior, self.schedule, graphs=False)
            pipeline._quantised = prior
            noise = torch.Generator(self.device).manual_seed(0)
            embeds.append(pipeline(text, null, generator=noise, zero_embed=zero).image_embeds)
        self.quality = quantisation.judge(self.quantise, embeds[1], embeds[0])
        return twin

    def _run_by_graphs(
        self,
        table: StepTable,
        text: TextEncoding,
        prefixes: list[int],
        prompts: int,
        guided: int,
        scale: float,
        x: Tensor,
        draw: Callable[[], Tensor],
    ) -> Tensor:
        """`_run` in parts, one after the other. What waits for the device comes before the first of them."""
        lengths, missing = _lengths(text.mask), -len(table) % TABLE_STEPS
        times = F.pad(torch.tensor(table.times, dtype=torch.float32), (0, missing)).to(self.device)
        rows = F.pad(table.rows.to(x.dtype), (0, 0, 0, missing)).to(self.device)
        runs = []
        for part, batch in buckets.parts(self.batch_sizes, prompts):
            groups = [prefixes[at : at + prompts][part] for at in range(0, len(prefixes), prompts)]
            given = self._padded_texts(text, lengths, groups, batch) | dict(times=times, rows=rows)
            runs.append((part, batch, groups, given))
        shape = len(x) // prompts // (len(groups) - (guided > 0)), x.shape[1]  # of one prompt in one group
        states, results = [], []
        for part, batch, groups, given in runs:
            count = part.stop - part.start
            graph = self._graph(given, batch, shape[0], len(groups), guided > 0, x.dtype, table.uses_prediction)
            if graph is None:
                batch, chosen = count, [number for group in groups for number in group]
                step = self._step(table, text, chosen, count, guided // prompts * count, scale, shape[0], x.dtype)
            else:
                graph.begin(given, scale)
                step = graph.step
            if not states:  # all noise at once, for other parts have other rows of it
                noises = [draw() for drawn in table.draws_noise if drawn]
                states = [t.view(-1, prompts, *shape) for t in (x, *noises)]
            cut = (_padded_part(t, part, batch).reshape(-1, x.shape[1]) for t in states)
            result = run_table(table, step, next(cut), partial(next, cut))
            results.append(result.view(-1, batch, *shape)[:, :count].clone())  # it may be a buffer
        return torch.cat(results, dim=1).view_as(x)

    def _padded_texts(
        self, text: TextEncoding, lengths: list[int], groups: list[list[int]], batch: int
    ) -> dict[str, Tensor]:
        """The texts of groups of prompts, each once, and which of them each prompt is, in the shapes of a graph."""
        chosen = [number for group in groups for number in group + group[:1] * (batch - len(group))]
        kinds = {number: at for at, number in enumerate(dict.fromkeys(chosen))}
        # the prompts and one more text for all of them, or for each of them
        counts = [size + (len(groups) > 1) for size in self.batch_sizes if size <= batch]
        count = min(n for n in (*counts, batch * min(len(groups), 2)) if n >= len(kinds))
        numbers = [*kinds, *[chosen[0]] * (count - len(kinds))]
        longest = self.prior.config["num_embeddings"]
        tokens = buckets.text_length(max(lengths[number] for number in kinds) + 1, longest + 1) - 1
        index = torch.tensor(numbers, device=self.device)
        return dict(
            embeds=text.embeds[index].to(self.dtype),
            encodings=text.encodings[index, :tokens].to(self.dtype),
            mask=text.mask[index, :tokens].float(),
            prompts=torch.tensor([kinds[number] for number in chosen], device=self.device),
        )

    def _graph(
        self,
        given: dict[str, Tensor],
        batch: int,
        repeats: int,
        groups: int,
        guidance: bool,
        dtype: torch.dtype,
        uses_prediction: bool,
    ) -> StepGraph | None:
        """The graphs of runs of these shapes and kinds; None where there are none, see `GraphCache`."""
        fixed = self.schedule.clamp, self.schedule.radius, uses_prediction
        guided, rows = batch * repeats if guidance else 0, (groups - guidance) * batch * repeats
        kind = self.device.type
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        shapes = tuple(t.shape for t in given.values()), rows, guided, dtype
        key = *shapes, *fixed, self.dtype, ops.forced(), autocast

        def capture() -> StepGraph:
            prior, net = self.prior, self._quantised or self.prior
            run = self._compiled_for(*shapes) if self.compile else guided_step

            def prefill(given):
                text = given["embeds"], given["encodings"], given["mask"]
                return prior.padded_prefill(*text, given["times"], given["prompts"]), given["rows"]

            def step(cond, scale, x, x0, noise, index):
                return run(net, *cond, scale, x, x0, noise, index, guided, *fixed)

            shape = rows, self.prior.config["embedding_dim"]
            return StepGraph(prefill, step, given, shape, len(given["rows"]), dtype)

        graph = self._graphs.get(key, f"batch size {batch}", capture)
        if self._graphs.failed:
            self.graphs = False
        return graph

    def stats(self) -> dict[str, float]:
        """How the last 1000 calls that ran by graphs went, and what graphs hold.

        Returns:
            calls: how many.
            p50_ms, p99_ms: of all their steps and the prefill, without encoders, on CUDA as the device ran them.
            graphs, graph_bytes, evictions: shapes that are captured, the memory that they hold, and how often graphs
                were dropped for others.
        """
        with self._lock:
            return self._clock.stats() | self._graphs.stats()

    def _step(
        self,
        table: StepTable,
        text: TextEncoding,
        prefixes: list[int],
        prompts: int,
        guided: int,
        scale: float,
        samples: int,
        dtype: torch.dtype,
    ) -> Step:
        """The steps of a run of which `prefixes` are the texts, of as many rows each: those of all prompts, one group
        after the other."""
        times = torch.tensor(table.times, device=self.device)
        rows = table.rows.to(self.device, dtype)
        scale = torch.tensor(scale, dtype=dtype, device=self.device)
        indices = torch.arange(len(rows), device=self.device)
        fixed = self.schedule.clamp, self.schedule.radius, table.uses_prediction
        if self.compile:
            return self._compiled_step(text, prefixes, prompts, guided > 0, samples, times, rows, scale, indices, fixed)
        index = torch.tensor(prefixes, device=self.device)
        cond = self.prior.prefill(*(tensor[index] for tensor in text), times)  # runs the same prompts once
        cond = self._led(cond, samples * len(prefixes))
        run = partial(guided_step, self._quantised or self.prior, cond, rows, scale)
        return lambda x, x0, noise, index: run(x, x0, noise(), indices[index], guided, *fixed)

    def _led(self, cond: Conditioning, rows: int) -> Conditioning:
        """With the time tokens of all steps, where that pays for steps of as many rows; as graphs, on no GPU."""
        k, texts = cond.prefix.k, cond.prefix.texts
        if not k.is_cpu:
            return cond
        different = k.shape[1] if texts is None else int(texts.max()) + 1
        held = k[:, :1, :, 0].nbytes * 2 * different * len(cond.time_tokens)
        return self.prior.lead(cond) if leads(rows, different, 3, held, k.device) else cond

    def _compiled_step(self, text, prefixes, prompts, guidance, samples, times, rows, scale, indices, fixed) -> Step:
        """The same in parts of few shapes: each group of prompts is padded to a batch size, each text to a length."""
        cond = self.prior.prefill(*text, times)
        share = len(text.embeds) // cond.prefix.k.shape[1]  # texts of one prefix
        cond = cond._replace(prefix=_padded(cond.prefix, text.encodings.shape[1] + 1))
        cond = self._led(cond, samples * len(prefixes))
        (k, v, mask, texts), lead = cond.prefix, cond.lead
        groups = torch.tensor(prefixes, device=self.device).view(-1, prompts) // share
        parts = []
        for part, batch in buckets.parts(self.batch_sizes, prompts):
            missing = batch - (part.stop - part.start)
            chosen = F.pad(groups[:, part], (0, missing)).flatten()
            own = Prefix(k[:, chosen], v[:, chosen], mask[chosen])
            if lead is not None:
                cond = cond._replace(lead=Lead(lead.kv[:, :, :, chosen if texts is None else texts[chosen]]))
            parts.append((part, batch, missing, cond._replace(prefix=own)))

        def step(x, x0, noise, index):
            state = torch.stack((x, x0, noise())).view(3, len(groups) - guidance, prompts, -1)
            repeats, results = state.shape[-1] // x.shape[1], []
            for part, batch, missing, cond in parts:
                given = F.pad(state[:, :, part], (0, 0, 0, missing)).view(3, -1, x.shape[1])
                run = self._compiled_for(cond.prefix.k.shape, rows.shape, repeats, guidance, cond.lead is None)
                guided = batch * repeats if guidance else 0
                prior = self._quantised or self.prior
                result = torch.stack(run(prior, cond, rows, scale, *given, indices[index], guided, *fixed))
                results.append(result.view(2, -1, batch, state.shape[-1])[:, :, : batch - missing])
            return torch.cat(results, dim=2).view(2, *x.shape).unbind()

        return step

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
        negative_prior_prompt: str | None = None,
        negative_prompt: str = "",
    ) -> ImageEmbeddings:
        """The weighted sum of the embeddings of texts and images.

        Args:
            images_and_prompts: texts, PIL images, or preprocessed pixels (1, 3, height, width).
            weights: one for each.
            num_images_per_prompt, num_inference_steps, guidance_scale, generator, latents, eta: of each text, see
                `__call__`. Texts are sampled one after the other, from one generator.
            negative_prior_prompt: the negative prompt of every text.
            negative_prompt: what `negative_image_embeds` are sampled for; as `__call__` says where it is empty.
        Returns:
            (num_images_per_prompt, dim) each.
        """
        if not images_and_prompts or len(images_and_prompts) != len(weights):
            sizes = f"images_and_prompts has {len(images_and_prompts)} entries and weights {len(weights)}"
            raise ValueError(f"{sizes}; they must be as many, and at least one")
        options = dict(num_images_per_prompt=num_images_per_prompt, num_inference_steps=num_inference_steps)
        options |= dict(guidance_scale=guidance_scale, generator=generator, latents=latents, eta=eta)
        embeds = 0.0
        for given, weight in zip(images_and_prompts, weights):
            if isinstance(given, str):
                embed = self(given, negative_prior_prompt, **options).image_embeds
            elif len(embed := self.encode_image(given)) != 1:
                raise ValueError(f"images_and_prompts has an entry of {len(embed)} images; each must be one")
            embeds = embeds + embed.expand(num_images_per_prompt, -1) * weight
        if negative_prompt == "" and negative_prior_prompt is None and self.has("image_encoder"):
            # only the zero image is asked for; but the run that diffusers makes here moves the generator on
            draw = self.noise(num_images_per_prompt, self.prior.config["embedding_dim"], generator, self.dtype)
            table = self.schedule.table(num_inference_steps, eta=eta)
            for _ in range(sum(table.draws_noise) + (latents is None)):
                draw()
            return ImageEmbeddings(embeds, self.zero_embed().expand(num_images_per_prompt, -1))
        negative = self(negative_prompt, negative_prior_prompt, **options)
        return ImageEmbeddings(embeds, negative[1] if negative_prompt == "" else negative[0])

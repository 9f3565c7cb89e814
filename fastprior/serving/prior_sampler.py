"""Sampling in production: a sampler built once, for given batch sizes, solver, steps and dtype."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprior.batches import map_rows
from fastprior.draws import drawing
from fastprior.engine import shapes
from fastprior.engine.clock import Clock
from fastprior.engine.graphs import GraphCache, StepGraph, settings
from fastprior.engine.step_cost import CountLaunches, StepReads, step_reads, step_seconds
from fastprior.kernels import ops
from fastprior.kernels.cpu import huge_pages
from fastprior.models import quantise as quantisation
from fastprior.models import snapshot
from fastprior.models.dalle2.network import DiffusionPriorNetwork
from fastprior.prior.diffusion_prior import DiffusionPrior
from fastprior.prior.loop import denoise_step, prefill, prepare_run, run_steps, step_inputs
from fastprior.prior.plan import network_obstacles
from fastprior.serving import quality


class PriorSampler:
    """Sample from a prior at low latency: everything that does not depend on the prompt is done before the first call.

    Prompts are padded to the nearest of `batch_sizes`, which changes no row's result, and more prompts than the largest
    run in parts. One compiled graph per batch size serves every prompt, seed and `cond_scale`. A change of the prior's
    weights is noticed at the next call and served from then on. Calls from several threads run one after the other, and
    on CUDA in the order of the calls, whatever their streams.

    With torch 2.11 what other threads of yours draw from the device's default generator while graphs are captured fails
    (what fastprior draws waits): call `warmup` before they begin, or draw from generators of your own.

    Args:
        prior: in eval mode, with a network that can be cached (see `prior.sampling_plan`).
        batch_sizes: numbers of prompts to prepare for.
        samples_per_prompt: candidates per prompt, of which the one most similar to the text embedding is returned.
        timesteps, solver, eta: see `DiffusionPrior.p_sample_loop`; timesteps defaults to `prior.sample_timesteps`.
        guidance: prepare for a `cond_scale` other than 1; by default where the prior was trained for it.
        dtype: run the network in this dtype; with another than its own, on a copy. State and schedule stay fp32.
        quantise: "int8" or "float8": every step reads linears of 8 bits, with a scale for each row; the prefill does
            not. On the CPU int8 pays for steps of up to 6 tokens, float8 does not. Building fails where embeddings
            differ too much from those of the prior as it is: over 16 prompts, without guidance and (where prepared for)
            with a scale of 3, their cosine must be 0.999 in the median and 0.995 at worst.
        quality_prompts: `text_embed` and `text_encodings` of other prompts to judge that by, better than random ones.
        compile: use torch.compile; off, the same steps run eagerly. Steps that are calls of C need neither.
        graphs: capture prefill and step of each batch size as CUDA graphs, by default on CUDA. Where a capture fails, a
            warning says why, and all runs go on without.
        graph_memory: bytes that graphs may hold; without limit by default. A capture that takes them over it drops
            those of the batch sizes that were not used for longest, which are captured again when they are needed. One
            batch size that takes more alone runs without, with a warning.

    Attributes:
        graphs: whether CUDA graphs are used.
        quality: with `quantise`, the median and the worst cosine that were found.

    Raises:
        ValueError: where the prior cannot be cached, with the reasons, or an argument does not fit.
    """

    def __init__(
        self,
        prior: DiffusionPrior,
        *,
        batch_sizes: tuple[int, ...] = shapes.BATCH_SIZES,
        samples_per_prompt: int = 1,
        timesteps: int | None = None,
        solver: str | None = None,
        eta: float | None = None,
        guidance: bool | None = None,
        dtype: torch.dtype | None = None,
        quantise: str | None = None,
        quality_prompts: Mapping[str, Tensor] | None = None,
        compile: bool = True,
        graphs: bool | None = None,
        graph_memory: int | None = None,
    ):
        self.batch_sizes = shapes.check_batch_sizes(batch_sizes)
        self.graph_memory, self._graphs = graph_memory, GraphCache(graph_memory)  # by batch size
        prior.check_best_of(samples_per_prompt, "samples_per_prompt")
        if dtype not in (None, torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise ValueError(f"dtype={dtype}; it must be a floating point dtype of 16 bits or more")
        if not isinstance(prior.net, DiffusionPriorNetwork):
            kind = type(prior.net).__name__
            raise ValueError(f"this prior cannot be served by PriorSampler: net is a {kind}, no DiffusionPriorNetwork")
        timesteps = prior.sample_timesteps if timesteps is None else timesteps
        self.guidance = prior.can_classifier_guidance if guidance is None else guidance
        # any scale but 1 stands for all of them: the scale is an input of the graph
        self.plan = prior.sampling_plan(timesteps, 2.0 if self.guidance else 1.0, solver, eta)
        if self.plan.path != "cached":
            raise ValueError(f"this prior cannot be served by PriorSampler: {'; '.join(self.plan.reasons)}")
        self.prior, self.samples_per_prompt = prior, samples_per_prompt
        self.dtype, self.compile = dtype or prior.net.learned_query.dtype, compile
        self.graphs = prior.device.type == "cuda" if graphs is None else graphs
        if self.graphs and prior.device.type != "cuda":
            raise ValueError(f"graphs=True; the prior is on {prior.device}, and CUDA graphs need CUDA")
        quantisation.check(quantise)
        self.quantise, self._quality_prompts, self.quality = quantise, quality_prompts, None
        self._lock = threading.Lock()
        self._modules: list | None = None
        self._state: snapshot.State | None = None
        self._reads: dict[int, StepReads] = {}
        self._launched: dict[int, int] = {}
        self._clock = Clock(prior.device)
        self._timesteps, self._eta = timesteps, {} if eta is None else dict(eta=eta)
        if quantise:
            with self._lock:
                self._refresh()

    @torch.no_grad()
    def _refresh(self) -> None:
        """(Re)build what depends on the network: all of it for other modules or hooks, the tables for other weights."""
        own = self.prior.net
        if self.prior.device != self._clock.device:
            raise ValueError(f"the prior is on {self.prior.device}; it must be where it was, on {self._clock.device}")
        state = snapshot.state(own)
        if state is self._state:
            return
        modules = [(id(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in own.modules()]
        modules.append(own.learned_query.dtype)
        if self.quantise:  # its network shares the other parameters
            modules += [(id(p), p.device, p.dtype) for p in own.parameters()]
        try:
            if modules != self._modules:
                if found := network_obstacles(own):
                    raise ValueError(f"the prior's network was changed, and cannot be served: {'; '.join(found)}")
                self._modules, self._steps = modules, {}
                self._net = own if own.learned_query.dtype == self.dtype else copy.deepcopy(own).to(self.dtype)
                self._step_net = quantisation.quantised(self._net, self.quantise) if self.quantise else self._net
                self._reads, self._launched = {}, {}
                self._graphs.too_large.clear()
            if self._net is not own:
                self._net.load_state_dict(own.state_dict())  # in place: compiled steps stay as they are
            self._clock.wait()
            self._graphs.clear()  # they hold addresses of weights and tables
            self._times, self._null_preds, self._rows = step_inputs(self._net, self.plan)
            self._indices = torch.arange(len(self._rows), device=self._rows.device)
            if self.quantise:
                quantisation.update(self._step_net)
                self._judge()
            weights = *self._net.parameters(), *self._step_net.buffers()  # those that are quantised
            huge_pages.collapse(weights)  # now, not in the second call
            self._state = state
        except BaseException:
            self._modules = self._state = None  # nothing is served that was not built to its end, or not found good
            raise

    def _judge(self) -> None:
        """Compare embeddings of the quantised network with those of the prior as it is, with the same noise."""
        given = self._quality_prompts or quality.random_prompts(self.prior.net)
        if not self.prior.condition_on_text_encodings:
            given = dict(text_embed=given["text_embed"])
        text_cond = self.prior.text_condition(None, **given)
        shape = len(text_cond["text_embed"]) * self.samples_per_prompt, self.prior.image_embed_dim
        self.prior.check_text_condition(shape, text_cond)
        got, wanted = [], []
        for scale in (1.0, 3.0)[: 1 + self.guidance]:
            draws = [torch.Generator(self.prior.device).manual_seed(0) for _ in range(2)]
            got.append(self.prior.denormalize(self._sample(text_cond, scale, draws[0])))
            wanted.append(
                self.prior.p_sample_loop(
                    shape, text_cond, scale, self._timesteps, solver=self.plan.table.solver, generator=draws[1],
                    progress=False, **self._eta,
                )
            )  # fmt: skip
        self.quality = quality.judge(self.quantise, torch.cat(got), torch.cat(wanted))

    def _step(self, batch: int):
        """`denoise_step` of this network, compiled for one batch size."""
        if batch not in self._steps:
            net, clamp, radius = self._step_net, self.plan.clamp, self.plan.radius

            def step(cond, null_preds, rows, cond_scale, x, x0, noise, index):
                return denoise_step(net, cond, null_preds, rows, cond_scale, x, x0, noise, index, clamp, radius)

            if self.compile:
                # modules and weights are watched in _refresh: no need to check several hundred guards at every step
                options = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
                step = shapes.compiled(step, options=options)
            self._steps[batch] = step
        return self._steps[batch]

    def _padded(self, text_cond: dict, batch: int) -> dict:
        """A text condition with rows up to a batch size; for graphs also of full length, and with every condition."""
        padding = batch - len(text_cond["text_embed"])
        if padding:
            text_cond = map_rows(text_cond, lambda t: F.pad(t, (0, 0) * (t.ndim - 1) + (0, padding)))
        padded = dict(text_cond)
        if not self.graphs:
            return padded
        if "text_encodings" in padded:
            encodings = padded["text_encodings"][:, : self._net.max_text_len]
            padded["text_encodings"] = F.pad(encodings, (0, 0, 0, self._net.max_text_len - encodings.shape[1]))
        if self._net.conditions is not None:
            missing = self._net.conditions.missing(batch, self.prior.device)
            padded["conditions"] = missing | padded.get("conditions", {})
        return padded

    def _example(self, batch: int) -> dict:
        """A text condition of the shapes that graphs take."""
        like = dict(device=self.prior.device, dtype=self._net.stream_dtype)
        example = dict(text_embed=torch.zeros(batch, self._net.text_embed_dim, **like))
        if self.prior.condition_on_text_encodings:
            example["text_encodings"] = torch.zeros(batch, 0, self._net.text_dim, **like)
        return self._padded(example, batch)

    def _graph(self, batch: int) -> StepGraph | None:
        """The graphs of a batch size; None where they cannot be captured, or there is no memory for them."""
        key = batch, settings(self.prior.device)
        graph = self._graphs.get(key, f"batch size {batch}", lambda: self._capture(batch))
        self.graphs = not self._graphs.failed
        return graph

    def _capture(self, batch: int) -> StepGraph:
        net, compiled = self._net, self._step(batch)

        def step(cond, scale, x, x0, noise, index):
            return compiled(cond, self._null_preds, self._rows, scale, x, x0, noise, index)

        return StepGraph(
            lambda text_cond: prefill(net, self.plan, text_cond, self._times, self.samples_per_prompt),
            step,
            self._example(batch),
            (batch * self.samples_per_prompt, self.prior.image_embed_dim),
            len(self.plan.table),
        )

    @torch.no_grad()
    def _launches(self, batch: int) -> int:
        """Kernels of a step, without torch.compile; traced without running anything."""
        from torch._subclasses.fake_tensor import FakeTensorMode

        if not ops.on_triton(self._rows):
            return 0
        with FakeTensorMode(allow_non_fake_inputs=True), CountLaunches() as launches:
            cond = prefill(self._net, self.plan, self._example(batch), self._times, self.samples_per_prompt)
            shape = batch * self.samples_per_prompt, self.prior.image_embed_dim
            x, scale = torch.zeros(shape, device=self.prior.device), torch.ones((), device=self.prior.device)
            fixed = self._step_net, cond, self._null_preds, self._rows, scale
            for _ in range(2):  # what the first clears is cleared
                launches.names.clear()
                denoise_step(*fixed, x, x, x, self._indices[0], self.plan.clamp, self.plan.radius)
        return launches.count

    def stats(self, bandwidth: float | None = None) -> dict[str, float]:
        """How the last 1000 calls went, and what a step takes.

        Args:
            bandwidth: bytes per second that the device reads, such as `serving.measure.read_bandwidth` measures.
        Returns:
            calls: how many.
            p50_ms, p99_ms: of whole calls, on CUDA as the device ran them.
            weight_bytes, prefix_bytes, table_bytes: what a step reads, see `StepReads`; as the next two for the largest
                batch size that ran, and 0 before one did.
            launches, run_launches: kernels of a step, and of the steps of a run: ours and PyTorch's, of which
                torch.compile fuses some. 0 on the CPU, where there are calls, such as one of C for all blocks.
            graphs, graph_bytes, evictions: captured batch sizes, the memory that they hold, and how often graphs were
                dropped for others, see `graph_memory`.
            floor_share: with `bandwidth`, the part of the calls' time that all the reads of their steps take at it.
            modelled_step_ms: with `bandwidth`, see `fastprior.engine.step_cost.step_seconds`.
        """
        with self._lock:
            times, read = self._clock.milliseconds(), self._clock.read_bytes()
            batch, launched = max(self._reads, default=0), self._launched
            reads = self._reads.get(batch, StepReads(0, 0, 0))
            stats = dict(
                **self._clock.stats(),
                weight_bytes=reads.weights,
                prefix_bytes=reads.prefix,
                table_bytes=reads.tables,
                **self._graphs.stats(),
            )
        if batch and batch not in launched:  # half a second, for which no call should wait
            launched[batch] = self._launches(batch)
        launches = launched.get(batch, 0)
        stats |= dict(launches=launches, run_launches=launches * len(self.plan.table))
        if bandwidth is not None:
            stats["floor_share"] = read / bandwidth / (sum(times) / 1e3) if times else float("nan")
            stats["modelled_step_ms"] = step_seconds(sum(reads), bandwidth, launches) * 1e3
        return stats

    def warmup(self) -> dict[int, float]:
        """Compile and run every batch size once: {batch size: seconds}."""
        seconds = {}
        for batch in self.batch_sizes:
            start = time.perf_counter()
            net, like = self.prior.net, dict(device=self.prior.device)
            text = F.normalize(torch.ones(batch, net.text_embed_dim, **like), dim=-1)
            encodings = torch.ones(batch, 1, net.text_dim, **like) if self.prior.condition_on_text_encodings else None
            # a generator of its own: warming up must not move the global one
            self(text, encodings, generator=torch.Generator(self.prior.device).manual_seed(0))
            seconds[batch] = time.perf_counter() - start
        return seconds

    @torch.no_grad()
    def __call__(
        self,
        text_embed: Tensor,
        text_encodings: Tensor | None = None,
        *,
        conditions: dict[str, Tensor] | None = None,
        cond_scale: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Sample.

        Args:
            text_embed: (prompts, dim), on the prior's device.
            text_encodings: (prompts, length, dim), all-zero rows are padding; required by priors conditioned on it.
            conditions: values of the extra conditions, (prompts,) or (prompts, size); those left out are missing.
            cond_scale: classifier-free guidance; other than 1 needs a sampler built with `guidance`.
            generator: on the prior's device; the global one by default. A seed means the same as in `prior.sample`.
        Returns:
            (prompts, dim), not scaled.
        """
        if cond_scale != 1 and not self.guidance:
            raise ValueError(f"cond_scale={cond_scale}; this sampler was built with guidance=False, so it must be 1")
        text_cond = self.prior.text_condition(None, text_embed, text_encodings, conditions=conditions)
        prompts, repeats = len(text_embed), self.samples_per_prompt
        self.prior.check_text_condition((prompts * repeats, self.prior.image_embed_dim), text_cond)
        with self._lock, self._clock, ops.sharing():
            self._refresh()
            embeds = self._sample(text_cond, cond_scale, generator)
        return self.prior.best_of(self.prior.denormalize(embeds).view(prompts, repeats, -1), text_embed)

    def _sample(self, text_cond: dict, cond_scale: float, generator: torch.Generator | None) -> Tensor:
        """All candidates, (prompts * samples_per_prompt, dim), scaled, in parts of the largest batch size."""
        prompts, repeats = len(text_cond["text_embed"]), self.samples_per_prompt
        scale = torch.tensor(cond_scale, dtype=torch.float32, device=self.prior.device)
        shape = prompts * repeats, self.prior.image_embed_dim
        draws = self._draws(shape, generator, keep=prompts > self.batch_sizes[-1])
        embeds = [
            self._run(map_rows(text_cond, lambda t, part=part: t[part]), batch, scale, draws, part.start * repeats)
            for part, batch in shapes.parts(self.batch_sizes, prompts)
        ]
        return torch.cat(embeds)

    def _draws(self, shape: tuple[int, int], generator: torch.Generator | None, keep: bool):
        """The run's noise tensors by number; kept where several parts of the batch need rows of the same tensor."""
        kept: list[Tensor] = []

        def draw(number: int) -> Tensor:
            if number < len(kept):
                return kept[number]
            with drawing(self.prior.device, generator):
                noise = torch.randn(shape, device=self.prior.device, generator=generator)
            if keep:
                kept.append(noise)
            return noise

        return draw

    def _run(self, text_cond: dict, batch: int, scale: Tensor, draws, first_row: int) -> Tensor:
        """Run one part of the prompts, padded to a batch size: its (rows, dim) scaled embeddings."""
        rows = len(text_cond["text_embed"]) * self.samples_per_prompt
        graph = self._graph(batch) if self.graphs else None
        padded = self._padded(text_cond, batch)
        numbers, padding = iter(range(len(self.plan.table) + 1)), batch * self.samples_per_prompt - rows

        def draw() -> Tensor:
            noise = draws(next(numbers))[first_row : first_row + rows]
            return F.pad(noise, (0, 0, 0, padding)) if padding else noise

        if graph is not None:
            graph.begin(padded, scale)
            cond, step = graph.cond, graph.step
        else:
            cond = prefill(self._net, self.plan, padded, self._times, self.samples_per_prompt)
            cond = self._step_net.prepare(cond) if self.quantise else cond
            tables = self._null_preds, self._rows
            step = prepare_run(self._step_net, self.plan, cond, *tables, scale.item(), batch * self.samples_per_prompt)
            if step is None:
                compiled = self._step(batch)

                def step(x, x0, noise, index):
                    return compiled(cond, *tables, scale, x, x0, noise(), self._indices[index])

        if batch not in self._reads:
            self._reads[batch] = step_reads(self._step_net, cond, self._null_preds, self._rows)
        self._clock.read += sum(self._reads[batch]) * len(self.plan.table)
        return run_steps(self.prior, self.plan.table, step, draw)[:rows].clone()

"""Sampling in production: a sampler built once, for given batch sizes, solver, steps and dtype."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprior.batches import map_rows
from fastprior.checkpoints.for_serving import Weights, of_prior
from fastprior.checks import check_count, check_number
from fastprior.diffusion.learned_tables import LearnedTable
from fastprior.engine.engine import Engine
from fastprior.engine.graphs import StepGraph
from fastprior.engine.runs import Run
from fastprior.engine.shapes import BATCH_SIZES
from fastprior.engine.steps import Generators, Noise, Step, StepInputs, bind, run_parts
from fastprior.kernels import ops
from fastprior.models import patches, quality, snapshot
from fastprior.models.dalle2.network import DiffusionPriorNetwork
from fastprior.models.quantise import check as check_quantise
from fastprior.models.quantise import quantised, update
from fastprior.models.weight_lock import lock_of, weights_locked
from fastprior.prior.diffusion_prior import DiffusionPrior
from fastprior.prior.learned import check_weights, scales_of
from fastprior.prior.loop import CachedSteps, network_reads, run_prior
from fastprior.prior.plan import network_obstacles

EVALUATIONS = 16  # by default: the fewest that cost nothing beside 64-step DDIM, see docs/fewer-evaluations.md


def _generators(given: Generators | Sequence[int], device: torch.device) -> Generators:
    """Generators of noise, of which seeds in a list become some."""
    if not isinstance(given, (list, tuple)):
        return given
    made = [one if isinstance(one, torch.Generator) else torch.Generator(device) for one in given]
    for generator, seed in zip(made, given):
        if generator is not seed:
            check_count("generator", seed, least=-(2**63), most=2**64 - 1)
            generator.manual_seed(seed)
    return made


def default_run(
    prior: DiffusionPrior, timesteps: int | None, solver: str | None, spacing: str | None, eta: float | None
) -> tuple[int, str | None, str | None, float | None]:
    """Timesteps, solver, spacing and eta of a run in production, of those that are given: see `PriorSampler`."""
    if timesteps is solver is spacing is eta is None:
        timesteps, solver, spacing = min(EVALUATIONS, prior.noise_scheduler.num_timesteps), "sde-dpm++", "logsnr"
    return prior.sample_timesteps if timesteps is None else timesteps, solver, spacing, eta


class PriorSampler:
    """Sample from a prior at low latency: everything that does not depend on the prompt is done before the first call.

    Where steps are compiled or captured, prompts are padded to the nearest of `batch_sizes`, which changes no row's
    result; more than the largest run in parts. One compiled graph per batch size serves every prompt, seed and
    `cond_scale`. A change of the prior's weights is served from the next call on; `update` makes one while others call.
    Calls from several threads run one after the other, on CUDA in the order of the calls, whatever their streams.

    With torch 2.11 what other threads of yours draw from the device's default generator while graphs are captured fails
    (what fastprior draws waits): call `warmup` before they begin, or draw from generators of your own.

    Args:
        prior: in eval mode, with a network that can be cached (see `prior.sampling_plan`).
        batch_sizes: numbers of prompts to prepare for.
        samples_per_prompt: candidates per prompt, of which the one most similar to the text embedding is returned.
        timesteps, solver, spacing, eta: see `DiffusionPrior.p_sample_loop`. Where none is given, EVALUATIONS steps (or
            all that the schedule has) of "sde-dpm++" at "logsnr" times. Where one is, the others default as they do
            there, and timesteps to `prior.sample_timesteps`: `timesteps` alone is DDIM, or DDPM where it is all.
        guidance: prepare for a `cond_scale` other than 1; by default where the prior was trained for it.
        dtype: run the network in this dtype; with another than its own, on a copy. State and schedule stay fp32.
        quantise: "int8" or "float8": every step reads linears of 8 bits, with a scale for each row; the prefill does
            not. On the CPU int8 pays for steps of up to 6 tokens, float8 does not. Building fails where embeddings
            differ too much from those of the prior as it is: over 16 prompts, without guidance and (where prepared for)
            with a scale of 3, their cosine must be 0.999 in the median and 0.995 at worst.
        quality_prompts: `text_embed` and `text_encodings` of other prompts to judge that by, better than random ones.
        compile: use torch.compile, by default where it has the compiler that it needs; off, the same steps run eagerly.
            Steps that are calls of C need neither.
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
        batch_sizes: tuple[int, ...] = BATCH_SIZES,
        samples_per_prompt: int = 1,
        timesteps: int | None = None,
        solver: str | None = None,
        spacing: str | None = None,
        eta: float | None = None,
        guidance: bool | None = None,
        dtype: torch.dtype | None = None,
        quantise: str | None = None,
        quality_prompts: Mapping[str, Tensor] | None = None,
        compile: bool | None = None,
        graphs: bool | None = None,
        graph_memory: int | None = None,
    ):
        self._engine = Engine(prior.device, batch_sizes, compile=compile, graphs=graphs, graph_memory=graph_memory)
        self.batch_sizes, self.compile, self.graph_memory = self._engine.batch_sizes, compile, graph_memory
        prior.check_best_of(samples_per_prompt, "samples_per_prompt")
        if dtype not in (None, torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise ValueError(f"dtype={dtype}; it must be a floating point dtype of 16 bits or more")
        if not isinstance(prior.net, DiffusionPriorNetwork):
            kind = type(prior.net).__name__
            raise ValueError(f"this prior cannot be served by PriorSampler: net is a {kind}, no DiffusionPriorNetwork")
        timesteps, solver, spacing, eta = default_run(prior, timesteps, solver, spacing, eta)
        scales = scales_of(prior, solver, timesteps)
        guided = [scale for scale in scales if scale != 1]
        self.guidance = prior.can_classifier_guidance and bool(guided) if guidance is None else guidance
        # any scale but 1 stands for all of them: the scale is an input of the graph
        self._scales = scales if self.guidance else (1.0,)
        scale = (*guided, 2.0)[0] if self.guidance else 1.0
        self.plan = prior.sampling_plan(timesteps, scale, solver, eta, spacing=spacing)
        if self.plan.path != "cached":
            raise ValueError(f"this prior cannot be served by PriorSampler: {'; '.join(self.plan.reasons)}")
        self.prior, self.samples_per_prompt = prior, samples_per_prompt
        self.dtype = dtype or prior.net.learned_query.dtype
        check_quantise(quantise)
        self.quantise, self._quality_prompts, self.quality = quantise, quality_prompts, None
        self._modules: list | None = None
        self._fixed: set[int] = set()  # batch sizes whose steps are compiled, for that many prompts
        steps = dict(timesteps=timesteps, solver=self.plan.table.solver, spacing=spacing, eta=eta)
        self._run_options = {name: value for name, value in steps.items() if value is not None}
        if quantise:
            with lock_of(prior), self._engine.lock, torch.no_grad(), snapshot.running(prior.net):
                self._engine.refresh(prior.net, self._build)

    def __getstate__(self) -> dict:
        """What the first call of a copy, or of what is unpickled, does not build again of its own prior."""
        built = "_net", "_step_net", "_steps"
        state = {name: value for name, value in vars(self).items() if name not in built}
        return state | dict(_modules=None, _engine=copy.copy(self._engine))

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._engine.clock.device = self.prior.device  # where a pickle's tensors were put

    @property
    def graphs(self) -> bool:
        return self._engine.replays

    @graphs.setter
    def graphs(self, wanted: bool) -> None:
        self._engine.graphs = wanted

    def _build(self, judged: quality.Quality | None = None) -> None:
        """(Re)build what depends on the network: all of it for other modules or hooks, the tables for other weights.

        Quantised weights are judged, unless they were.
        """
        check_weights(self.prior, self.plan.table)
        given, own = self.prior.net, snapshot.held(self.prior.net)
        modules: list = [
            (id(m), type(m), type(m).forward, "forward" in vars(m), len(m._forward_hooks), len(m._forward_pre_hooks))
            for m in given.modules()
        ]
        modules += id(own), own.learned_query.dtype, patches.found()
        if self.quantise:  # its network shares the other parameters
            modules += [(id(p), p.device, p.dtype) for p in own.parameters()]
        if modules != self._modules:
            self._modules = None
            if found := network_obstacles(given):
                raise ValueError(f"the prior's network was changed, and cannot be served: {'; '.join(found)}")
            self._net = own if own.learned_query.dtype == self.dtype else copy.deepcopy(own).to(self.dtype)
            self._step_net = quantised(self._net, self.quantise) if self.quantise else self._net
            self._engine.forget_steps()
            self._fixed.clear()
        if self._net is not own:
            for tensors in (nn.Module.parameters, nn.Module.buffers):
                for copied, weight in zip(tensors(self._net), tensors(own)):
                    copied.copy_(weight.data)  # in place: compiled steps stay as they are
        state = snapshot.state(given)
        state.settled = True  # below
        for twin in {self._net, self._step_net} - {own}:
            state.add_twin(twin)
        with torch.autocast(self.prior.device.type, enabled=False):  # that of the call that builds is not every call's
            self._steps = CachedSteps(self._net, self.plan, self._step_net)
        if self.quantise:
            update(self._step_net)
            self.quality = judged or self._judge()
        ops.to_huge_pages((*self._net.parameters(), *self._step_net.buffers()))  # now, not in the second call
        self._modules = modules

    def _judge(self) -> quality.Quality:
        """Compare embeddings of the quantised network with those of the prior as it is, with the same noise."""
        prompts = self._quality_prompts or quality.random_prompts(self.prior.net)
        text_cond = self.prior.text_condition(None, **dict(text_encodings=None) | dict(prompts))
        shape = len(text_cond["text_embed"]) * self.samples_per_prompt, self.prior.image_embed_dim
        self.prior.check_text_condition(shape, text_cond)
        got, wanted = [], []
        for scale in self._scales:
            draw, other = (torch.Generator(self.prior.device).manual_seed(0) for _ in range(2))
            got.append(self.prior.denormalize(self._sample(text_cond, [scale] * len(text_cond["text_embed"]), draw)))
            run = shape, text_cond, scale
            wanted.append(self.prior.p_sample_loop(*run, generator=other, progress=False, **self._run_options))
        return quality.judge(self.quantise, torch.cat(got), torch.cat(wanted))

    @torch.no_grad()
    def update(self, weights: Weights) -> None:
        """Serve other weights from the next call on, while other threads call: each call has the old or the new ones.

        They are loaded into the prior, so that all else that holds it has them too. Calls in progress end before. With
        `quantise` they are judged first, beside those that serve on meanwhile.

        Args:
            weights: a state dict of the prior or of its network; a prior that was built as this one; or the path of
                one, see `fastprior.load`. Weights of a CLIP are left out.
        Raises:
            ValueError: they do not fit, are not finite, lose too much when quantised, or are others than those that the
                table of solver="learned" was learned for. Nothing has changed then.
            FileNotFoundError: there is no such file.
        """
        prior, judged = self.prior, None
        fitting = of_prior(prior, weights)
        check_weights(prior, self.plan.table, fitting)
        if self.quantise:
            with lock_of(prior):
                twin = copy.deepcopy(prior, {id(prior.clip): prior.clip})
            twin.net.load_state_dict(fitting)
            shapes = dict(batch_sizes=self.batch_sizes, samples_per_prompt=self.samples_per_prompt, dtype=self.dtype)
            judging = dict(quantise=self.quantise, quality_prompts=self._quality_prompts, guidance=self.guidance)
            judged = PriorSampler(twin, **self._run_options, **shapes, **judging, compile=False, graphs=False).quality
        with weights_locked(prior):
            prior.net.load_state_dict(fitting)
            if judged:
                with self._engine.lock, snapshot.running(prior.net):
                    self._engine.refresh(prior.net, partial(self._build, judged))

    def _padded(self, text_cond: dict, batch: int) -> dict:
        """A text condition with rows up to a batch size; for graphs also of full length, and with every condition."""
        missing = batch - len(text_cond["text_embed"])
        if missing:
            text_cond = map_rows(text_cond, lambda t: F.pad(t, (0, 0) * (t.ndim - 1) + (0, missing)))
        if not self.graphs:
            return text_cond
        net, longest, conditions = self._net, self._net.max_text_len, text_cond.get("conditions", {})
        padded = {name: t.to(net.stream_dtype) for name, t in text_cond.items() if torch.is_tensor(t)}
        if "text_encodings" in padded:
            encodings = padded["text_encodings"][:, :longest]
            padded["text_encodings"] = F.pad(encodings, (0, 0, 0, longest - encodings.shape[1]))
        if net.conditions is not None:
            missing = net.conditions.missing(batch, self.prior.device)
            padded["conditions"] = {name: conditions.get(name, t).to(t.dtype) for name, t in missing.items()}
        return padded

    def _step(self, batch: int):
        # modules and weights are watched in `refresh`: no need to check several hundred guards at every step
        options = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
        return self._engine.step(self._step_net, batch, self._steps.step, options=options)

    def _graph(self, batch: int, padded: dict) -> StepGraph | None:
        """Find or capture the graphs of a batch size; None where that fails, or there is no memory for them."""
        steps, repeats = self._steps, self.samples_per_prompt
        prefill, shape = (lambda text_cond: steps.prefill(text_cond, repeats)), (batch * repeats, self._net.dim)
        run = partial(steps.run, cond_scale=1.0, samples=shape[0])
        options = dict(run=run, scales=True)
        what = partial(StepGraph, prefill, self._step(batch), padded, shape, len(self.plan.table.times), **options)
        return self._engine.graph(self._engine.key(batch), f"batch size {batch}", what)

    def stats(self, bandwidth: float | None = None) -> dict[str, float]:
        """How the last 1000 calls went, without those of `warmup`, and what a step takes.

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
        return self._engine.stats(len(self.plan.table), bandwidth)

    def warmup(self) -> dict[int, float]:
        """Compile and run every batch size once: {batch size: seconds}."""
        seconds = {}
        for batch in self.batch_sizes:
            start = time.perf_counter()
            net, like = self.prior.net, dict(device=self.prior.device)
            text = F.normalize(torch.ones(batch, net.text_embed_dim, **like), dim=-1)
            encodings = torch.ones(batch, 1, net.text_dim, **like) if self.prior.condition_on_text_encodings else None
            # a generator of its own: warming up must not move the global one
            generator = torch.Generator(self.prior.device).manual_seed(0)
            self._call(text, encodings, None, self._scales[0], generator, counts=False)
            seconds[batch] = time.perf_counter() - start
        return seconds

    def __call__(
        self,
        text_embed: Tensor,
        text_encodings: Tensor | None = None,
        *,
        conditions: dict[str, Tensor] | None = None,
        cond_scale: float | Sequence[float] | Tensor = 1.0,
        generator: Generators | Sequence[int] = None,
    ) -> Tensor:
        """Sample.

        Args:
            text_embed: (prompts, dim), on the prior's device.
            text_encodings: (prompts, length, dim), all-zero rows are padding; required by priors conditioned on it.
            conditions: values of the extra conditions, (prompts,) or (prompts, size); those left out are missing.
            cond_scale: classifier-free guidance, one or (prompts,); other than 1 needs a sampler built with `guidance`.
            generator: on the prior's device; the global one by default. A seed means the same as in `prior.sample` with
                the same timesteps, solver, spacing and eta. Or a list, of a generator or a seed for each row (prompts *
                samples_per_prompt): then a row has the noise that it has alone, whatever batch it is in.
        Returns:
            (prompts, dim), not scaled.
        """
        return self._call(text_embed, text_encodings, conditions, cond_scale, generator)

    @torch.no_grad()
    def _call(
        self,
        text_embed: Tensor,
        text_encodings: Tensor | None,
        conditions: dict[str, Tensor] | None,
        cond_scale: float | Sequence[float] | Tensor,
        generator: Generators | Sequence[int],
        counts: bool = True,
    ) -> Tensor:
        """A call, which `stats` counts or does not."""
        text_cond = self.prior.text_condition(None, text_embed, text_encodings, conditions=conditions)
        prompts, repeats, engine = len(text_embed), self.samples_per_prompt, self._engine
        scales, generator = self._scales_of(cond_scale, prompts), _generators(generator, self.prior.device)
        self.prior.check_text_condition((prompts * repeats, self.prior.image_embed_dim), text_cond)
        device, served = self.prior.device, engine.clock.device
        if device != served:
            raise ValueError(f"the prior is on {device}; it must be where it was, on {served}")
        with lock_of(self.prior), engine.lock, engine.clock, ops.sharing():
            engine.clock.counts = counts
            with snapshot.running(self.prior.net):
                engine.refresh(self.prior.net, self._build)
                embeds = self._sample(text_cond, scales, generator)
        return self.prior.best_of(self.prior.denormalize(embeds).view(prompts, repeats, -1), text_embed)

    def _scales_of(self, cond_scale: float | Sequence[float] | Tensor, prompts: int) -> list[float]:
        """Guidance of each prompt. Raises ValueError where it does not fit."""
        if torch.is_tensor(cond_scale):
            cond_scale = cond_scale.tolist()
        scales = list(cond_scale) if isinstance(cond_scale, (list, tuple)) else [cond_scale] * prompts
        if len(scales) != prompts:
            raise ValueError(f"cond_scale has {len(scales)} entries; it must be a number, or one for each of {prompts}")
        for scale in dict.fromkeys(scales):
            check_number("cond_scale", scale)
            if scale != 1 and not self.guidance:
                raise ValueError(f"cond_scale={scale}; this sampler was built with guidance=False, so it must be 1")
            if isinstance(self.plan.table, LearnedTable):
                self.plan.table.check_scale(scale)
        return scales

    def _begin(self, text_cond: dict, batch: int, scales: Tensor) -> tuple[Step | Run, StepInputs, int]:
        """Steps of some prompts, their inputs, and how many they take: a batch size where they are of fixed shapes.

        Steps in C, and eager ones, take any number: there padding is work for nothing.
        """
        repeats, engine, count = self.samples_per_prompt, self._engine, len(text_cond["text_embed"])
        if not self.graphs and count < batch and batch not in self._fixed:
            inputs = self._steps.prefill(text_cond, repeats)
            step = self._steps.run(inputs, scales, count * repeats)
            if step is None and engine.compile is False:
                step = bind(self._steps.step, inputs, scales)
            if step is not None:
                return step, inputs, count
            self._fixed.add(batch)
        padded, scales = self._padded(text_cond, batch), F.pad(scales, (0, (batch - count) * repeats))
        graph = self._graph(batch, padded) if self.graphs else None
        if graph is not None:
            return graph.begin(padded, scales), graph.inputs, batch
        inputs = self._steps.prefill(padded, repeats)
        step = self._steps.run(inputs, scales, batch * repeats)
        return step or bind(self._step(batch), inputs, scales), inputs, batch

    def _sample(self, text_cond: dict, scales: Sequence[float], generator: Generators) -> Tensor:
        """All candidates, (prompts * samples_per_prompt, dim), scaled, in parts of the largest batch size."""
        prompts, repeats, table = len(text_cond["text_embed"]), self.samples_per_prompt, self.plan.table
        engine, device = self._engine, self._engine.clock.device
        scales = torch.tensor(scales, dtype=torch.float32, device=device).repeat_interleave(repeats)

        def begin(part: slice, batch: int) -> tuple[Step | Run, int]:
            own, rows = map_rows(text_cond, lambda t: t[part]), slice(part.start * repeats, part.stop * repeats)
            step, inputs, taken = self._begin(own, batch, scales[rows])
            if taken not in engine.noted:
                reads, shape = network_reads(self._step_net, inputs), (taken * repeats, self.prior.image_embed_dim)
                engine.note(taken, reads, self._steps.step, inputs, shape, step)
            engine.clock.read += sum(engine.noted[taken][0]) * len(table.times)
            return step, taken

        noise = Noise((prompts * repeats, self.prior.image_embed_dim), device, generator)
        parts = begin, self.batch_sizes, prompts
        return run_prior(self.prior, noise, lambda x: run_parts(table, x, noise, *parts))

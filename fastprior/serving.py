"""Sampling in production: a sampler built once, for given batch sizes, solver, steps and dtype."""

from __future__ import annotations

import copy
import statistics
import threading
import time
import warnings
from collections import deque
from collections.abc import Mapping
from types import FunctionType

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprior import quantise as quantisation
from fastprior.graphs import StepGraph
from fastprior.network import DiffusionPriorNetwork
from fastprior.prior import DiffusionPrior
from fastprior.sampler import WeightWatch, denoise_step, map_rows, network_obstacles, prefill, run_steps, step_inputs


class PriorSampler:
    """Sample from a prior at low latency: everything that does not depend on the prompt is done before the first call.

    Prompts are padded to the nearest of `batch_sizes`, which changes no row's result, and more prompts than the largest
    run in parts. One compiled graph per batch size serves every prompt, seed and `cond_scale`. A change of the prior's
    weights is noticed at the next call and served from then on. Calls from several threads run one after the other, and
    on CUDA in the order of the calls, whatever their streams.

    Args:
        prior: in eval mode, with a network that can be cached (see `prior.sampling_plan`).
        batch_sizes: numbers of prompts to prepare for.
        samples_per_prompt: candidates per prompt, of which the one most similar to the text embedding is returned.
        timesteps, solver, eta: see `DiffusionPrior.p_sample_loop`; timesteps defaults to `prior.sample_timesteps`.
        guidance: prepare for a `cond_scale` other than 1; by default where the prior was trained for it.
        dtype: run the network in this dtype; with another than its own, on a copy. State and schedule stay fp32.
        quantise: "int8" or "float8": every step reads linears of 8 bits, with a scale for each row; the prefill does
            not. Where embeddings differ too much from those of the prior as it is, building fails: over 16 prompts,
            with and (where prepared for) without guidance of 3, the cosine must be 0.999 in the median, 0.995 at worst.
        quality_prompts: `text_embed` and `text_encodings` of other prompts to judge that by, better than random ones.
        compile: use torch.compile; off, the same steps run eagerly.
        graphs: capture prefill and step of each batch size as CUDA graphs, by default on CUDA. Where a capture fails, a
            warning says why, and all runs go on without.

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
        batch_sizes: tuple[int, ...] = (1, 8, 64),
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
    ):
        if not batch_sizes or min(batch_sizes) < 1:
            raise ValueError(f"batch_sizes={batch_sizes}; it must hold at least one number, each at least 1")
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
        self.batch_sizes = tuple(sorted(set(batch_sizes)))
        self.dtype, self.compile = dtype or prior.net.learned_query.dtype, compile
        self.graphs = prior.device.type == "cuda" if graphs is None else graphs
        if self.graphs and prior.device.type != "cuda":
            raise ValueError(f"graphs=True; the prior is on {prior.device}, and CUDA graphs need CUDA")
        if quantise is not None and quantise not in quantisation.DTYPES:
            raise ValueError(f"quantise={quantise!r}; it must be None or {' or '.join(map(repr, quantisation.DTYPES))}")
        self.quantise, self._quality_prompts, self.quality = quantise, quality_prompts, None
        self._lock = threading.Lock()
        self._modules: list | None = None
        self._graphs: dict[int, StepGraph] = {}
        self._clock = Clock(prior.device)
        self._timesteps, self._eta = timesteps, {} if eta is None else dict(eta=eta)
        if quantise:
            with self._lock:
                self._refresh()

    @torch.no_grad()
    def _refresh(self) -> None:
        """(Re)build what depends on the network: all of it for other modules or hooks, the tables for other weights."""
        own = self.prior.net
        modules = [(id(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in own.modules()]
        if self.quantise:  # its network shares the other parameters
            modules += [(id(p), p.device, p.dtype) for p in own.parameters()]
        if modules != self._modules:
            if found := network_obstacles(own):
                raise ValueError(f"the prior's network was changed, and cannot be served: {'; '.join(found)}")
            self._modules, self._steps, self._watch = modules, {}, WeightWatch()
            self._net = own if own.learned_query.dtype == self.dtype else copy.deepcopy(own).to(self.dtype)
            self._step_net = quantisation.quantised(self._net, self.quantise) if self.quantise else self._net
        if self._watch.changed(own):
            if self._net is not own:
                self._net.load_state_dict(own.state_dict())  # in place: compiled steps stay as they are
            self._graphs.clear()  # they hold addresses of weights and tables
            self._times, self._null_preds, self._rows = step_inputs(self._net, self.plan)
            self._indices = torch.arange(len(self._rows), device=self._rows.device)
            if self.quantise:
                quantisation.update(self._step_net)
                try:
                    self._judge()
                except BaseException:
                    self._modules = None  # nothing is served of what was not found good
                    raise

    def _judge(self) -> None:
        """Compare embeddings of the quantised network with those of the prior as it is, with the same noise."""
        given = self._quality_prompts or quantisation.random_prompts(self.prior.net)
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
        self.quality = quantisation.judge(self.quantise, torch.cat(got), torch.cat(wanted))

    def _step(self, batch: int):
        """`denoise_step` of this network, compiled for one batch size."""
        if batch not in self._steps:
            net, clamp, radius = self._step_net, self.plan.clamp, self.plan.radius

            def step(cond, null_preds, rows, cond_scale, x, x0, noise, index):
                return denoise_step(net, cond, null_preds, rows, cond_scale, x, x0, noise, index, clamp, radius)

            if self.compile:
                # a code object of its own: torch.compile counts recompilations by code object, not by closure
                own = FunctionType(step.__code__.replace(), step.__globals__, step.__name__, None, step.__closure__)
                # modules and weights are watched in _refresh: no need to check several hundred guards at every step
                options = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
                step = torch.compile(own, fullgraph=True, dynamic=False, options=options)
            self._steps[batch] = step
        return self._steps[batch]

    def _padded(self, text_cond: dict, batch: int) -> dict:
        """A text condition with rows up to a batch size; for graphs also of full length, and with every condition."""
        padded = map_rows(text_cond, lambda t: F.pad(t, (0, 0) * (t.ndim - 1) + (0, batch - len(t))))
        if not self.graphs:
            return padded
        if "text_encodings" in padded:
            encodings = padded["text_encodings"][:, : self._net.max_text_len]
            padded["text_encodings"] = F.pad(encodings, (0, 0, 0, self._net.max_text_len - encodings.shape[1]))
        if self._net.conditions is not None:
            missing = self._net.conditions.missing(batch, self.prior.device)
            padded["conditions"] = missing | padded.get("conditions", {})
        return padded

    def _graph(self, batch: int) -> StepGraph | None:
        """The graphs of a batch size; None where they cannot be captured."""
        if batch not in self._graphs:
            net, compiled = self._net, self._step(batch)
            like = dict(device=self.prior.device, dtype=net.stream_dtype)
            example = dict(text_embed=torch.zeros(batch, net.text_embed_dim, **like))
            if self.prior.condition_on_text_encodings:
                example["text_encodings"] = torch.zeros(batch, 0, net.text_dim, **like)

            def step(cond, scale, x, x0, noise, index):
                return compiled(cond, self._null_preds, self._rows, scale, x, x0, noise, index)

            try:
                self._graphs[batch] = StepGraph(
                    lambda text_cond: prefill(net, self.plan, text_cond, self._times),
                    step,
                    self._padded(example, batch),
                    (batch * self.samples_per_prompt, self.prior.image_embed_dim),
                    len(self.plan.table),
                    next((graph.pool for graph in self._graphs.values()), None),
                )
            except RuntimeError as error:  # too little memory too
                self.graphs = False
                self._graphs.clear()
                warnings.warn(f"batch size {batch} was not captured as a CUDA graph, all runs go on without: {error}")
                return None
        return self._graphs[batch]

    def stats(self) -> dict[str, float]:
        """How the last 1000 calls went, and what a step takes.

        Returns:
            calls: how many; p50_ms, p99_ms: of whole calls, on CUDA as the device ran them; weight_bytes: what a step
            reads of weights; graphs, graph_bytes: captured batch sizes, and the memory that they hold.
        """
        with self._lock:
            times = self._clock.milliseconds()
            weights = sum(p.numel() for p in self.prior.net.causal_transformer.parameters() if p.ndim == 2)
            return dict(
                calls=len(times),
                p50_ms=statistics.median(times) if times else float("nan"),
                p99_ms=statistics.quantiles(times, n=100)[98] if len(times) > 1 else float("nan"),
                weight_bytes=weights * self.dtype.itemsize,
                graphs=len(self._graphs),
                graph_bytes=sum(graph.bytes for graph in self._graphs.values()),
            )

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
        with self._lock, self._clock:
            self._refresh()
            embeds = self._sample(text_cond, cond_scale, generator)
        return self.prior.best_of(self.prior.denormalize(embeds).view(prompts, repeats, -1), text_embed)

    def _sample(self, text_cond: dict, cond_scale: float, generator: torch.Generator | None) -> Tensor:
        """All candidates, (prompts * samples_per_prompt, dim), scaled, in parts of the largest batch size."""
        prompts, repeats = len(text_cond["text_embed"]), self.samples_per_prompt
        scale = torch.tensor(cond_scale, dtype=torch.float32, device=self.prior.device)
        part = min(prompts, self.batch_sizes[-1])
        shape = prompts * repeats, self.prior.image_embed_dim
        draws = self._draws(shape, generator, keep=part < prompts)
        embeds = [
            self._run(map_rows(text_cond, lambda t, at=at: t[at : at + part]), scale, draws, at * repeats)
            for at in range(0, prompts, part)
        ]
        return torch.cat(embeds)

    def _draws(self, shape: tuple[int, int], generator: torch.Generator | None, keep: bool):
        """The run's noise tensors by number; kept where several parts of the batch need rows of the same tensor."""
        kept: list[Tensor] = []

        def draw(number: int) -> Tensor:
            if number < len(kept):
                return kept[number]
            noise = torch.randn(shape, device=self.prior.device, generator=generator)
            if keep:
                kept.append(noise)
            return noise

        return draw

    def _run(self, text_cond: dict, scale: Tensor, draws, first_row: int) -> Tensor:
        """Run one part of the batch, padded to a batch size: its (rows, dim) scaled embeddings."""
        prompts = len(text_cond["text_embed"])
        rows = prompts * self.samples_per_prompt
        batch = next(size for size in self.batch_sizes if size >= prompts)
        graph = self._graph(batch) if self.graphs else None
        padded = self._padded(text_cond, batch)
        numbers = iter(range(len(self.plan.table) + 1))

        def draw() -> Tensor:
            noise = draws(next(numbers))[first_row : first_row + rows]
            return F.pad(noise, (0, 0, 0, batch * self.samples_per_prompt - rows))

        if graph is not None:
            graph.begin(padded, scale)
            return run_steps(self.prior, self.plan.table, graph.step, draw)[:rows].clone()
        cond, compiled = prefill(self._net, self.plan, padded, self._times), self._step(batch)

        def step(x, x0, noise, index):
            return compiled(cond, self._null_preds, self._rows, scale, x, x0, noise(), self._indices[index])

        return run_steps(self.prior, self.plan.table, step, draw)[:rows]


class Clock:
    """Times what runs within it, call by call; on CUDA by events, and calls of several streams wait for each other."""

    KEPT = 1000

    def __init__(self, device: torch.device):
        self.device = device
        self.kept: deque = deque(maxlen=self.KEPT)

    def _now(self):
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def __enter__(self) -> None:
        if self.device.type == "cuda" and self.kept:
            torch.cuda.current_stream(self.device).wait_event(self.kept[-1][1])
        self.began = self._now()

    def __exit__(self, kind, error, trace) -> None:
        ended = self._now()
        if kind is None or self.device.type == "cuda":  # what failed may still run
            self.kept.append((self.began, ended))

    def milliseconds(self) -> list[float]:
        if self.device.type != "cuda":
            return [(end - begin) * 1e3 for begin, end in self.kept]
        if self.kept:
            self.kept[-1][1].synchronize()
        return [begin.elapsed_time(end) for begin, end in self.kept]

"""How the runs of `PriorPipeline` go: step by step, by steps compiled for few shapes, or by CUDA graphs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprior.diffusion.solvers import StepTable
from fastprior.engine import shapes
from fastprior.engine.clock import Clock
from fastprior.engine.graphs import TABLE_STEPS, GraphCache, StepGraph, settings
from fastprior.engine.step_cost import CountLaunches, StepReads, step_seconds, transformer_reads
from fastprior.kernels import ops
from fastprior.models import quantise as quantisation
from fastprior.models import snapshot
from fastprior.models.prior_transformer.blocks import HIDDEN, Prefix
from fastprior.models.prior_transformer.forward import Conditioning
from fastprior.pipelines.parts import PipelineParts
from fastprior.pipelines.text_encoding import TextEncoding
from fastprior.prior.loop import Step, run_table
from fastprior.serving import quality

if TYPE_CHECKING:
    from fastprior.models.prior_transformer.model import PriorTransformer


@dataclass(frozen=True)
class Run:
    """What a run computes.

    Attributes:
        table: the solver's coefficients.
        text: all different texts.
        prefixes: which of them condition the rows: those of all prompts, one group after the other. With guidance the
            last group is the unconditional one.
        prompts: of a group.
        samples: rows of each prompt of a group.
        guidance: whether there is some; the first group has it.
        scale: of guidance.
    """

    table: StepTable
    text: TextEncoding
    prefixes: list[int]
    prompts: int
    samples: int
    guidance: bool
    scale: float

    @property
    def groups(self) -> list[list[int]]:
        return [self.prefixes[at : at + self.prompts] for at in range(0, len(self.prefixes), self.prompts)]

    @property
    def guided(self) -> int:
        """How many rows have guidance, the first."""
        return self.prompts * self.samples * self.guidance


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
    missing = shapes.text_length(tokens, longest) - tokens
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


class PriorRuns(PipelineParts):
    """The parts of a pipeline and the runs of its prior; see `PriorPipeline` for the arguments."""

    def __init__(
        self,
        *args: Any,
        compile: bool = False,
        batch_sizes: tuple[int, ...] = shapes.BATCH_SIZES,
        quantise: str | None = None,
        graphs: bool | None = None,
        graph_memory: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        quantisation.check(quantise)
        self.quantise, self.quality = quantise, None
        self.compile, self.batch_sizes = compile, shapes.check_batch_sizes(batch_sizes)
        if graphs and self.device.type != "cuda":
            raise ValueError(f"graphs=True; the prior is on {self.device}, and CUDA graphs need CUDA")
        self.graphs, self._graphs = graphs, GraphCache(graph_memory)
        self._lock, self._clock, self._state = threading.Lock(), Clock(self.device), None
        self._quantised: PriorTransformer | None = None
        self._reads, self._example = StepReads(0, 0, 0), None  # of the last run: what a step read, and one of it
        self._compiled: dict[tuple, Callable] = {}

    def _compiled_for(self, *given: Any) -> Callable:
        """`guided_step` compiled for given shapes."""
        if given not in self._compiled:
            self._compiled[given] = shapes.compiled(guided_step)
        return self._compiled[given]

    def _run(self, run: Run, x: Tensor, draw: Callable[[], Tensor]) -> Tensor:
        """All steps from x (rows, dim), the rows of a prompt together."""
        if self._clock.device != self.device:
            with self._lock:
                self._clock.wait()
                self._clock = Clock(self.device)
        if self.device.type == "cuda" if self.graphs is None else self.graphs:
            with self._lock, self._clock:
                self._refresh()
                return self._run_by_graphs(run, x, draw)
        if self.quantise:
            with self._lock:
                self._refresh()
        clock = self._clock
        with ops.sharing():
            began, (step, conds) = clock.now(), self._step(run, x.dtype)
            x = run_table(run.table, step, x, draw)
        clock.add(began, self._note(run, conds, x.dtype) * len(run.table))
        return x

    def _note(self, run: Run, conds: list[Conditioning], dtype: torch.dtype) -> int:
        """Remember a run for `stats`, whose steps run behind all these conditions: the bytes that each step reads."""
        net = self._quantised or self.prior
        self._reads = StepReads(*map(sum, zip(*(transformer_reads(net, cond, run.table.rows) for cond in conds))))
        prefix = conds[0].prefix
        self._example = prefix.k.shape, prefix.mask is None, run, dtype
        return sum(self._reads)

    def _refresh(self) -> None:
        """Drop what depends on weights or modules that are no more, and quantise those that are."""
        state = snapshot.state(self.prior)
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
        sizes = (count, config["embedding_proj_dim"] or dim), (count, length, dim)
        lengths = torch.randint(1, length + 1, (count, 1), generator=draw)
        drawn = (torch.randn(shape, generator=draw) for shape in sizes)
        text = TextEncoding(*(t.to(self.device) for t in (*drawn, torch.arange(length) < lengths)))
        text = TextEncoding(*(torch.cat((t, t[:1])) for t in text))  # the first is what is guided away from, too
        run = Run(self.schedule.table(25), text, [*range(count), *[count] * count], count, 1, True, 4.0)
        for prior in (self.prior, twin):
            noise = self.noise(count, dim, torch.Generator(self.device).manual_seed(0), torch.float32)
            x = self.pure_noise(run.table, noise, None, (count, dim))
            x = run_table(run.table, self._plain_step(prior, run, x.dtype)[0], x, noise)
            embeds.append(self.prior.post_process_latents(x))
        self.quality = quality.judge(self.quantise, embeds[1], embeds[0])
        return twin

    def _run_by_graphs(self, run: Run, x: Tensor, draw: Callable[[], Tensor]) -> Tensor:
        """`run` in parts, one after the other. What waits for the device comes before the first of them."""
        table, lengths = run.table, _lengths(run.text.mask)
        missing = -len(table) % TABLE_STEPS
        times = F.pad(torch.tensor(table.times, dtype=torch.float32), (0, missing)).to(self.device)
        rows = F.pad(table.rows.to(x.dtype), (0, 0, 0, missing)).to(self.device)
        runs = []
        for part, batch in shapes.parts(self.batch_sizes, run.prompts):
            groups = [group[part] for group in run.groups]
            given = self._padded_texts(run.text, lengths, groups, batch) | dict(times=times, rows=rows)
            own = replace(run, prefixes=[text for group in groups for text in group], prompts=part.stop - part.start)
            runs.append((part, batch, own, given))
        shape = run.samples, x.shape[1]  # of one prompt in one group
        states, results = [], []
        for part, batch, own, given in runs:
            graph = self._graph(given, batch, own, x.dtype)
            if graph is None:
                batch, (step, conds) = own.prompts, self._step(own, x.dtype)
            else:
                graph.begin(given, run.scale)
                step, conds = graph.step, [graph.cond[0]]
            if not states:  # all noise at once, for other parts have other rows of it
                noises = [draw() for drawn in table.draws_noise if drawn]
                states = [t.view(-1, run.prompts, *shape) for t in (x, *noises)]
            cut = (_padded_part(t, part, batch).reshape(-1, x.shape[1]) for t in states)
            result = run_table(table, step, next(cut), partial(next, cut))
            self._clock.read += self._note(own, conds, x.dtype) * len(table)
            results.append(result.view(-1, batch, *shape)[:, : own.prompts].clone())  # it may be a buffer
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
        tokens = shapes.text_length(max(lengths[number] for number in kinds) + 1, longest + 1) - 1
        index = torch.tensor(numbers, device=self.device)
        return dict(
            embeds=text.embeds[index].to(self.dtype),
            encodings=text.encodings[index, :tokens].to(self.dtype),
            mask=text.mask[index, :tokens].float(),
            prompts=torch.tensor([kinds[number] for number in chosen], device=self.device),
        )

    def _graph(self, given: dict[str, Tensor], batch: int, run: Run, dtype: torch.dtype) -> StepGraph | None:
        """The graphs of runs of these shapes and kinds; None where there are none, see `GraphCache`."""
        fixed = self.schedule.clamp, self.schedule.radius, run.table.uses_prediction
        rows = (len(run.groups) - run.guidance) * batch * run.samples
        guided = batch * run.samples if run.guidance else 0
        sizes = tuple(t.shape for t in given.values()), rows, guided, dtype
        key = *sizes, *fixed, self.dtype, settings(self.device)

        def capture() -> StepGraph:
            prior, net = self.prior, self._quantised or self.prior
            call = self._compiled_for(*sizes) if self.compile else guided_step

            def prefill(given):
                text = given["embeds"], given["encodings"], given["mask"]
                cond = prior.padded_prefill(*text, given["times"], given["prompts"])
                return prior.share(cond, run.samples), given["rows"]

            def step(cond, scale, x, x0, noise, index):
                return call(net, *cond, scale, x, x0, noise, index, guided, *fixed)

            shape = rows, self.prior.config["embedding_dim"]
            return StepGraph(prefill, step, given, shape, len(given["rows"]), dtype)

        graph = self._graphs.get(key, f"batch size {batch}", capture)
        if self._graphs.failed:
            self.graphs = False
        return graph

    def stats(self, bandwidth: float | None = None) -> dict[str, float]:
        """How the last 1000 calls went, and what a step takes.

        Args:
            bandwidth: bytes per second that the device reads, such as `serving.measure.read_bandwidth` measures.
        Returns:
            calls: how many.
            p50_ms, p99_ms: of the prefill and all steps, without encoders, on CUDA as the device ran them.
            weight_bytes, prefix_bytes, table_bytes: what a step of the last run read, see `StepReads`; by graphs, of
                its last part, where there were more prompts than the largest batch size.
            launches, run_launches: kernels of such a step, and of the steps of that run, see `PriorSampler.stats`.
            graphs, graph_bytes, evictions: shapes that are captured, the memory that they hold, and how often graphs
                were dropped for others.
            floor_share, modelled_step_ms: with `bandwidth`, see `PriorSampler.stats`.
        """
        with self._lock:
            times, read = self._clock.milliseconds(), self._clock.read_bytes()
            stats = self._clock.stats() | self._graphs.stats()
            reads, example = self._reads, self._example
        launches = self._launches(*example) if example and ops.on_triton(self.prior.proj_in.weight) else 0
        stats |= dict(weight_bytes=reads.weights, prefix_bytes=reads.prefix, table_bytes=reads.tables)
        stats |= dict(launches=launches, run_launches=launches * len(example[2].table) if example else 0)
        if bandwidth is not None:
            stats["floor_share"] = read / bandwidth / (sum(times) / 1e3) if times else float("nan")
            stats["modelled_step_ms"] = step_seconds(sum(reads), bandwidth, launches) * 1e3
        return stats

    @torch.no_grad()
    def _launches(self, prefix: torch.Size, shown: bool, run: Run, dtype: torch.dtype) -> int:
        """Kernels of a step behind a prefix of that shape, without torch.compile; traced without running anything."""
        from torch._subclasses.fake_tensor import FakeTensorMode

        config, groups = self.prior.config, len(run.groups)
        each = max(prefix[1] // groups, run.prompts) * run.samples  # rows of a group; texts that are the same are one
        fixed = each * run.guidance, self.schedule.clamp, self.schedule.radius, run.table.uses_prediction
        with FakeTensorMode(allow_non_fake_inputs=True), CountLaunches() as launches, torch.device(self.device):
            k, v = torch.empty(2, *prefix, dtype=self.dtype)
            mask = None if shown else torch.empty(prefix[1], prefix[3])
            time = torch.empty(1, 1, config["num_attention_heads"] * config["attention_head_dim"], dtype=self.dtype)
            x = torch.empty((groups - run.guidance) * each, config["embedding_dim"], dtype=dtype)
            rows, scale, index = torch.empty(1, 6, dtype=dtype), torch.ones((), dtype=dtype), torch.zeros((), dtype=int)
            cond = Conditioning(Prefix(k, v, mask), time)
            for _ in range(2):  # what the first clears is cleared
                launches.names.clear()
                guided_step(self._quantised or self.prior, cond, rows, scale, x, x, x, index, *fixed)
        return launches.count

    def _step(self, run: Run, dtype: torch.dtype) -> tuple[Step, list[Conditioning]]:
        """The steps of a run, of x in a dtype, and the conditions that each of them runs behind."""
        step = self._compiled_step if self.compile else self._plain_step
        return step(self._quantised or self.prior, run, dtype)

    def _inputs(self, run: Run, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple]:
        """The times, the coefficients, the scale, the indices of steps, and what is a constant of the schedule."""
        times, scale = torch.tensor(run.table.times), torch.tensor(run.scale, dtype=dtype)
        tensors = times, run.table.rows.to(dtype), scale, torch.arange(len(times))
        fixed = self.schedule.clamp, self.schedule.radius, run.table.uses_prediction
        return *(t.to(self.device) for t in tensors), fixed

    def _plain_step(self, prior: PriorTransformer, run: Run, dtype: torch.dtype) -> tuple[Step, list[Conditioning]]:
        times, rows, scale, indices, fixed = self._inputs(run, dtype)
        index = torch.tensor(run.prefixes, device=self.device)
        cond = self.prior.prefill(*(tensor[index] for tensor in run.text), times)  # runs the same prompts once
        cond = self.prior.share(cond, run.samples)
        cond = cond if prior is self.prior else prior.prepare(cond)
        step = partial(guided_step, prior, cond, rows, scale)
        return lambda x, x0, noise, index: step(x, x0, noise(), indices[index], run.guided, *fixed), [cond]

    def _compiled_step(self, prior: PriorTransformer, run: Run, dtype: torch.dtype) -> tuple[Step, list[Conditioning]]:
        """The same in parts of few shapes: each group of prompts is padded to a batch size, each text to a length."""
        times, rows, scale, indices, fixed = self._inputs(run, dtype)
        cond = self.prior.prefill(*run.text, times)
        share = len(run.text.embeds) // cond.prefix.k.shape[1]  # texts of one prefix
        cond = cond._replace(prefix=_padded(cond.prefix, run.text.encodings.shape[1] + 1))
        cond = self.prior.share(cond, run.samples)
        cond = cond if prior is self.prior else prior.prepare(cond)
        k, v, mask = cond.prefix[:3]
        groups = torch.tensor(run.groups, device=self.device) // share
        parts = []
        for part, batch in shapes.parts(self.batch_sizes, run.prompts):
            missing = batch - (part.stop - part.start)
            chosen = F.pad(groups[:, part], (0, missing)).flatten()
            own = cond.prefix._replace(k=k[:, chosen], v=v[:, chosen], mask=mask[chosen], texts=None)
            parts.append((part, batch, missing, cond._replace(prefix=own)))

        def all_parts(x, x0, noise, index):
            state = torch.stack((x, x0, noise())).view(3, len(groups) - run.guidance, run.prompts, -1)
            results = []
            for part, batch, missing, cond in parts:
                given = F.pad(state[:, :, part], (0, 0, 0, missing)).view(3, -1, x.shape[1])
                step = self._compiled_for(cond.prefix.k.shape, rows.shape, run.samples, run.guidance)
                guided = batch * run.samples * run.guidance
                result = torch.stack(step(prior, cond, rows, scale, *given, indices[index], guided, *fixed))
                results.append(result.view(2, -1, batch, state.shape[-1])[:, :, : batch - missing])
            return torch.cat(results, dim=2).view(2, *x.shape).unbind()

        return all_parts, [cond for *_, cond in parts]

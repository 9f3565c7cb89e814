"""How a prior runs for the prompts of a pipeline: step by step, by steps compiled for few shapes, or by CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprior.diffusion.diffusers_schedules import DiffusersSchedule
from fastprior.diffusion.solvers import StepTable
from fastprior.engine import shapes
from fastprior.engine.clock import Clock
from fastprior.engine.engine import Engine
from fastprior.engine.graphs import StepGraph, padded_table
from fastprior.engine.step_cost import step_reads
from fastprior.engine.steps import Noise, Step, StepInputs, bind, run_parts, run_table, solver_step, with_unconditional
from fastprior.kernels import ops
from fastprior.models import quantise as quantisation
from fastprior.models.prior_transformer.cached_blocks import HIDDEN, Prefix
from fastprior.models.prior_transformer.model import PriorTransformer
from fastprior.pipelines.text_encoding import TextEncoding
from fastprior.serving import quality


@dataclass(frozen=True)
class PromptRun:
    """What a run computes.

    Attributes:
        prior: runs the texts, and the steps where it has no quantised twin.
        schedule: says how a predicted x0 is clamped.
        table: the solver's coefficients.
        text: all different texts.
        prefixes: which of them condition the rows: those of all prompts, one group after the other. With guidance the
            last group is the unconditional one.
        prompts: of a group.
        samples: rows of each prompt of a group.
        guidance: whether there is some; the first group has it.
        scale: of guidance.
    """

    prior: PriorTransformer
    schedule: DiffusersSchedule
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

    def part(self, part: slice, size: int) -> PromptRun:
        """The run of a part of the prompts of each group, of which the first is repeated up to a size."""
        groups = [group[part] for group in self.groups]
        prefixes = [text for group in groups for text in group + group[:1] * (size - len(group))]
        return replace(self, prefixes=prefixes, prompts=size)

    @property
    def guided(self) -> int:
        """How many rows have guidance, the first."""
        return self.prompts * self.samples * self.guidance

    @property
    def rows(self) -> int:
        return len(self.prefixes) * self.samples - self.guided

    @property
    def solver(self) -> tuple:
        return self.schedule.clamp, self.schedule.radius, self.table.uses_prediction

    def step(self, net: PriorTransformer) -> Callable:
        """The step of a network, see `solver_step`."""
        return solver_step(with_unconditional(net.step, self.guided), *self.solver)


def _padded(prefix: Prefix, prompts: int, longest: int) -> Prefix:
    """The prefix of each prompt, with hidden tokens behind, to the nearest text length; there is always a mask then."""
    tokens, repeats = prefix.k.shape[3], prompts // prefix.k.shape[1]
    missing = shapes.text_length(tokens, longest) - tokens
    k, v = (F.pad(t.repeat_interleave(repeats, dim=1), (0, 0, 0, missing)) for t in (prefix.k, prefix.v))
    mask = k.new_zeros(prompts // repeats, tokens, dtype=torch.float32) if prefix.mask is None else prefix.mask
    mask = F.pad(mask.repeat_interleave(repeats, dim=0), (0, missing), value=HIDDEN)
    return prefix._replace(k=k, v=v, mask=mask, texts=None)


def _lengths(mask: Tensor) -> list[int]:
    """Lengths of texts up to the last token that a mask (texts, tokens) shows. Raises ValueError as `prefill` does."""
    mask = mask.float()
    ends = ((mask > 0) * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(dim=1)
    lengths = ends.where(((mask >= 0) & (mask <= 1)).all(dim=1), -1).tolist()
    if min(lengths) < 0:
        raise ValueError("mask has values beyond 0 and 1; it must not")
    return lengths


def _padded_texts(run: PromptRun, lengths: list[int], batch_sizes: Sequence[int]) -> dict[str, Tensor]:
    """The texts of a part of a run, each once, and which of them each prompt is, in the shapes of a graph."""
    prior, text, batch, groups = run.prior, run.text, run.prompts, len(run.groups)
    kinds = {number: at for at, number in enumerate(dict.fromkeys(run.prefixes))}
    # the prompts and one more text for all of them, or for each of them
    counts = [size + (groups > 1) for size in batch_sizes if size <= batch]
    count = min(n for n in (*counts, batch * min(groups, 2)) if n >= len(kinds))
    numbers = [*kinds, *run.prefixes[:1] * (count - len(kinds))]
    longest, device, dtype = prior.config["num_embeddings"], prior.device, prior.dtype
    tokens = shapes.text_length(max(lengths[number] for number in kinds) + 1, longest + 1) - 1
    index = torch.tensor(numbers, device=device)
    return dict(
        embeds=text.embeds[index].to(dtype),
        encodings=text.encodings[index, :tokens].to(dtype),
        mask=text.mask[index, :tokens].float(),
        prompts=torch.tensor([kinds[number] for number in run.prefixes], device=device),
    )


class PromptRuns:
    """Runs of a prior, with what they share; see `PriorPipeline` for arguments and attributes."""

    def __init__(
        self,
        device: torch.device,
        compile: bool,
        batch_sizes: Sequence[int],
        quantise: str | None,
        graphs: bool | None,
        graph_memory: int | None,
    ):
        quantisation.check(quantise)
        self.quantise, self.quality = quantise, None
        self.engine = Engine(device, batch_sizes, compile=compile, graphs=graphs, graph_memory=graph_memory)
        self._quantised: PriorTransformer | None = None
        self._steps = 0  # of the last run

    def run(self, run: PromptRun, x: Tensor, noise: Iterator[Tensor]) -> Tensor:
        """All steps from x (rows, dim), the rows of a prompt together."""
        engine = self.engine
        if engine.clock.device != x.device:  # the prior moved
            with engine.lock:
                engine.clock.wait()
                engine.clock = Clock(x.device)
        if engine.replays:
            with engine.lock, engine.clock:
                engine.refresh(run.prior, partial(self._build, run))
                x, engine.clock.read = self._run(run, x, noise, self._sources(run, x))
            return x
        if self.quantise:
            with engine.lock:
                engine.refresh(run.prior, partial(self._build, run))
        clock = engine.clock
        with ops.sharing():
            began = clock.now()
            x, read = self._run(run, x, noise)
        clock.add(began, read)
        return x

    def _build(self, run: PromptRun) -> None:
        """Quantise the prior, if embeddings of random texts are those of the prior as it is."""
        self._quantised = None
        if not self.quantise:
            return
        prior, count, draw = run.prior, 16, torch.Generator().manual_seed(0)
        config, device = prior.config, prior.device
        length, dim = config["num_embeddings"], config["embedding_dim"]
        lengths = torch.randint(1, length + 1, (count, 1), generator=draw)
        embeds = torch.randn(count, config["embedding_proj_dim"] or dim, generator=draw)
        encodings = torch.randn(count, length, dim, generator=draw)
        # the first is what is guided away from, too
        text = (torch.cat((t, t[:1])).to(device) for t in (embeds, encodings, torch.arange(length) < lengths))
        table, prefixes = run.schedule.table(25), [*range(count), *[count] * count]
        judged = PromptRun(prior, run.schedule, table, TextEncoding(*text), prefixes, count, 1, True, 4.0)
        twin, results = quantisation.quantised(prior, self.quantise), []
        for net in (prior, twin):
            noise = Noise((count, dim), device, torch.Generator(device).manual_seed(0), torch.float32)
            x = next(noise) * table.noise_scale
            x = run_table(table, self._begin(judged, net, x, compile=False)[0], x, noise)
            results.append(prior.post_process_latents(x))
        self.quality = quality.judge(self.quantise, results[1], results[0])
        self._quantised = twin

    def _run(
        self, run: PromptRun, x: Tensor, noise: Iterator[Tensor], sources: Iterator[dict] | None = None
    ) -> tuple[Tensor, int]:
        """All steps, by graphs where there are `sources` for each part; and the bytes that they read."""
        engine, net, reads = self.engine, self._quantised or run.prior, []

        def begin(part: slice, batch: int) -> tuple[Step, int]:
            if sources is not None:
                own, tensors = run.part(part, batch), next(sources)
                graph = self._graph(own, net, tensors, x.dtype)
                if graph is not None:
                    graph.begin(tensors, run.scale)
                    reads.append(self._note(own, net, graph.inputs))
                    return graph.step, batch
            own = run.part(part, batch if engine.compile else part.stop - part.start)
            step, inputs = self._begin(own, net, x, engine.compile)
            reads.append(self._note(own, net, inputs))
            return step, own.prompts

        batch_sizes = engine.batch_sizes if engine.compile or sources is not None else (run.prompts,)
        groups = len(run.groups) - run.guidance
        x = run_parts(run.table, x, noise, begin, batch_sizes, run.prompts, groups)
        return x, sum(reads) * len(run.table.times)

    def _begin(self, run: PromptRun, net: PriorTransformer, x: Tensor, compile: bool) -> tuple[Step, StepInputs]:
        """The steps of a run without graphs, for x in a dtype; compiled ones run behind prefixes of few lengths."""
        prior, device = run.prior, x.device
        index, times = torch.tensor(run.prefixes, device=device), torch.tensor(run.table.times, device=device)
        cond = prior.prefill(*(t[index] for t in run.text), times)  # runs the same prompts once
        if compile:
            cond = cond._replace(prefix=_padded(cond.prefix, len(run.prefixes), run.text.encodings.shape[1] + 1))
        cond = prior.share(cond, run.samples)
        cond = cond if net is prior else net.prepare(cond)
        inputs, step = StepInputs(cond, run.table.rows.to(device, x.dtype)), run.step(net)
        if compile:
            key = cond.prefix.k.shape, inputs.rows.shape, run.rows, run.guided, x.dtype, *run.solver
            step = self.engine.step(net, key, step)
        return bind(step, inputs, torch.tensor(run.scale, dtype=x.dtype, device=device)), inputs

    def _sources(self, run: PromptRun, x: Tensor) -> Iterator[dict[str, Tensor]]:
        """What the graphs of each part begin with; what waits for the device comes before the first of them."""
        lengths, sizes = _lengths(run.text.mask), self.engine.batch_sizes
        tables = dict(times=torch.tensor(run.table.times, dtype=torch.float32), rows=run.table.rows.to(x.dtype))
        tables = {name: padded_table(t).to(x.device) for name, t in tables.items()}
        parts = shapes.parts(sizes, run.prompts)
        return iter([_padded_texts(run.part(part, batch), lengths, sizes) | tables for part, batch in parts])

    def _graph(
        self, run: PromptRun, net: PriorTransformer, sources: dict[str, Tensor], dtype: torch.dtype
    ) -> StepGraph | None:
        """The graphs of runs of these shapes and kinds; None where there are none, see `GraphCache`."""
        prior, engine, samples = run.prior, self.engine, run.samples
        key = *(t.shape for t in sources.values()), run.rows, run.guided, dtype, *run.solver

        def prefill(sources):
            text = sources["embeds"], sources["encodings"], sources["mask"]
            cond = prior.padded_prefill(*text, sources["times"], sources["prompts"])
            return StepInputs(prior.share(cond, samples), sources["rows"])

        def capture() -> StepGraph:
            step, shape = engine.step(net, key, run.step(net)), (run.rows, prior.config["embedding_dim"])
            return StepGraph(prefill, step, sources, shape, len(sources["rows"]), dtype)

        return engine.graph(engine.key(*key, prior.dtype), f"batch size {run.prompts}", capture)

    def _note(self, run: PromptRun, net: PriorTransformer, inputs: StepInputs) -> int:
        """Remember a run for `stats`: the bytes that each of its steps reads."""
        prefix, suffix = inputs.cond.prefix, 2 + (net.prd_embedding is not None)
        modules = net.transformer_blocks, net.proj_in, net.norm_in, net.norm_out, net.proj_to_clip_embeddings
        tables = net.positional_embedding[:, -suffix:], net.prd_embedding, inputs.cond.time_tokens[:1]
        reads = step_reads(filter(None, modules), (prefix.k, prefix.v), (*tables, run.table.rows[:1]))
        self._steps = len(run.table.times)
        return self.engine.note(0, reads, run.step(net), inputs, (run.rows, net.config["embedding_dim"]))

    def stats(self, bandwidth: float | None) -> dict[str, float]:
        """See `PriorPipeline.stats`."""
        return self.engine.stats(self._steps, bandwidth)

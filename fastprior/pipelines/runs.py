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
from fastprior.engine.engine import Engine
from fastprior.engine.graphs import StepGraph, padded_table
from fastprior.engine.runs import Run
from fastprior.engine.step_cost import StepReads, step_reads
from fastprior.engine.steps import Noise, Step, StepInputs, bind, run_parts, run_table, solver_step, with_unconditional
from fastprior.models import quality, snapshot
from fastprior.models.prior_transformer.cached_blocks import HIDDEN, Prefix
from fastprior.models.prior_transformer.model import PriorTransformer
from fastprior.models.quantise import quantised
from fastprior.pipelines.text_encoding import TextEncoding


@dataclass(frozen=True)
class PromptRun:
    """A run of a prior for prompts: what it computes, and how each part of them begins.

    Attributes:
        prior: runs the texts, and the steps where it has no quantised twin.
        schedule: how a predicted x0 is clamped.
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

    def step(self, net: PriorTransformer, predict: Callable | None = None) -> Callable:
        """The step of a network, or of what predicts as its `step` does: see `solver_step`."""
        return solver_step(with_unconditional(predict or net.step, self.guided), *self.solver)

    def run(
        self,
        engine: Engine,
        net: PriorTransformer,
        x: Tensor,
        noise: Iterator[Tensor],
        sources: Iterator[dict] | None = None,
        whole: bool = False,
    ) -> tuple[Tensor, int]:
        """All steps from x (rows, dim), by graphs where there are `sources` for each part; and the bytes they read.

        With `whole` each step is a pass over all tokens, whose bytes are not counted.
        """
        reads = []

        def begin(part: slice, batch: int) -> tuple[Step | Run, int]:
            if whole:
                own = self.part(part, part.stop - part.start)
                return own.begin_whole(net, x), own.prompts
            if sources is not None:
                own, tensors = self.part(part, batch), next(sources)
                graph = own.graph(engine, net, tensors, x.dtype)
                if graph is not None:
                    bound = graph.begin(tensors, self.scale)
                    reads.append(own.note(engine, net, own.step(net), graph.inputs, bound))
                    return bound, batch
            own = self.part(part, batch if engine.compile else part.stop - part.start)
            step = own.step(net)
            bound, inputs = own.begin(net, step, x, engine if engine.compile else None)
            reads.append(own.note(engine, net, step, inputs, bound))
            return bound, own.prompts

        batch_sizes = engine.batch_sizes if engine.compile or sources is not None else (self.prompts,)
        groups = len(self.groups) - self.guidance
        x = run_parts(self.table, x, noise, begin, batch_sizes, self.prompts, groups)
        return x, sum(reads) * len(self.table.times)

    def begin(
        self, net: PriorTransformer, step: Callable, x: Tensor, engine: Engine | None = None
    ) -> tuple[Step | Run, StepInputs]:
        """Steps without graphs, for x in a dtype; an engine compiles them, behind prefixes of few lengths."""
        prior, device = self.prior, x.device
        index, times = torch.tensor(self.prefixes, device=device), torch.tensor(self.table.times, device=device)
        cond = prior.prefill(*(t[index] for t in self.text), times)  # runs the same prompts once
        if engine is not None:
            cond = cond._replace(prefix=_padded(cond.prefix, len(self.prefixes), self.text.encodings.shape[1] + 1))
        cond = prior.share(cond, self.samples)
        cond = cond if net is prior else net.prepare(cond)
        inputs = StepInputs(cond, self.table.rows.to(device, x.dtype))
        if (run := self.prepared(net, inputs)) is not None:
            return run, inputs
        if engine is not None:
            key = cond.prefix.k.shape, inputs.rows.shape, self.rows, self.guided, x.dtype, *self.solver
            step = engine.step(net, key, step)
        return bind(step, inputs, torch.tensor(self.scale, dtype=x.dtype, device=device)), inputs

    def prepared(self, net: PriorTransformer, inputs: StepInputs) -> Run | None:
        """A run whose steps are kernels alone; None where there is none for them, as there is for fp32 alone."""
        if inputs.rows.dtype != torch.float32:
            return None
        clamp, radius, uses_prediction = self.solver
        solver = dict(coefficients=inputs.rows, clamp=clamp, radius=radius, uses_prediction=uses_prediction)
        return net.prepare_run(inputs.cond, self.rows, self.guided, cond_scale=self.scale, **solver)

    def begin_whole(self, net: PriorTransformer, x: Tensor) -> Step:
        """Steps that call every module of a network as it stands."""
        device, dtype = x.device, self.prior.dtype
        index = torch.tensor(self.prefixes, device=device).repeat_interleave(self.samples)
        times = torch.tensor(self.table.times, device=device)
        embeds, encodings, mask = (t[index] for t in self.text)
        text = embeds.to(dtype), encodings.to(dtype), mask

        def predict(x, index, text):
            return net.predict_whole(x.to(dtype), times[index], *text).flatten(0, -2)

        inputs = StepInputs(text, self.table.rows.to(device, x.dtype))
        return bind(self.step(net, predict), inputs, torch.tensor(self.scale, dtype=x.dtype, device=device))

    def sources(self, batch_sizes: Sequence[int], x: Tensor) -> Iterator[dict[str, Tensor]]:
        """What the graphs of each part begin with; what waits for the device comes before the first of them."""
        lengths = _lengths(self.text.mask)
        tables = dict(times=torch.tensor(self.table.times, dtype=torch.float32), rows=self.table.rows.to(x.dtype))
        tables = {name: padded_table(t).to(x.device) for name, t in tables.items()}
        parts = shapes.parts(batch_sizes, self.prompts)
        return iter([_padded_texts(self.part(part, batch), lengths, batch_sizes) | tables for part, batch in parts])

    def graph(
        self, engine: Engine, net: PriorTransformer, sources: dict[str, Tensor], dtype: torch.dtype
    ) -> StepGraph | None:
        """The graphs of runs of these shapes and kinds; None where there are none, see `GraphCache`."""
        prior, samples = self.prior, self.samples
        key = *(t.shape for t in sources.values()), self.rows, self.guided, dtype, *self.solver

        def prefill(sources):
            text = sources["embeds"], sources["encodings"], sources["mask"]
            cond = prior.padded_prefill(*text, sources["times"], sources["prompts"])
            return StepInputs(prior.share(cond, samples), sources["rows"])

        def capture() -> StepGraph:
            step, shape = engine.step(net, key, self.step(net)), (self.rows, prior.config["embedding_dim"])
            return StepGraph(prefill, step, sources, shape, len(sources["rows"]), dtype, partial(self.prepared, net))

        return engine.graph(engine.key(*key, prior.dtype), f"batch size {self.prompts}", capture)

    def note(self, engine: Engine, net: PriorTransformer, step: Callable, inputs: StepInputs, bound: Step | Run) -> int:
        """Note the steps of a run for `stats`: the bytes that each reads."""
        prefix, suffix = inputs.cond.prefix, 2 + (net.prd_embedding is not None)
        modules = net.transformer_blocks, net.proj_in, net.norm_in, net.norm_out, net.proj_to_clip_embeddings
        tables = net.positional_embedding[:, -suffix:], net.prd_embedding, inputs.cond.time_tokens[:1]
        # weights are many to walk through
        weights, _, vectors = snapshot.once(modules[0], "reads", lambda: step_reads(filter(None, modules), (), ()))
        _, of_prefix, of_tables = step_reads((), (prefix.k, prefix.v), (*tables, self.table.rows[:1]))
        reads = StepReads(weights, of_prefix, vectors + of_tables)
        return engine.note(0, reads, step, inputs, (self.rows, net.config["embedding_dim"]), bound)


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


def judged(kind: str, prior: PriorTransformer, schedule: DiffusersSchedule) -> tuple[PriorTransformer, quality.Quality]:
    """The prior quantised, and what it keeps of the embeddings of random texts. Raises ValueError for too little."""
    count, draw = 16, torch.Generator().manual_seed(0)
    config, device = prior.config, prior.device
    length, dim = config["num_embeddings"], config["embedding_dim"]
    lengths = torch.randint(1, length + 1, (count, 1), generator=draw)
    embeds = torch.randn(count, config["embedding_proj_dim"] or dim, generator=draw)
    encodings = torch.randn(count, length, dim, generator=draw)
    # the first is what is guided away from, too
    text = (torch.cat((t, t[:1])).to(device) for t in (embeds, encodings, torch.arange(length) < lengths))
    table, prefixes = schedule.table(25), [*range(count), *[count] * count]
    run = PromptRun(prior, schedule, table, TextEncoding(*text), prefixes, count, 1, True, 4.0)
    twin, results = quantised(prior, kind), []
    for net in (prior, twin):
        noise = Noise((count, dim), device, torch.Generator(device).manual_seed(0), torch.float32)
        x = next(noise) * table.noise_scale
        results.append(prior.post_process_latents(run_table(table, run.begin(net, run.step(net), x)[0], x, noise)))
    return twin, quality.judge(kind, results[1], results[0])

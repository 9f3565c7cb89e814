"""Image embeddings of whole shards: rows that depend on their identity alone, in files that are whole or not there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastprior.checks import check_choice, check_count, check_number
from fastprior.dataloaders.files import ParquetColumn, RowGroups, ShardError
from fastprior.prior.diffusion_prior import DiffusionPrior
from fastprior.serving.bulk import fingerprints
from fastprior.serving.bulk.inputs import InputShard
from fastprior.serving.bulk.manifest import Manifest
from fastprior.serving.prior_sampler import PriorSampler, default_run
from fastprior.utils import atomic

ON_BAD = "error", "skip"
SAVED = "float16", "float32"
_GROUP_BYTES = 2**28  # of decoded row groups that are kept


def row_seed(seed: int, shard: str, row: int, sample: int = 0) -> int:
    """The seed of a row's noise, from 0 to 2**63 - 1: a hash of the row's identity, the same on every machine.

    Args:
        seed: of the whole run.
        shard: name of the shard, its path within its folder.
        row: its number in the shard.
        sample: number of the candidate, where there are several.
    """
    text = json.dumps([seed, shard, row, sample])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True)
class Options:
    """What results depend on, besides weights and texts.

    Args:
        timesteps, solver, spacing: see `PriorSampler`.
        cond_scale: guidance; 1 is none.
        samples_per_prompt: candidates, of which the most similar to the text is kept.
        seed: of all noise, see `row_seed`.
        dtype: of the network, such as "bfloat16"; None leaves it as it is.
        quantise: see `PriorSampler`.
        saved: dtype of what is written, "float16" or "float32".
    """

    timesteps: int | None = None
    solver: str | None = None
    spacing: str | None = None
    cond_scale: float = 1.0
    samples_per_prompt: int = 1
    seed: int = 0
    dtype: str | None = None
    quantise: str | None = None
    saved: str = "float16"

    def __post_init__(self):
        check_number("cond_scale", self.cond_scale)
        check_count("seed", self.seed, least=0, most=2**63 - 1)
        check_choice("saved", self.saved, SAVED)


class Block(NamedTuple):
    """Some rows of a shard: where they begin, what each column holds of them, and which of them can be embedded."""

    start: int
    columns: dict[str, Any]
    good: np.ndarray

    @property
    def rows(self) -> int:
        return len(self.good)


def _usable(text: dict[str, Tensor]) -> Tensor:
    """Which rows a prior can take of what a CLIP made: those that are finite, and whose embedding is not of norm 0."""
    finite = [tensor.flatten(1).isfinite().all(dim=1) for tensor in text.values()]
    return torch.stack([*finite, text["text_embed"].ne(0).any(dim=1)]).all(dim=0)


class Embedder:
    """Embeds shards with one prior and one set of options.

    A row's result depends on its text, its name (shard and row number) and the options; in fp32 neither on the batch
    it is in, nor on who else computes: equal to the bit where steps are calls of C, up to rounding elsewhere.

    Args:
        prior: in eval mode, as `PriorSampler` takes it; with a `clip` where there are captions.
        options: what results depend on.
        batch_size: rows that run together.
        on_bad: rows whose text has numbers that are not finite, or norm 0, or whose result is not finite: "error"
            raises, "skip" writes rows of NaN in their place and counts them.

    Raises:
        ValueError: the prior cannot be cached, or an argument does not fit.
    """

    def __init__(
        self,
        prior: DiffusionPrior,
        options: Options = Options(),
        *,
        batch_size: int = 64,
        on_bad: str = "error",
    ):
        check_choice("on_bad", on_bad, ON_BAD)
        check_count("batch_size", batch_size)
        dtype = getattr(torch, options.dtype) if options.dtype else None
        steps = dict(timesteps=options.timesteps, solver=options.solver, spacing=options.spacing)
        built = dict(batch_sizes=(batch_size,), samples_per_prompt=options.samples_per_prompt, dtype=dtype)
        self.sampler = PriorSampler(prior, **steps, **built, quantise=options.quantise)
        self.prior, self.options, self.batch_size, self.on_bad = prior, options, batch_size, on_bad

    def run(self, shards: list[InputShard]) -> dict[str, Any]:
        """What results of shards depend on, as a `Manifest` keeps it."""
        prior, options, columns = self.prior, self.options, sorted(shards[0].files) if shards else []
        timesteps, _, spacing, _ = default_run(prior, options.timesteps, options.solver, options.spacing, None)
        table = self.sampler.plan.table
        steps = dict(
            timesteps=timesteps, solver=table.solver, spacing=spacing, learned_table=fingerprints.of_table(table)
        )
        dtype = options.dtype or str(self.sampler.dtype).removeprefix("torch.")
        where = dict(device=prior.device.type, dtype=dtype)  # generators of other devices draw other noise
        encoder = fingerprints.of_clip(prior.clip) if "text" in columns and prior.clip is not None else None
        made_with = dict(weights=fingerprints.of_prior(prior), text_encoder=encoder)
        return dict(asdict(options), **where, **made_with, columns=columns) | steps

    def check(self, shards: list[InputShard]) -> None:
        """Raise ShardError for a shard whose columns, or their widths, are not what the prior takes."""
        net, needs = self.prior.net, self.prior.condition_on_text_encodings
        for shard in shards:
            widths = dict(text_embed=net.text_embed_dim, text_encodings=net.text_dim)
            for column, file in shard.files.items():
                if file.rows and column in widths and file.shape[-1] != widths[column]:
                    what = f"rows are {file.shape[-1]} wide; this prior takes {column} of {widths[column]}"
                    raise ShardError(file.name, what)
            if needs and not {"text", "text_encodings"} & set(shard.files):
                raise ShardError(shard.name, "has no text encodings, on which this prior is conditioned")
            if "text" in shard.files and self.prior.clip is None:
                raise ShardError(shard.name, "holds captions, and this prior has no clip")

    def embed(self, shard: InputShard, manifest: Manifest, progress: Callable[[int], Any] = lambda rows: None) -> dict:
        """Embed a shard, write its files, and note it in the manifest: its entry there.

        Args:
            progress: is called with numbers of rows that are done.
        Raises:
            ShardError: a file cannot be read, or a row is bad; the message names file and row. Nothing is noted then.
            OSError: a file cannot be written.
        """
        self.check([shard])
        before, hashes, bad = shard.identities(), shard.hashes(), []
        manifest.forget(shard)
        if path := manifest.metadata_path(shard):
            with atomic(path) as temporary:
                shard.metadata.copy_to(temporary)
        header = dict(shape=(shard.rows, self.prior.image_embed_dim), fortran_order=False)
        saved = np.dtype(self.options.saved)
        with atomic(manifest.image_path(shard)) as temporary, temporary.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, dict(header, descr=saved.str))
            for block in self._blocks(shard):
                rows = self._rows(shard, block, saved, bad)
                file.write(rows.tobytes())
                progress(block.rows)
        if shard.identities() != before:
            raise ShardError(shard.name, "changed while it was embedded")
        inputs = [{**one, "sha256": digest} for one, digest in zip(before, hashes)]
        return manifest.write_entry(shard, inputs, bad)

    def _blocks(self, shard: InputShard) -> Iterator[Block]:
        """The rows of a shard in order, read one block ahead."""
        groups = RowGroups(_GROUP_BYTES)

        def read(start: int) -> Block:
            stop = min(start + self.batch_size, shard.rows)
            return self._checked(shard, start, {c: file.read(start, stop, groups) for c, file in shard.files.items()})

        with ThreadPoolExecutor(1) as pool:
            ahead = None
            for start in range(0, shard.rows, self.batch_size):
                block = (ahead or pool.submit(read, start)).result()
                following = start + self.batch_size
                ahead = pool.submit(read, following) if following < shard.rows else None
                yield block

    def _checked(self, shard: InputShard, start: int, columns: dict[str, Any]) -> Block:
        """A block whose bad rows are known. Raises ShardError for them unless they are skipped."""
        good = np.ones(len(next(iter(columns.values()))), bool)
        for column, values in columns.items():
            if column == "text":
                good &= self._agree(values.is_valid().to_numpy(zero_copy_only=False), shard, column, start, "missing")
                continue
            flat = values.reshape(len(values), -1).astype(np.float32)
            listed = isinstance(shard.files[column], ParquetColumn)
            fault = "missing, of another width, or not finite" if listed else "not finite"
            good &= self._agree(np.isfinite(flat).all(axis=1), shard, column, start, fault)
            if column == "text_embed":
                good &= self._agree(~good | (np.abs(flat).max(axis=1) > 0), shard, column, start, "of norm 0")
        return Block(start, columns, good)

    def _agree(self, fine: np.ndarray, shard: InputShard, column: str, start: int, fault: str) -> np.ndarray:
        if self.on_bad == "error" and not fine.all():
            row = start + int(np.flatnonzero(~fine)[0])
            raise ShardError(shard.files[column].name, f"row {row} is {fault}; --on-bad skip writes NaN in its place")
        return fine

    def _rows(self, shard: InputShard, block: Block, saved: np.dtype, bad: list[int]) -> np.ndarray:
        """The embeddings of a block, (rows, dim), of NaN where a row is bad, which `bad` is told."""
        rows, good = np.full((block.rows, self.prior.image_embed_dim), np.nan, saved), block.good.copy()
        try:
            text = self._text(block)
            if "text" in block.columns and text:
                good[good] = _usable(text).cpu().numpy()
                fault = "encoded by the CLIP as what is not finite, or of norm 0"
                self._agree(good | ~block.good, shard, "text", block.start, fault)
                text = {name: tensor[torch.from_numpy(good[block.good])] for name, tensor in text.items()}
            if good.any():
                found = self._sample(shard, block.start + np.flatnonzero(good), text)
                with np.errstate(over="ignore"):
                    rows[good] = found.float().cpu().numpy()
        except ShardError:
            raise
        except (RuntimeError, ValueError) as error:  # no memory, for one
            what = f"rows {block.start} to {block.start + block.rows - 1} cannot be embedded ({error})"
            raise ShardError(shard.name, what) from error
        finite, first = np.isfinite(rows).all(axis=1), next(iter(shard.files))
        self._agree(finite | ~good, shard, first, block.start, "embedded as what is not finite")
        rows[~finite] = np.nan
        bad += (block.start + np.flatnonzero(~finite)).tolist()
        return rows

    def _text(self, block: Block) -> dict[str, Tensor]:
        """What the prior is conditioned on in the good rows of a block; empty where there are none."""
        where = np.flatnonzero(block.good)
        if not len(where):
            return {}
        if "text" in block.columns:
            return self.prior.text_condition([block.columns["text"][int(i)].as_py() for i in where], None, None)
        tensors = {c: torch.from_numpy(np.ascontiguousarray(rows[where])) for c, rows in block.columns.items()}
        return {column: rows.to(self.prior.device).float() for column, rows in tensors.items()}

    def _sample(self, shard: InputShard, rows: np.ndarray, text: dict[str, Tensor]) -> Tensor:
        """Embeddings of those rows of a shard."""
        options = self.options
        samples = range(options.samples_per_prompt)
        seeds = [row_seed(options.seed, shard.name, int(row), sample) for row in rows for sample in samples]
        return self.sampler(**text, cond_scale=options.cond_scale, generator=seeds)

"""Batches of pairs from shards: shuffled by a seed, the same number on every rank, resumable at the exact sample.

The order of an epoch is a pure function of (seed, epoch, rank, world_size); workers and prefetching do not enter it.
Rows lie in blocks, short runs of a shard. The blocks of all shards are shuffled, each rank takes an equal stretch of
that order, cuts it into buffers of a bounded number of bytes, and shuffles the rows of each buffer. So every rank
reads its own part of the data only, in runs that disks and object stores like. Captions come from parquet files whose
row groups can only be decoded whole; the blocks are therefore shuffled within windows of row groups that fit memory.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from fastprior.dataloaders.files import RowGroups, ShardError, finite_rows
from fastprior.dataloaders.match import SKIP_HINT
from fastprior.dataloaders.shards import CHECKED, EmbeddingShards
from fastprior.reading import QUOTED, quoted

_BLOCKS_PER_BUFFER = 32
_WINDOW_BYTES = 2**28  # of decoded row groups


@dataclass(frozen=True)
class _Blocks:
    """Runs of rows of the pair index, in the order in which they are read."""

    starts: np.ndarray
    stops: np.ndarray

    @property
    def rows(self) -> int:
        return int((self.stops - self.starts).sum())

    def cut(self, begin: int, end: int) -> _Blocks:
        """Rows begin to end of the blocks one after another."""
        edges = np.concatenate([[0], np.cumsum(self.stops - self.starts)])
        low, high = np.maximum(edges[:-1], begin), np.minimum(edges[1:], end)
        some = low < high
        return _Blocks((self.starts + low - edges[:-1])[some], (self.starts + high - edges[:-1])[some])

    def repeated(self, times: int) -> _Blocks:
        return _Blocks(np.tile(self.starts, times), np.tile(self.stops, times))


@dataclass(frozen=True)
class _Buffer:
    """Rows in memory, by column, and the order in which they are given out."""

    columns: dict[str, np.ndarray | pa.Array]
    order: np.ndarray

    def take(self, begin: int, end: int) -> dict[str, np.ndarray | list[str]]:
        rows, taken = self.order[begin:end], {}
        for name, values in self.columns.items():
            if isinstance(values, np.ndarray):
                values = values.take(rows, axis=0)
                taken[name] = values.astype(np.float32, copy=False) if values.dtype.kind == "f" else values
            else:
                taken[name] = values.take(pa.array(rows)).to_pylist()
        return taken


class PairStream:
    """An iterable of batches over pairs [start, stop) of `shards`; to iterate is to run the current epoch to its end.

    A batch is a dict of "image_embed": (batch, dim) and, as far as the shards have them, "text": list of strings,
    "text_embed": (batch, text_dim), "text_encodings": (batch, length, text_dim), and extra conditions by their names,
    (batch,) or (batch, size); tensors are on the CPU, pinned where there is a CUDA device, and fp32, but categories,
    which are int64. An iteration that was left early is continued by the next one;
    `set_epoch` begins anew. One iterator at a time.

    batch_size: pairs in a batch of one rank.
    seed: of the order; None keeps the order of the shards.
    rank, world_size: which of how many equal parts. Each gets (stop - start) // world_size pairs; the fewer than
        world_size pairs that are left over are given to nobody, or with `pad` every rank gets one pair more, and the
        ranks at the end repeat some that others have.
    prefetch: batches made ahead, by a thread; 0 makes each when it is asked for.
    workers: threads that read buffers ahead.
    drop_last: leave out a last batch that is not full; otherwise it is short, on every rank alike.
    buffer_bytes: of a buffer, within which rows are shuffled; at most workers + 2 are held.

    A shard that turns out unreadable raises ShardError, or, where the shards were opened with on_problem="skip", is
    named in a warning and in `problems`, and other pairs of the same buffer take its places: the number of batches
    stays the same, so that no rank waits for another. So do they with on_bad_rows="skip" where a pair has numbers that
    are not finite; `bad_rows` are the positions of those that were met, and a warning names the first of each file.

    Raises ValueError for arguments out of range, and where the ranks of torch.distributed see different data.
    """

    def __init__(
        self,
        shards: EmbeddingShards,
        *,
        start: int = 0,
        stop: int | None = None,
        batch_size: int,
        seed: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        prefetch: int = 4,
        workers: int = 1,
        drop_last: bool = True,
        pad: bool = False,
        buffer_bytes: int = 2**27,
    ):
        stop = shards.pairs if stop is None else stop
        if not 0 <= start <= stop <= shards.pairs:
            raise ValueError(f"start={start}, stop={stop}; it must be 0 <= start <= stop <= {shards.pairs} pairs")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank}, world_size={world_size}; it must be 0 <= rank < world_size")
        least = dict(batch_size=(batch_size, 1), workers=(workers, 1), prefetch=(prefetch, 0), seed=(seed or 0, 0))
        for name, (value, low) in (least | dict(buffer_bytes=(buffer_bytes, 1))).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"{name}={value!r}; it must be an integer of at least {low}")
        self.shards, self.start, self.stop, self.seed = shards, start, stop, seed
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.prefetch, self.workers, self.drop_last, self.pad = prefetch, workers, drop_last, pad
        self.epoch = 0
        self.sample = 0  # pairs that this rank has given out in this epoch
        self.problems: list[ShardError] = []
        self.bad_rows: set[int] = set()
        self._warned: set[str] = set()
        self.pairs_per_rank = -((start - stop) // world_size) if pad else (stop - start) // world_size
        self._buffer_rows = max(1, buffer_bytes // shards.row_bytes)
        self._edges = np.cumsum([0, *(shard.rows for shard in shards.shards)])
        self._groups = RowGroups(_WINDOW_BYTES * 3 // 2)
        self._pin = torch.cuda.is_available()
        self._check_ranks()

    def __len__(self) -> int:
        """Batches of an epoch, the same on every rank."""
        full = self.pairs_per_rank // self.batch_size
        return full if self.drop_last else -(-self.pairs_per_rank // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        batches = self._batches()
        if self.prefetch:
            batches = made_ahead(batches, self.prefetch)
        try:
            for batch in batches:
                self.sample += len(batch["image_embed"])
                yield batch
        finally:
            batches.close()
        self.set_epoch(self.epoch + 1)

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration begin at the first batch of an epoch."""
        self.epoch, self.sample = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        """Where this stream stands after the batch that was given out last: plain numbers, the same on every rank."""
        return dict(epoch=self.epoch, sample=self.sample) | self._identity()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken; the batch size, workers and prefetching may be others.

        Raises ValueError where the data, their order or, within an epoch, the world size are not those of the state,
        and TypeError for what is no dict; nothing is changed then.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state={quoted(state)}; it must be a dict that `state_dict` gave")
        if missing := [name for name in ("epoch", "sample") if name not in state]:
            raise ValueError(
                f"the state has no {' and no '.join(missing)}; it has {', '.join(map(str, state))[:QUOTED]}"
            )
        for name in "epoch", "sample":
            if type(state[name]) is not int or not 0 <= state[name] < 2**63:
                raise ValueError(f"the state has {name}={quoted(state[name])}; it must be an integer of at least 0")
        for name, value in self._identity().items():
            between_epochs = name in ("world_size", "pad", "buffer_rows") and state["sample"] == 0
            same = state.get(name) == value  # of a tensor it is another
            if not (isinstance(same, (bool, np.bool_)) and same) and not between_epochs:
                raise ValueError(
                    f"the state was taken with {name}={quoted(state.get(name))}, this stream has {name}={value!r}; "
                    "within an epoch it continues only with the same"
                )
        if state["sample"] > self.pairs_per_rank:
            raise ValueError(f"the state has sample={state['sample']}; an epoch has {self.pairs_per_rank} on each rank")
        self.epoch, self.sample = state["epoch"], state["sample"]

    def _identity(self) -> dict[str, Any]:
        """What the order depends on, beside the epoch and the rank."""
        names = ("start", "stop", "seed", "world_size", "pad")
        options = {name: getattr(self, name) for name in names}
        return options | dict(buffer_rows=self._buffer_rows, digest=self.shards.digest)

    def _check_ranks(self) -> None:
        """Every rank opens the shards for itself: one that misses a file would train on other pairs."""
        dist = torch.distributed
        if self.world_size == 1 or not (dist.is_available() and dist.is_initialized()):
            return
        digests: list = [None] * dist.get_world_size()
        dist.all_gather_object(digests, self.shards.digest)
        if len(set(digests)) > 1:
            raise ValueError(f"the ranks see different shards: their digests are {digests}")

    # the order of an epoch

    def _blocks(self, epoch: int) -> _Blocks:
        """All blocks of an epoch, in the order that is divided among the ranks."""
        edges = [self._edges]
        for first, shard in zip(self._edges, self.shards.shards):
            edges += [first + file.edges for file in shard.files.values() if file.edges is not None]
        edges = np.unique(np.concatenate(edges).clip(self.start, self.stop))
        units = np.stack([edges[:-1], edges[1:]])  # runs that are decoded together
        draw = None if self.seed is None else np.random.default_rng([self.seed, epoch])
        if draw is not None:
            units = units[:, draw.permutation(units.shape[1])]
        size = max(1, self._buffer_rows // _BLOCKS_PER_BUFFER)
        counts = -((units[0] - units[1]) // size)
        unit = np.repeat(np.arange(len(counts)), counts)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        starts = units[0, unit] + within * size
        stops = np.minimum(starts + size, units[1, unit])
        if draw is not None:
            decoded = (np.cumsum(units[1] - units[0]) - (units[1] - units[0])) * self._decoded_row_bytes()
            order = np.lexsort([draw.random(len(unit)), decoded[unit] // _WINDOW_BYTES])
            starts, stops = starts[order], stops[order]
        return _Blocks(starts, stops)

    def _decoded_row_bytes(self) -> int:
        files = self.shards.shards[0].files.values()
        return max(1, sum(file.row_bytes for file in files if file.edges is not None))

    def _own_blocks(self, epoch: int) -> _Blocks:
        blocks, rows = self._blocks(epoch), self.pairs_per_rank
        if self.pad and self.stop > self.start:
            blocks = blocks.repeated(-(-rows * self.world_size // (self.stop - self.start)))
        return blocks.cut(self.rank * rows, (self.rank + 1) * rows)

    # reading

    def _batches(self) -> Iterator[dict[str, Any]]:
        """The batches from `self.sample` on."""
        epoch, begin, end = self.epoch, self.sample, self.pairs_per_rank
        if self.drop_last:
            end -= (end - begin) % self.batch_size
        parts, rows = [], 0
        first, at = divmod(begin, self._buffer_rows)
        for buffer in self._buffers(epoch, first, -(-end // self._buffer_rows)):
            while at < len(buffer.order) and begin < end:
                count = min(self.batch_size - rows, len(buffer.order) - at, end - begin)
                parts.append(buffer.take(at, at + count))
                at, begin, rows = at + count, begin + count, rows + count
                if rows == self.batch_size or begin == end:
                    yield self._batch(parts)
                    parts, rows = [], 0
            at = 0

    def _batch(self, parts: list[dict[str, Any]]) -> dict[str, Any]:
        batch = {}
        for name, first in parts[0].items():
            if isinstance(first, list):
                batch[name] = [text for part in parts for text in part[name]]
            else:
                tensor = torch.from_numpy(np.concatenate([part[name] for part in parts]) if parts[1:] else first)
                batch[name] = tensor.pin_memory() if self._pin else tensor
        return batch

    def _buffers(self, epoch: int, first: int, last: int) -> Iterator[_Buffer]:
        """Buffers first to last in order, as many at once in the making as there are workers."""
        blocks, waiting = self._own_blocks(epoch), deque()
        pool = ThreadPoolExecutor(self.workers)
        try:
            for index in range(first, last):
                waiting.append(pool.submit(self._load, blocks, epoch, index))
                if len(waiting) > self.workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _load(self, blocks: _Blocks, epoch: int, index: int) -> _Buffer:
        """A buffer, in which readable rows stand in for those that are not."""
        size, rows = self._buffer_rows, blocks.rows
        count = -(-rows // size)
        length = min(size, rows - index * size)
        order = np.arange(length)
        if self.seed is not None:
            order = np.random.default_rng([self.seed, epoch, self.rank, index]).permutation(length)
        for other in range(index, index + count):  # where nothing of a buffer can be read, the next one's rows
            begin = other % count * size
            columns, good = self._read(blocks.cut(begin, min(begin + size, rows)))
            if good.all() and other == index:
                return _Buffer(columns, order)
            some = np.flatnonzero(good)
            if len(some):
                lost = ~good[order] if other == index else np.ones(length, bool)
                order[lost] = some[np.arange(lost.sum()) % len(some)]
                return _Buffer(columns, order)
        raise ShardError(self.shards.sources["image_embed"], "no pair of this rank's part can be read")

    def _read(self, blocks: _Blocks) -> tuple[dict[str, np.ndarray | pa.Array], np.ndarray]:
        """Columns of the blocks' rows, and which of the rows could be read."""
        rows, at, files = blocks.rows, 0, self.shards.widest
        columns: dict[str, Any] = {
            name: [] if file.dtype == "str" else np.empty((rows, *file.shape), file.dtype)
            for name, file in files.items()
        }
        good = np.ones(rows, bool)
        for start, stop in zip(blocks.starts.tolist(), blocks.stops.tolist()):
            place = slice(at, at + stop - start)
            places = {name: values[place] for name, values in columns.items() if isinstance(values, np.ndarray)}
            try:
                read = self._read_block(start, stop, places)
                good[place] = self._good_rows(start, read)
            except ShardError as error:
                if self.shards.on_problem == "error":
                    raise
                self._note(error)
                good[place] = False
                read = {name: pa.nulls(stop - start, pa.large_string()) for name in columns if name == "text"}
            for name, values in read.items():
                if name not in places:
                    columns[name].append(values)
                elif values is not places[name]:
                    places[name][:] = values
            at = place.stop
        return {n: pa.concat_arrays(v) if isinstance(v, list) else v for n, v in columns.items()}, good

    def _read_block(self, start: int, stop: int, places: dict[str, np.ndarray]) -> dict[str, np.ndarray | pa.Array]:
        index = int(np.searchsorted(self._edges, start, side="right")) - 1
        first = int(self._edges[index])
        files = self.shards.shards[index].files.items()
        rows = start - first, stop - first
        return {name: file.read(*rows, self._groups, places.get(name)) for name, file in files}

    def _good_rows(self, start: int, read: dict[str, np.ndarray | pa.Array]) -> np.ndarray:
        """Which rows of a block to give out: with on_bad_rows="skip", those with finite numbers only."""
        mode, index = self.shards.on_bad_rows, int(np.searchsorted(self._edges, start, side="right")) - 1
        finite = {name: finite_rows(values) for name, values in read.items() if name in CHECKED}
        good = np.logical_and.reduce([*finite.values()])
        if good.all():
            return good
        for name, rows in finite.items():
            path = self.shards.shards[index].files[name].name
            if rows.all() or (path in self._warned and mode != "error"):
                continue
            row = start - int(self._edges[index]) + int(np.argmin(rows))
            what = f"row {row} holds numbers that are not finite"
            if mode == "error":
                raise ShardError(path, f"{what}; {SKIP_HINT}")
            self._warned.add(path)
            place = "another pair takes its place" if mode == "skip" else f"it is given out as it is: {SKIP_HINT}"
            warnings.warn(f"{path}: {what}, others may, too; {place}", stacklevel=2)
        self.bad_rows.update((start + np.flatnonzero(~good)).tolist())
        return good if mode == "skip" else np.ones_like(good)

    def _note(self, error: ShardError) -> None:
        if error.path not in [problem.path for problem in self.problems]:
            self.problems.append(error)
            warnings.warn(f"{error}; other pairs take the places of its pairs", stacklevel=2)


def made_ahead(items: Iterator, depth: int) -> Iterator:
    """Make `items` in a thread, so that `depth` are ready beside the one in the making; closing this stops it."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="fastprior-pairs")
    try:
        waiting = deque(pool.submit(next, items, None) for _ in range(depth + 1))
        while (item := waiting.popleft().result()) is not None:
            waiting.append(pool.submit(next, items, None))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)
        items.close()

"""Shards that one process embeds one after the other, and the share of them that is its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fastprior.checks import check_count
from fastprior.serving.bulk.embedder import Embedder
from fastprior.serving.bulk.inputs import InputShard
from fastprior.serving.bulk.manifest import Manifest


class Summary(NamedTuple):
    """What a run did: shards and rows that it embedded, bad rows among them, and shards that were there."""

    shards: int
    rows: int
    bad_rows: int
    there: int


def share_of(shards: Sequence[InputShard], part: int, parts: int) -> list[InputShard]:
    """Every `parts`-th of the shards, from the one numbered `part` on, which counts from 1."""
    check_count("parts", parts)
    check_count("part", part, most=parts)
    return list(shards[part - 1 :: parts])


def sort_out(shards: Sequence[InputShard], manifest: Manifest, on_bad: str) -> tuple[list[InputShard], int]:
    """Those shards that are still to do, and how many are done."""
    left = [shard for shard in shards if not manifest.is_done(shard, bad_allowed=on_bad == "skip")]
    return left, len(shards) - len(left)


def embed_shards(
    embedder: Embedder,
    shards: Sequence[InputShard],
    manifest: Manifest,
    *,
    begin: Callable[[int], Callable[[int], Any]] = lambda rows: lambda done: None,
) -> Summary:
    """Embed those of the shards that are not done.

    Args:
        embedder: made for the options of the manifest.
        begin: is called with the number of rows to do; what it returns is called with numbers of rows that are done.
    Raises:
        ShardError, OSError: see `Embedder.embed`. Shards that were done before stay.
        KeyboardInterrupt: says how many shards are whole.
    """
    whole = 0
    try:
        embedder.check(list(shards))
        left, there = sort_out(shards, manifest, embedder.on_bad)
        progress, rows, bad = begin(sum(shard.rows for shard in left)), 0, 0
        whole = there
        for shard in left:
            entry = embedder.embed(shard, manifest, progress)
            rows, bad, whole = rows + entry["rows"], bad + entry["bad_rows"], whole + 1
    except KeyboardInterrupt:
        said = f"{whole} of {len(shards)} shards are whole; the same command goes on from there"
        raise KeyboardInterrupt(said) from None
    return Summary(len(left), rows, bad, there)

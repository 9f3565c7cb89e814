"""Shards on Ray: each goes to one of several actors, and to another where its actor died."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from fastprior.checks import check_count
from fastprior.serving.bulk.embedder import Embedder
from fastprior.serving.bulk.inputs import InputShard
from fastprior.serving.bulk.manifest import Manifest
from fastprior.serving.bulk.runs import Summary, sort_out

TRIES = 3  # of a shard whose actors died


class _Worker:
    """An actor: embeds shards with an embedder of its own."""

    def __init__(self, make: Callable[[], Embedder], out: str):
        self._embedder, self._out, self._manifest = make(), out, None

    def embed(self, shard: InputShard) -> tuple[dict | None, str | None]:
        """The entry of a shard, or what its user has to know."""
        try:
            if self._manifest is None:
                self._manifest = Manifest(self._out, self._embedder.run([shard]))  # refuses other weights
            return self._embedder.embed(shard, self._manifest), None
        except (ValueError, OSError) as error:
            return None, str(error)


def _ray() -> Any:
    """The package, connected: to the cluster that RAY_ADDRESS names, or one of this machine, made for this run."""
    try:
        import ray
    except ImportError as error:
        raise ImportError('ray is not installed: pip install "fastprior[ray]"') from error
    if not ray.is_initialized():
        ray.init(logging_level=logging.ERROR, log_to_driver=False)
    return ray


def _resources(ray: Any, actors: int | None, device: str) -> tuple[int, dict[str, int]]:
    """How many actors there are, and what each takes: a GPU, or all cores of a machine; or shares of all cores."""
    there = ray.cluster_resources()
    cores, gpus = int(there.get("CPU", 1)), int(there.get("GPU", 0))
    if device == "cuda":
        if not gpus or (actors or 1) > gpus:
            raise ValueError(f"actors={actors or 1}; Ray has {gpus} GPUs, and each actor takes one")
        count = actors or gpus
        return count, dict(num_gpus=1, num_cpus=max(1, min(4, cores // count)))
    count = actors or len([node for node in ray.nodes() if node["Alive"]])
    if count > cores:
        raise ValueError(f"actors={count}; Ray has {cores} cores, and each actor takes at least one")
    return count, dict(num_cpus=cores // count)


class _Pool:
    """Actors that are given shards, and replaced where they die."""

    def __init__(self, ray: Any, make: Callable[[], Any], count: int):
        self.ray, self.make = ray, make
        self.idle: list[Any] = [make() for _ in range(count)]
        self.busy: dict[Any, tuple[Any, InputShard]] = {}  # by reference of the result

    def give(self, shard: InputShard) -> None:
        worker = self.idle.pop()
        self.busy[worker.embed.remote(shard)] = worker, shard

    def take(self) -> tuple[InputShard, tuple[dict | None, str | None] | None, str]:
        """Wait for a shard: its result, or None where its actor died, and how."""
        (reference,), _ = self.ray.wait(list(self.busy))
        worker, shard = self.busy.pop(reference)
        try:
            result = self.ray.get(reference)
        except self.ray.exceptions.RayActorError as error:
            self.ray.kill(worker)  # one that only cannot be reached must not go on beside its successor
            self.idle.append(self.make())
            return shard, None, str(error)
        self.idle.append(worker)
        return shard, result, ""

    def close(self) -> None:
        for worker in [*self.idle, *(worker for worker, _ in self.busy.values())]:
            self.ray.kill(worker)


def embed_on_ray(
    make: Callable[[], Embedder],
    shards: Sequence[InputShard],
    manifest: Manifest,
    *,
    on_bad: str = "error",
    actors: int | None = None,
    device: str = "cpu",
    begin: Callable[[int], Callable[[int], Any]] = lambda rows: lambda done: None,
) -> Summary:
    """Embed those of the shards that are not done, on actors of Ray.

    A shard whose actor died, with its machine or without, goes to another, up to TRIES times. Folders must be the same
    on all machines.

    Args:
        make: makes an embedder, in the process of each actor.
        manifest: of the same weights and options; actors refuse others.
        on_bad: that of the embedders.
        actors: how many; by default one for each GPU, or for each machine where `device` is "cpu".
        device: "cuda" gives each actor a GPU; "cpu" its share of all cores.
        begin: see `embed_shards`; progress comes by whole shards.
    Raises:
        ImportError: there is no Ray.
        ValueError: there are not so many GPUs or cores; or the message of the error of a shard, or of its dead actors.
        KeyboardInterrupt: says how many shards are whole.
    """
    if actors is not None:
        check_count("actors", actors)
    left, there = sort_out(shards, manifest, on_bad)
    progress, todo, tries = begin(sum(shard.rows for shard in left)), deque(left), dict.fromkeys(map(id, left), 0)
    rows = bad = whole = 0
    if not left:
        return Summary(0, 0, 0, there)
    ray = _ray()
    count, resources = _resources(ray, actors, device)
    kind = ray.remote(_Worker).options(**resources)
    pool = _Pool(ray, lambda: kind.remote(make, os.path.abspath(manifest.out)), min(count, len(left)))
    try:
        while todo or pool.busy:
            while todo and pool.idle:
                pool.give(todo.popleft())
            shard, result, died = pool.take()
            if result is None:
                tries[id(shard)] += 1
                if tries[id(shard)] == TRIES:
                    raise ValueError(f"{shard.name}: {TRIES} actors died of it ({died})")
                todo.append(shard)
                continue
            entry, error = result
            if entry is None:
                raise ValueError(error)
            rows, bad, whole = rows + entry["rows"], bad + entry["bad_rows"], whole + 1
            progress(entry["rows"])
    except KeyboardInterrupt:
        said = f"{there + whole} of {len(shards)} shards are whole; the same command goes on from there"
        raise KeyboardInterrupt(said) from None
    finally:
        pool.close()
    return Summary(whole, rows, bad, there)

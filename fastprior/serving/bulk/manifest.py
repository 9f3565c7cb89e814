"""What is done of a bulk run, and of what it was made: a file for the run, and one for each shard.

Each shard has a file of its own, so several processes that split the shards never write the same one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastprior.reading import quoted, read_json
from fastprior.serving.bulk.inputs import InputShard
from fastprior.utils import atomic, remove_leftovers, temporary_folder

FOLDER, RUN = "manifest", "run.json"
IMAGES, METADATA = "img_emb", "metadata"
FORMAT = 1


def _text(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def _create(path: Path, text: str) -> None:
    """Write a file unless there is one: of several processes that do so, one wins."""
    with temporary_folder(path) as folder:
        made = folder / path.name
        with made.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(made, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            os.replace(made, path)


class Manifest:
    """The manifest of an output folder.

    Args:
        out: the folder; made where there is none.
        run: what results depend on, hash of the weights and options, as JSON has it.

    Raises:
        ValueError: the folder was made with other weights or options, which are named; or holds embeddings or metadata
            that no bulk run wrote.
        OSError: it cannot be written.
    """

    def __init__(self, out: str | os.PathLike, run: Mapping[str, Any]):
        self.out = Path(out)
        self.run = json.loads(json.dumps({"format": FORMAT, **run}))
        self.digest = hashlib.sha256(_text(self.run).encode()).hexdigest()
        for folder in (FOLDER, IMAGES, METADATA):
            if (self.out / folder).exists() and not (self.out / folder).is_dir():
                raise NotADirectoryError(f"{self.out / folder} is a file; it must be a folder")
        path = self.out / FOLDER / RUN
        if not path.exists():
            self._check_free()
            path.parent.mkdir(parents=True, exist_ok=True)
            _create(path, _text(self.run))
        self._compare(read_json(path))
        for folder in (IMAGES, METADATA):
            (self.out / folder).mkdir(exist_ok=True)
        for name in (f"{FOLDER}/{{}}.json", f"{IMAGES}/{{}}.npy", f"{METADATA}/{{}}.parquet"):
            remove_leftovers(self.out / name)  # of killed runs, also where nothing is written again

    def _check_free(self) -> None:
        """Raise ValueError where there are files that would be mistaken for a bulk run's, or overwritten."""
        for folder in (IMAGES, METADATA):
            if found := next((path for path in (self.out / folder).glob("*") if path.name[0] != "."), None):
                raise ValueError(f"{found} was not written by a bulk run; choose another folder than {self.out}")

    def _compare(self, found: Mapping[str, Any]) -> None:
        names = [name for name in {**found, **self.run} if found.get(name) != self.run.get(name)]
        if names:
            told = [f"{name} {quoted(found.get(name))}, not {quoted(self.run.get(name))}" for name in sorted(names)]
            raise ValueError(f"{self.out} was made with {'; '.join(told)}; choose another folder")

    def image_path(self, shard: InputShard) -> Path:
        return self.out / IMAGES / f"img_emb_{shard.digits}.npy"

    def metadata_path(self, shard: InputShard) -> Path | None:
        return self.out / METADATA / f"metadata_{shard.digits}.parquet" if shard.metadata else None

    def _entry_path(self, shard: InputShard) -> Path:
        return self.out / FOLDER / f"shard_{shard.digits}.json"

    def entry(self, shard: InputShard) -> dict | None:
        """What is known of a shard that was done; None where it was not, or its entry is unreadable."""
        try:
            return read_json(self._entry_path(shard))
        except (FileNotFoundError, ValueError):
            return None

    def is_done(self, shard: InputShard, bad_allowed: bool = True) -> bool:
        """Whether a shard was done of the same input files, and what was written is there.

        A file of another time is read, and is the same where its bytes are.

        Args:
            bad_allowed: whether it may have rows of NaN.
        """
        entry = self.entry(shard)
        if entry is None or entry.get("run") != self.digest or entry.get("rows") != shard.rows:
            return False
        if entry.get("bad_rows") and not bad_allowed:
            return False
        try:
            outputs = {self.out / name: size for name, size in entry["outputs"].items()}
            if any(not path.is_file() or path.stat().st_size != size for path, size in outputs.items()):
                return False
            if set(outputs) != {path for path in (self.image_path(shard), self.metadata_path(shard)) if path}:
                return False
            known = [dict(one) for one in entry["inputs"]]
            hashes = [one.pop("sha256") for one in known]
        except (KeyError, TypeError, AttributeError, ValueError):
            return False
        now = shard.identities()
        if known == now and all(one["mtime_ns"] is not None for one in known):
            return True
        timeless = [[{**one, "mtime_ns": None} for one in files] for files in (known, now)]
        return timeless[0] == timeless[1] and hashes == shard.hashes()

    def forget(self, shard: InputShard) -> None:
        """Drop a shard's entry, before what it tells of is overwritten."""
        self._entry_path(shard).unlink(missing_ok=True)

    def write_entry(self, shard: InputShard, inputs: list[dict], bad: list[int]) -> dict:
        """Note that a shard is done, whose files are whole by now: its entry.

        Args:
            inputs: what its files were when they were read, with `sha256`.
            bad: numbers of the rows that are NaN.
        """
        paths = [path for path in (self.image_path(shard), self.metadata_path(shard)) if path]
        entry = dict(
            run=self.digest,
            shard=shard.name,
            rows=shard.rows,
            bad_rows=len(bad),
            first_bad_rows=bad[:100],
            inputs=inputs,
            outputs={str(path.relative_to(self.out)): path.stat().st_size for path in paths},
        )
        with atomic(self._entry_path(shard)) as temporary:
            temporary.write_text(_text(entry))
        return entry

    def strangers(self, shards: list[InputShard]) -> list[str]:
        """Names of embeddings in the folder that are of none of these shards, and would be read with theirs."""
        own = {self.image_path(shard).name for shard in shards}
        return sorted(path.name for path in (self.out / IMAGES).glob("*.npy") if path.name not in own)

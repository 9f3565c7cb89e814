"""What folders of embeddings and captions hold: shards matched by number and checked before anything is trained."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from fastprior.dataloaders.files import RowGroups, ShardError, ShardFile, finite_rows
from fastprior.dataloaders.match import Norms, Shard, match_folders, number_columns, title

if TYPE_CHECKING:
    from fastprior.prior.diffusion_prior import DiffusionPrior


CHECKED = "image_embed", "text_embed", "text_encodings"  # conditions may lack: NaN is their null
_CHECK_BYTES = 2**26


@dataclass(frozen=True)
class EmbeddingShards:
    """Pairs of image embeddings and texts, in shards; made by `EmbeddingShards.open`.

    Attributes:
        shards: those that can be used, by rising number.
        problems: what is wrong with the others, and with files that belong to none; each begins with a file's name.
        notes: what may be meant, but is worth knowing: embeddings that are not normalised, captions that are missing.
        norms: of each column of embeddings, over a small sample.
        on_problem: "error" or "skip", also for what only shows when rows are read.
        on_bad_rows: None, "error" or "skip", see `open`.
    """

    shards: list[Shard]
    problems: list[ShardError]
    on_problem: str
    sources: dict[str, str]
    notes: list[str] = field(default_factory=list)
    norms: dict[str, Norms] = field(default_factory=dict)
    on_bad_rows: str | None = None

    @classmethod
    def open(
        cls,
        image_url: str | os.PathLike,
        meta_url: str | os.PathLike | None = None,
        text_url: str | os.PathLike | None = None,
        encodings_url: str | os.PathLike | None = None,
        *,
        conditions: Mapping[str, tuple[str, str]] | None = None,
        file_format: str | None = None,
        on_problem: str = "error",
        on_bad_rows: str | None = None,
        caption_column: str = "caption",
        embedding_column: str = "embedding",
    ) -> EmbeddingShards:
        """Match the files of all folders by the number in their names, and check them by their headers.

        image_url: folder (or anything fsspec opens: s3://, hdfs://, http://) of .npy files (rows, dim), fp16, fp32 or
            fp64, which is rounded to fp32 (one beside the other, too, and in any order of axes and bytes);
            of parquet files with a column of embeddings; or of a webdataset's tars. Captions and further embeddings in
            those parquet files or tars are used where no folder is given for them.
        meta_url: folder of parquet files with captions. text_url: of text embeddings, .npy or parquet.
        encodings_url: of text encodings, .npy (rows, length, dim).
        conditions: of extra conditions by name, ("scalar" or "category", a column of the parquet files of meta_url), or
            ("vector", a folder of .npy files (rows, size)).
        file_format: of the images, "npy", "parquet_npy" (which is npy), "parquet" or "webdataset"; by default that of
            the files that are there.
        on_problem: "error" raises ValueError that names every file that is missing, left over, corrupt, of another
            length than its partner, or of another width than most; "skip" leaves their shards out. Shards without
            rows are left out, and noted.
        on_bad_rows: about rows of embeddings and encodings with numbers that are not finite. By default a shard is a
            problem where its sample shows one, and those met later are named in a warning and given out; "error" makes
            a ShardError of those, too; "skip" leaves such pairs out, whatever their columns, with rows that are missing
            or of another width in parquet files and tars.

        Raises FileNotFoundError where a folder holds no such files, ValueError where no shard can be used.
        """
        if on_problem not in ("error", "skip"):
            raise ValueError(f'on_problem={on_problem!r}; it must be "error" or "skip"')
        if on_bad_rows not in (None, "error", "skip"):
            raise ValueError(f'on_bad_rows={on_bad_rows!r}; it must be None, "error" or "skip"')
        sources = dict(image_embed=image_url, text=meta_url, text_embed=text_url, text_encodings=encodings_url)
        for name, url in zip(("image_url", "meta_url", "text_url", "encodings_url"), sources.values()):
            if not isinstance(url, (str, os.PathLike)) and (url is not None or name == "image_url"):
                raise TypeError(f"{name}={url!r}; it must be a path or an url")
        sources = {column: os.fspath(url) for column, url in sources.items() if url is not None}
        numbers = number_columns(conditions or {}, "text" in sources)
        sources |= {name: os.fspath(source) for name, (kind, source) in (conditions or {}).items() if kind == "vector"}
        names = dict(text=caption_column, image_embed=embedding_column, text_embed=embedding_column)
        matches = match_folders(sources, file_format, names, numbers, on_bad_rows)
        if matches.problems and on_problem == "error":
            listed = "\n".join(f"  {problem}" for problem in matches.problems)
            raise ValueError(f"{len(matches.problems)} problems with the data:\n{listed}")
        shards = [matches.shards[number] for number in sorted(matches.shards)]
        if not shards:
            why = "\n".join(f"  {problem}" for problem in matches.problems) or "  all files are empty"
            raise ValueError(f"{sources['image_embed']}: no shard can be used:\n{why}")
        sources |= dict.fromkeys(numbers, sources.get("text"))
        return cls(shards, matches.problems, on_problem, sources, matches.notes, matches.norms, on_bad_rows)

    @property
    def pairs(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def columns(self) -> tuple[str, ...]:
        """Keys of the batches: "image_embed"; of "text", "text_embed", "text_encodings" what is there; conditions."""
        return tuple(self.shards[0].files)

    @property
    def dim(self) -> int:
        return self.shards[0].files["image_embed"].shape[0]

    @cached_property
    def widest(self) -> dict[str, ShardFile]:
        """The file of each column whose dtype is the widest, as which the rows of all are read."""
        files = zip(*(shard.files.values() for shard in self.shards))
        return {column: max(each, key=lambda file: file.row_bytes) for column, each in zip(self.columns, files)}

    @property
    def dtype(self) -> str:
        return self.widest["image_embed"].dtype

    def bounds(self, column: str) -> tuple[float, float] | None:
        """The lowest and highest number of a scalar or category, as far as the files' headers say."""
        found = [file.bounds for file in (shard.files[column] for shard in self.shards) if file.bounds is not None]
        return (min(low for low, _ in found), max(high for _, high in found)) if found else None

    @property
    def row_bytes(self) -> int:
        """Bytes of a pair, with captions as estimated."""
        return sum(file.row_bytes for file in self.widest.values())

    @cached_property
    def digest(self) -> str:
        """Equal for the same shards in the same order, wherever they lie."""
        lines = [
            (shard.number, [(c, f.rows, f.dtype, f.shape) for c, f in shard.files.items()]) for shard in self.shards
        ]
        return hashlib.sha256(repr(lines).encode()).hexdigest()[:16]

    def count_bad_rows(self) -> dict[str, int]:
        """Read all rows of embeddings and encodings: how many pairs of which image file have numbers not finite."""
        counts = {}
        for shard in self.shards:
            files = [file for column, file in shard.files.items() if column in CHECKED]
            step, groups, found = max(1, _CHECK_BYTES // self.row_bytes), RowGroups(_CHECK_BYTES), 0
            for start in range(0, shard.rows, step):
                stop = min(start + step, shard.rows)
                good = [finite_rows(file.read(start, stop, groups)) for file in files]
                found += int((~np.logical_and.reduce(good)).sum())
            if found:
                counts[shard.files["image_embed"].name] = found
        return counts

    def report(self) -> str:
        """What is there and what is wrong, as text of several lines."""
        rows = []
        for column in self.columns:
            file, norms = self.shards[0].files[column], self.norms.get(column)
            shape = f", {' x '.join(map(str, file.shape))}" if file.shape else ""
            dtypes = " and ".join(sorted({shard.files[column].dtype for shard in self.shards}))
            kind = "text" if column == "text" else f"{dtypes}{shape}"
            if norms:
                kind += f", norms {norms.low:.4g} to {norms.high:.4g} in a sample of {norms.rows}"
            rows.append((title(column), f"{self.sources.get(column, self.sources['image_embed'])}: {kind}"))
        rows.append(("shards", str(len(self.shards))))
        rows.append(("pairs", f"{self.pairs:,}"))
        rows += [("note", note) for note in self.notes]
        rows += [("problem", str(problem)) for problem in self.problems] or [("problems", "none")]
        return "\n".join(f"{name:<17} {text}" for name, text in rows)


def check_conditions(shards: EmbeddingShards, prior: DiffusionPrior, columns: Iterable[str]) -> None:
    """Raise ValueError, naming the keys of the config, where the data do not fit the network's text and conditions.

    columns: those that the prior gets of text embeddings and encodings.
    """
    net, files = prior.net, shards.shards[0].files
    widths = dict(text_embed=("text_url", "text_embed_dim"), text_encodings=("encodings_url", "text_dim"))
    for column, (url, key) in widths.items():
        if column in columns and files[column].shape[-1] != getattr(net, key):
            given, wanted = files[column].shape[-1], getattr(net, key)
            raise ValueError(f"data.{url} has {title(column)} of {given}; prior.net.{key} makes it {wanted}")
    for name, condition in (net.conditions or {}).items():
        if files[name].shape != condition.shape:
            sizes = f"{files[name].shape[0]}; prior.net.conditions.{name}.size={condition.shape[0]}"
            raise ValueError(f"data.conditions.{name} has vectors of {sizes}")
        bounds = shards.bounds(name) if condition.shape == () else None
        if bounds and not all(map(math.isfinite, bounds)):
            raise ValueError(f"data.conditions.{name} holds infinity; a value that is missing must be null or NaN")
        if bounds and bounds[1] >= getattr(condition, "size", math.inf):
            size = f"prior.net.conditions.{name}.size={condition.size}"
            raise ValueError(f"data.conditions.{name} holds {bounds[1]}; it must be below {size}")

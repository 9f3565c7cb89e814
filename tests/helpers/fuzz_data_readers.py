"""Readers of data: shards of embeddings and captions, streams of them, and arrays."""

import io
import json
import shutil
import tarfile

import numpy as np
import torch

from helpers.fuzz_reader import Reader, Wrong

ROWS, DIM = 12, 8


def _rows(seed, dtype="float32"):
    rows = np.random.default_rng(seed).standard_normal((ROWS, DIM))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(dtype)


def _captions(count=ROWS):
    return [f"caption {row}" for row in range(count)]


def _make_npy(root):
    kinds = dict(
        half=_rows(0, "float16"), full=_rows(1), columns=np.asfortranarray(_rows(2)), double=_rows(3, "float64")
    )
    for name, rows in kinds.items():
        (root / name / "images").mkdir(parents=True)
        (root / name / "texts").mkdir()
        for number in range(1 + (name in ("half", "full"))):
            np.save(root / name / "images" / f"img_emb_{number}.npy", rows)
            np.save(root / name / "texts" / f"text_emb_{number}.npy", _rows(8 + number, ("float32", "float16")[number]))
    return [root / name for name in kinds]


def _drain(shards):
    from fastprior.dataloaders import PairStream

    for batch in PairStream(shards, batch_size=5, seed=0, prefetch=0, drop_last=False):
        for name, value in batch.items():
            if len(value) != len(batch["image_embed"]):
                raise Wrong(f"{name} has {len(value)} rows")
            if torch.is_tensor(value) and value.dtype != (torch.int64 if name == "place" else torch.float32):
                raise Wrong(f"{name} is {value.dtype}")
            if name == "text" and not all(isinstance(text, str) for text in value):
                raise Wrong("a caption is no string")
            if name in ("image_embed", "text_embed", "text_encodings") and not value.isfinite().all():
                raise Wrong(f"{name} is not finite, with on_bad_rows")


def _open(folder, **options):
    from fastprior.dataloaders import EmbeddingShards

    options = {name: folder / url if name.endswith("_url") else url for name, url in options.items()}
    skip = len(list((folder / "images").iterdir())) > 1
    how = dict(on_problem="skip", on_bad_rows="skip") if skip else dict(on_problem="error", on_bad_rows="error")
    shards = EmbeddingShards.open(folder / "images", **options, **how)
    shards.report()
    shards.count_bad_rows()
    return shards


def _read_npy(folder):
    _drain(_open(folder, text_url="texts"))


def _make_parquet(root):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [row.tolist() for row in _rows(0)]
    kinds = dict(
        both=dict(embedding=pa.array(rows, pa.list_(pa.float32())), caption=_captions()),
        fixed=dict(embedding=pa.FixedSizeListArray.from_arrays(pa.array(_rows(0).ravel()), DIM), caption=_captions()),
        gaps=dict(
            embedding=pa.array([*rows[:-1], None], pa.large_list(pa.float16())), caption=[*_captions()[:-1], None]
        ),
    )
    options = dict(
        both=dict(compression="snappy", row_group_size=5), fixed=dict(compression="zstd"), gaps=dict(compression="none")
    )
    for name, columns in kinds.items():
        (root / name / "images").mkdir(parents=True)
        numbers = dict(age=[0.5] * (ROWS - 1) + [None], place=list(range(ROWS)))
        for number in range(1 + (name == "gaps")):
            pq.write_table(
                pa.table(columns | numbers), root / name / "images" / f"part-{number}.parquet", **options[name]
            )
        shutil.copytree(root / name / "images", root / name / "captions")
    return [root / name for name in kinds]


def _read_parquet(folder):
    columns = dict(age=("scalar", "age"), place=("category", "place"))
    _drain(_open(folder, meta_url="captions", conditions=columns))


def _make_tar(root):
    for kind in "txt", "json":
        (root / kind / "images").mkdir(parents=True)
        with tarfile.open(root / kind / "images" / "0.tar", "w") as tar:
            for row, values in enumerate(_rows(0)[:6]):
                buffer = io.BytesIO()
                np.save(buffer, values if kind == "txt" else values[None].astype(np.float16))
                caption = f"caption {row}" if kind == "txt" else json.dumps(dict(caption=f"caption {row}", width=3))
                for ending, data in ("npy", buffer.getvalue()), (kind, caption.encode()):
                    info = tarfile.TarInfo(f"{row:05}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return [root / "txt", root / "json"]


def _read_tar(folder):
    _drain(_open(folder))


def _make_readers(root):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (root / "both" / "images").mkdir(parents=True)
    (root / "both" / "captions").mkdir()
    for number in 0, 1:
        np.save(root / "both" / "images" / f"img_emb_{number}.npy", _rows(number, "float16"))
        pq.write_table(pa.table(dict(caption=_captions())), root / "both" / "captions" / f"metadata_{number}.parquet")
    return [root / "both"]


def _read_readers(folder):
    """DALLE2-pytorch's readers."""
    from fastprior.dataloaders import get_reader, make_splits

    reader = get_reader(True, str(folder / "images"), str(folder / "captions"), on_bad_rows="error")
    for images, tokens in make_splits(True, 5, reader.count, 1.0, 0.0, reader)[0]:
        if not images.isfinite().all() or len(images) != len(tokens):
            raise Wrong("images are not finite, or not as many as texts")


def _make_stream(root):
    """Where a stream stood, as a trainer's checkpoint keeps it."""
    from fastprior.dataloaders import EmbeddingShards, PairStream

    _make_npy(root)
    shards = _STREAM["shards"] = EmbeddingShards.open(root / "half" / "images")
    stream = PairStream(shards, batch_size=5, seed=0, prefetch=0)
    next(iter(stream))
    (root / "state").mkdir()
    (root / "state" / "state.json").write_text(json.dumps(stream.state_dict()))
    return [root / "state"]


_STREAM: dict = {}


def _read_stream(folder):
    from fastprior.dataloaders import PairStream
    from fastprior.reading import read_bytes

    try:
        state = json.loads(read_bytes(folder / "state.json"))
    except (ValueError, OSError, RecursionError):
        return
    stream = PairStream(_STREAM["shards"], batch_size=5, seed=0, prefetch=0)
    before = stream.state_dict()
    try:
        stream.load_state_dict(state)
    except Exception as error:
        if stream.state_dict() != before:
            raise Wrong(f"half loaded before {error!r}") from error
        raise
    if type(stream.epoch) is not int or type(stream.sample) is not int:
        raise Wrong(f"epoch={stream.epoch!r}, sample={stream.sample!r}")
    for _ in stream:
        pass


def _make_array(root):
    """What `fastprior sample` takes."""
    (root / "array").mkdir()
    np.save(root / "array" / "array.npy", _rows(0))
    return [root / "array"]


def _read_array(folder):
    from fastprior.cli.prompts import load_array

    load_array(str(folder / "array.npy"), "--text-embed", 2, torch.device("cpu"))


READERS = {
    "npy": Reader(_make_npy, _read_npy),
    "parquet": Reader(_make_parquet, _read_parquet),
    "tar": Reader(_make_tar, _read_tar),
    "readers": Reader(_make_readers, _read_readers),
    "stream": Reader(_make_stream, _read_stream, ("state",)),
    "array": Reader(_make_array, _read_array),
}

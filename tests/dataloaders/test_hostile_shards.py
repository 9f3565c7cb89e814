"""Files of shards that change while they are read, lie about themselves, or are no files: one clear error each."""

import io
import os
import pickle
import re
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from fastprior.dataloaders import EmbeddingShards, PairStream, ShardError, files
from fastprior.dataloaders.files import RowGroups
from helpers.command_line import error_of, run
from helpers.shard_cases import DIM, SIZES, image, metadata, open_captions, rows_of, write, write_captions


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "data")


def file_of(shards, column, number=2):
    return next(shard.files[column] for shard in shards.shards if shard.number == number)


def read(file):
    return file.read(0, file.rows, RowGroups(2**20))


# files that change


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_file_that_is_cut_short_after_it_was_opened(folder, order):
    np.save(image(folder, 2), np.asarray(rows_of(2, SIZES[2]), order=order))
    file = file_of(open_captions(folder), "image_embed")
    size = image(folder, 2).stat().st_size
    os.truncate(image(folder, 2), 200)
    with pytest.raises(ShardError, match=rf"img_emb_2.npy: has 200 bytes, and had {size} when it was opened"):
        read(file)
    file.size = 200  # as if it were cut between that look and the read
    with pytest.raises(ShardError, match=r"img_emb_2.npy: truncated while it was read"):
        read(file)


def test_a_parquet_file_that_is_cut_short_or_replaced(folder):
    file = file_of(open_captions(folder), "text")
    os.truncate(metadata(folder, 2), 200)
    with pytest.raises(ShardError, match=r"metadata_2.parquet: cannot be read"):
        read(file)
    write_captions(metadata(folder, 2), ["other"] * 7)
    with pytest.raises(ShardError, match=r"metadata_2.parquet: row group 0 has 7 rows, and 13 by its header"):
        read(file)


def test_others_take_the_places_of_what_is_cut_short(folder):
    shards = open_captions(folder, on_problem="skip")
    stream = PairStream(shards, batch_size=10, seed=0, prefetch=0, buffer_bytes=2000)
    os.truncate(image(folder, 2), 200)
    with pytest.warns(UserWarning, match=r"img_emb_2.npy: has 200 bytes"):
        batches = list(stream)
    assert len(batches) == len(stream) and [p.path for p in stream.problems] == [str(image(folder, 2))]


def test_rows_are_read_into_their_place(folder):
    file = file_of(open_captions(folder), "image_embed")
    place = np.empty((7, DIM), np.float16)
    assert file.read(3, 10, RowGroups(0), place) is place
    np.testing.assert_array_equal(place, rows_of(2, SIZES[2])[3:10])
    for other in np.empty((7, DIM), np.float32), np.empty((DIM, 7), np.float16).T:
        np.testing.assert_array_equal(file.read(3, 10, RowGroups(0), other), place)


# what is no file


def make_fifo(path):
    os.mkfifo(path)


def make_loop(path):
    path.symlink_to(path.name)


def make_device(path):
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [make_fifo, make_loop, make_device])
@pytest.mark.parametrize("kind", ["npy", "parquet", "tar"])
def test_what_is_no_file_is_not_waited_for(tmp_path, make, kind):
    make(tmp_path / f"0.{kind}")
    with pytest.raises(ValueError, match=rf"0\.{kind}: cannot be read|0\.{kind} is a"):
        EmbeddingShards.open(tmp_path)


@pytest.mark.parametrize("name", [b"a\n_%d.npy", b"a\xff_%d.npy", b"a\x1b[31m_%d.npy"])
def test_names_are_shown_as_they_can_be_printed(tmp_path, name, capsys):
    for number in 0, 1:
        np.save(os.fsdecode(bytes(tmp_path) + b"/" + name % number), rows_of(0, 5))
    assert EmbeddingShards.open(tmp_path).pairs == 10
    os.truncate(bytes(tmp_path) + b"/" + name % 0, 200)
    with pytest.raises(ValueError, match="_0.npy: truncated") as caught:
        EmbeddingShards.open(tmp_path)
    assert all(c.isprintable() for c in str(caught.value).replace("\n  ", ""))
    status, out, _ = run(capsys, "inspect", tmp_path)
    assert status == 1 and "_0.npy: truncated" in out


# headers that lie


class Run:
    def __reduce__(self):
        return os.mkdir, ("was-run",)


@pytest.mark.parametrize("shape", [(10**18, 8), (-1, -8), (True, 8), (2**62, 2**62), (0, 10**18)], ids=str)
def test_shapes_that_no_file_has(tmp_path, shape):
    header = dict(descr="<f4", fortran_order=False, shape=shape)
    with open(tmp_path / "0.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.write(bytes(32))
    with pytest.raises(ValueError, match=r"0.npy: (truncated|too long|has the shape)"):
        EmbeddingShards.open(tmp_path)


def test_objects_are_never_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("0.npy", np.array([[Run()]], object), allow_pickle=True)
    with pytest.raises(ValueError, match="0.npy: holds object"):
        EmbeddingShards.open(tmp_path)
    (tmp_path / "0.npy").write_bytes(pickle.dumps(Run()))
    with pytest.raises(ValueError, match="0.npy: cannot be read"):
        EmbeddingShards.open(tmp_path)
    assert not (tmp_path / "was-run").exists()


def test_a_row_group_that_decodes_to_more_than_its_limit(folder, monkeypatch):
    write_captions(metadata(folder, 2), ["long " * 2000] * SIZES[2])
    assert metadata(folder, 2).stat().st_size < 20_000
    file = file_of(open_captions(folder), "text")
    assert len(read(file)) == SIZES[2]
    monkeypatch.setattr(files, "_GROUP_BYTES", 2**18)
    monkeypatch.setattr(files, "_BATCH_ROWS", 10)
    with pytest.raises(ShardError, match=r"metadata_2.parquet: row group 0 holds over"):
        read(file)


def test_captions_that_are_no_text(folder):
    path = metadata(folder, 2)
    write_captions(path, ["a", *["words"] * (SIZES[2] - 2), "z"])  # not the least or greatest, which the footer has
    path.write_bytes(path.read_bytes().replace(b"words", b"wo\xffds"))
    with pytest.raises(ShardError, match=f"{path.name}: cannot be read .*UTF"):
        read(file_of(open_captions(folder), "text"))


def test_parquet_types_that_are_no_embeddings(tmp_path):
    for kind in pa.list_(pa.list_(pa.float32())), pa.struct([("a", pa.float32())]), pa.map_(pa.string(), pa.float32()):
        pq.write_table(pa.table(dict(embedding=pa.array([None] * 3, kind))), tmp_path / "0.parquet")
        with pytest.raises(ValueError, match=r"0.parquet: "):
            EmbeddingShards.open(tmp_path)


@pytest.mark.slow
def test_footers_at_which_pyarrow_would_end_the_process(folder):
    """A bit is flipped in each byte of where the row groups are described."""
    data = metadata(folder, 2).read_bytes()
    length = int.from_bytes(data[-8:-4], "little")
    body, footer = data[: -8 - length], data[-8 - length : -8]
    for at in range(footer.index(b"caption") + 7, footer.index(b"ARROW:schema")):
        changed = footer[:at] + bytes([footer[at] ^ 0x10]) + footer[at + 1 :]
        metadata(folder, 2).write_bytes(body + changed + data[-8:])
        try:
            read(file_of(open_captions(folder), "text"))
        except ValueError as error:
            assert "metadata_2.parquet" in str(error)


# tars


def member(name, data=b"", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))


def sample(number, values=None):
    buffer = io.BytesIO()
    np.save(buffer, rows_of(0, 9)[number] if values is None else values)
    return buffer.getvalue()


def test_nothing_of_a_tar_is_unpacked(tmp_path):
    (tmp_path / "shards").mkdir()
    odd = (
        member("/abs.npy", sample(0)),
        member("../up.npy", sample(1)),
        member("link.npy", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        member("hard.npy", type=tarfile.LNKTYPE, linkname="../up.npy"),
        member("fifo.npy", type=tarfile.FIFOTYPE),
        member("device.npy", type=tarfile.CHRTYPE),
        member("folder.npy", type=tarfile.DIRTYPE),
    )
    write_tar(tmp_path / "shards" / "0.tar", odd)
    shards = EmbeddingShards.open(tmp_path / "shards")
    np.testing.assert_array_equal(read(shards.shards[0].files["image_embed"]), rows_of(0, 9)[:2])
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["0.tar", "shards"]


def test_a_sample_that_stands_twice_in_a_tar(tmp_path):
    """The last counts, wherever it stands."""
    write_tar(tmp_path / "0.tar", [member(f"{n % 3}.npy", sample(n)) for n in range(4)])
    file = EmbeddingShards.open(tmp_path).shards[0].files["image_embed"]
    np.testing.assert_array_equal(read(file), rows_of(0, 9)[[3, 1, 2]])


def test_sizes_in_a_tar_that_its_file_has_not(tmp_path):
    write_tar(tmp_path / "0.tar", [member("0.npy", sample(0)), member("1.npy", sample(1))])
    data = bytearray((tmp_path / "0.tar").read_bytes())
    info = member("1.npy")[0]
    info.size = 10**12
    data[1024:1536] = info.tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "0.tar").write_bytes(data)
    with pytest.raises(ValueError, match=r"0.tar: cannot be read"):
        EmbeddingShards.open(tmp_path)


# where a stream stood


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(sample=-1), "sample=-1; it must be an integer of at least 0"),
        (dict(sample=10**6), "sample=1000000; an epoch has"),
        (dict(sample=1.0), "sample=1.0; it must be"),
        (dict(epoch=True), "epoch=True; it must be"),
        (dict(epoch="x" * 10**6), "epoch='xxx"),
        (dict(seed=torch.zeros(3)), "was taken with seed="),
        (dict(digest=[1]), "was taken with digest="),
    ],
)
def test_states_that_no_stream_had(folder, change, message):
    stream = PairStream(open_captions(folder), batch_size=10, seed=0)
    before = stream.state_dict()
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        stream.load_state_dict({**before, **change})
    assert stream.state_dict() == before and len(str(caught.value)) < 1000
    with pytest.raises(TypeError, match=r"state=\[1\]; it must be a dict"):
        stream.load_state_dict([1])


@pytest.mark.parametrize("content", [b"", b"x", b"PK\3\4", b"\x93NUMPY\1\0v\0" + b"(" * 118, pickle.dumps(Run())])
def test_arrays_of_the_command_line(tmp_path, content, capsys, monkeypatch):
    import fastprior
    from helpers.priors import make_prior

    monkeypatch.chdir(tmp_path)
    fastprior.save(make_prior(), tmp_path / "prior.safetensors")
    (tmp_path / "a.npy").write_bytes(content)
    argv = "sample", "--checkpoint", "prior.safetensors", "--out", "o.npy", "--text-embed", "a.npy"
    assert "--text-embed a.npy is not a .npy file of numbers" in error_of(capsys, *argv)
    (tmp_path / "a.npy").unlink()
    os.mkfifo(tmp_path / "a.npy")
    assert "a.npy is a FIFO" in error_of(capsys, *argv)
    assert not (tmp_path / "was-run").exists()

"""What scripts keep beside weights is read as plain values, nothing of it runs, and what is no checkpoint is named."""

import argparse
import collections
import datetime
import gzip
import io
import json
import pathlib
import pickle
import sys
import tarfile
import types
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from fastprior.weight_files.safe import read_any_file, read_file
from fastprior.weight_files.standins import Inert

NOW = datetime.datetime(2024, 2, 29, 12, 30, tzinfo=datetime.timezone.utc)
VALUES = {  # what is pickled, and what it is read as
    "float64": (np.float64(1.5), 1.5),
    "float16": (np.float16(0.5), 0.5),
    "int64": (np.int64(-7), -7),
    "uint8": (np.uint8(7), 7),
    "bool": (np.bool_(True), True),
    "complex": (np.complex64(1 + 2j), 1 + 2j),
    "string": (np.str_("é7"), "é7"),
    "big-endian": (np.array([3.25], ">f8")[0], 3.25),
    "namespace": (argparse.Namespace(lr=np.float64(0.1), of=argparse.Namespace(a=[1])), {"lr": 0.1, "of": {"a": [1]}}),
    "simple namespace": (types.SimpleNamespace(a=1), {"a": 1}),
    "ordered": (collections.OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
    "defaultdict": (collections.defaultdict(list, a=[1]), {"a": [1]}),
    "counter": (collections.Counter("aab"), {"a": 2, "b": 1}),
    "deque": (collections.deque([1, 2], maxlen=3), [1, 2]),
    "path": (pathlib.PurePosixPath("a/b.pt"), "a/b.pt"),
    "windows path": (pathlib.PureWindowsPath("c:/a"), "c:\\a"),
    "size": (torch.Size([1, 2]), torch.Size([1, 2])),
    "dtype": (torch.bfloat16, torch.bfloat16),
    "device": (torch.device("cuda:1"), torch.device("cuda:1")),
    "version": (torch.__version__, str(torch.__version__)),
    "times": ([NOW, NOW.date(), datetime.timedelta(1)], [NOW, NOW.date(), datetime.timedelta(1)]),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", VALUES)
def test_values_beside_weights(tmp_path, name, zipped):
    value, wanted = VALUES[name]
    weights = torch.arange(3.0)
    file = tmp_path / "file.pt"
    torch.save({"args": value, "model": {"w": weights}}, file, _use_new_zipfile_serialization=zipped)
    payload, header = read_file(file)[:2]
    assert header is None and torch.equal(payload["model"]["w"], weights)
    assert payload["args"] == wanted
    assert type(payload["args"]).__module__.partition(".")[0] not in ("numpy", "argparse", "pathlib")


class Modules:
    """Makes modules with classes for the time of a test, whose instances can be pickled and not imported after."""

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch

    def make(self, name, kind=object):
        module, _, attribute = name.rpartition(".")
        made = type(attribute, (kind,), {"__module__": module})
        parts = module.split(".")
        for end in range(len(parts)):
            parent = ".".join(parts[: end + 1])
            self.monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        setattr(sys.modules[module], attribute, made)
        return made


@pytest.fixture
def modules(monkeypatch):
    return Modules(monkeypatch)


def test_configurations_of_other_packages(tmp_path, modules):
    config = modules.make("omegaconf.dictconfig.DictConfig")()
    config.content = {"lr": 1}
    attributes = modules.make("pytorch_lightning.utilities.parsing.AttributeDict", dict)(lr=0.1)
    easy = modules.make("easydict.EasyDict", dict)(lr=0.2)
    easy.lr = 0.2
    arrays = [np.arange(3), np.datetime64("2024-01-01"), np.longdouble(1), np.dtype("f4"), {1, 2}, range(3), int]
    torch.save({"a": config, "b": attributes, "c": easy, "d": arrays, "w": torch.ones(2)}, tmp_path / "file.pt")
    payload = read_file(tmp_path / "file.pt")[0]
    assert isinstance(payload["a"], Inert) and payload["a"].state == {"content": {"lr": 1}}
    assert payload["b"] == {"lr": 0.1} and payload["c"] == {"lr": 0.2}
    *inert, numbers, span, of_int = payload["d"]
    assert all(isinstance(value, Inert) for value in [*inert, span]) and numbers == {1, 2} and of_int is Inert
    assert torch.equal(payload["w"], torch.ones(2))


class Call:
    """Pickled as a call of a function, given by its name."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [getattr, __import__, open, compile, np.load, pathlib.Path.touch, pickle.loads])
def test_what_is_not_listed_is_refused(tmp_path, function):
    arguments = argparse.Namespace(call=Call(function, "a"))
    torch.save({"args": arguments, "w": torch.ones(2)}, tmp_path / "file.pt")
    with pytest.raises(ValueError, match="file.pt is refused, and nothing in it was run: it refers to"):
        read_any_file(tmp_path / "file.pt")


def test_what_the_process_allows_besides_stays_allowed(tmp_path, modules):
    mine = modules.make("mine.Options")
    options = mine()
    options.lr = np.float64(0.1)
    torch.save({"args": options}, tmp_path / "file.pt")
    scalar, dtype = np.float64(1).__reduce__()[0], np.dtype
    with torch.serialization.safe_globals([mine, scalar, dtype, type(np.dtype("f8"))]):  # as torch's message advises
        before = torch.serialization.get_safe_globals()
        assert read_file(tmp_path / "file.pt")[0]["args"].lr == 0.1
        assert set(torch.serialization.get_safe_globals()) == set(before)
    with pytest.raises(ValueError, match="it refers to mine.Options"):
        read_file(tmp_path / "file.pt")


def zip_of(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("prior/model.pt", b"x")


def tar_of(path):
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("model.pt"), io.BytesIO())


def cut_short(path):
    torch.save({"w": torch.ones(9)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-4])


def scripted(path):
    torch.jit.trace(nn.Linear(1, 1), torch.ones(1, 1)).save(str(path))


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 3087000000\n"
OTHERS = {  # what writes a file, and what it is said to be
    "lfs": (lambda path: path.write_text(LFS), "a Git LFS pointer to weights of 3,087,000,000 bytes.*git lfs pull"),
    "html": (lambda path: path.write_text("\n<!DOCTYPE html><title>Sign in</title>"), "a web page, such as of a login"),
    "xml": (lambda path: path.write_text("<?xml version='1.0'?>\n<Error><Code>AccessDenied"), "a web page"),
    "gzip": (lambda path: path.write_bytes(gzip.compress(b"weights")), "a gzip archive: unpack it"),
    "zip": (zip_of, "a zip archive of prior/model.pt: unpack it"),
    "tar": (tar_of, "a tar archive: unpack it"),
    "json": (lambda path: path.write_text('{"net": {"dim": 3}}'), "a JSON file with the keys net, such as a config"),
    "index": (lambda path: path.write_text('{"weight_map": {}}'), "the index of a model in several files: give it"),
    "empty": (lambda path: path.touch(), "empty"),
    "npy": (lambda path: np.save(path.open("wb"), np.ones(3)), "a NumPy array"),
    "torchscript": (scripted, r"a TorchScript archive: save the module's state_dict\(\)"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps({"w": 1}, 4)), "a pickle of protocol 4 .* by torch.save"),
    "old pickle": (lambda path: path.write_bytes(pickle.dumps({"w": 1}, 2)), "a pickle of protocol 2 .* by torch.save"),
    "cut": (cut_short, "damaged, cut short, or no checkpoint"),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.filterwarnings("ignore")
def test_what_is_no_checkpoint_is_named(tmp_path, name, suffix):
    make, kind = OTHERS[name]
    make(tmp_path / f"file{suffix}")
    with pytest.raises(ValueError, match=f"file{suffix} cannot be read: it is {kind}") as caught:
        read_any_file(tmp_path / f"file{suffix}")
    assert "\n" not in str(caught.value)


def test_contents_count_and_not_names(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "file.safetensors")
    assert torch.equal(read_file(tmp_path / "file.safetensors")[0]["w"], torch.ones(2))
    (tmp_path / "big.json").write_text(json.dumps({"a": {"b": 1}}))
    with pytest.raises(ValueError, match="a JSON file with the keys a"):
        read_file(tmp_path / "big.json")


def flip(path, name):
    """Change one bit of a record."""
    with zipfile.ZipFile(path) as archive:
        entry = next(entry for entry in archive.infolist() if entry.filename.endswith(name))
    data = bytearray(path.read_bytes())
    lengths = data[entry.header_offset + 26], data[entry.header_offset + 28] + 256 * data[entry.header_offset + 29]
    data[entry.header_offset + 30 + sum(lengths) + entry.file_size // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["data/0", "data/1", "data.pkl", "byteorder"])
def test_a_flipped_bit_is_seen(tmp_path, name):
    torch.save({"a": torch.ones(2), "b": torch.ones(99)}, tmp_path / "file.pt")
    flip(tmp_path / "file.pt", name)
    with pytest.raises(ValueError, match=f"file.pt is damaged: the CRC-32 of .*{name} is not what was written"):
        read_any_file(tmp_path / "file.pt")


def test_an_archive_of_a_later_version_is_damaged(tmp_path):
    torch.save({"w": torch.ones(9)}, path := tmp_path / "file.pt")
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\x01\x02") + 6] = 128  # the version that reading needs
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"{path} cannot be read: it is damaged"):
        read_any_file(path)


def test_archives_without_checksums_are_read_with_a_note(tmp_path):
    state = {"a": torch.arange(9.0)}
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, tmp_path / "file.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    contents = read_any_file(tmp_path / "file.pt")
    assert torch.equal(contents.payload["a"], state["a"]) and "no CRC-32" in contents.notes[0]
    torch.save(state, tmp_path / "file.pt")
    assert read_any_file(tmp_path / "file.pt").notes == []


def test_numbers_that_are_read_later(tmp_path):
    state = {name: torch.randn(1000) for name in "abc"}
    torch.save(state, tmp_path / "file.pt")
    flip(tmp_path / "file.pt", "data/1")
    contents = read_any_file(tmp_path / "file.pt", later=True)
    contents.fill([contents.payload["a"], contents.payload["c"]])
    assert torch.equal(contents.payload["a"], state["a"]) and torch.equal(contents.payload["c"], state["c"])
    with pytest.raises(ValueError, match="file.pt is damaged: the CRC-32"):
        contents.fill([contents.payload["b"]])
    contents.close()


DTYPES = [torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.uint8, torch.bool, torch.complex64, torch.uint16]


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_tensors_are_read_as_they_were_written(tmp_path, zipped):
    whole = torch.arange(24.0).view(2, 3, 4)
    tensors = {str(dtype): whole.to(dtype) for dtype in DTYPES} | {
        "view": whole[:, 1:, ::2], "transposed": whole.mT, "again": whole, "empty": whole[:0], "number": whole.sum(),
        "parameter": nn.Parameter(whole), "expanded": torch.ones(1).expand(9), "grad": whole.clone().requires_grad_(),
    }  # fmt: skip
    torch.save(tensors, tmp_path / "file.pt", _use_new_zipfile_serialization=zipped)
    read = read_file(tmp_path / "file.pt").payload
    assert read.keys() == tensors.keys()
    for name, value in tensors.items():
        assert read[name].dtype == value.dtype and read[name].stride() == value.stride()
        pair = read[name], value.detach()
        assert torch.equal(*(t.double() for t in pair) if value.dtype.itemsize == 1 else pair)
    assert len({read[name].untyped_storage().data_ptr() for name in ("view", "transposed", "again", "parameter")}) == 1

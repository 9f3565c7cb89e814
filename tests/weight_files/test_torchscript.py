"""TorchScript archives are read as torch.jit.load reads them, and nothing in them runs."""

import os
import re
import zipfile
from typing import Optional

import pytest
import torch
from torch import nn

from fastprior.weight_files.tensors import Unreadable
from fastprior.weight_files.torchscript import is_torchscript, read_torchscript

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore::torch.jit.TracerWarning")

DTYPES = "float16 bfloat16 float64 int64 int32 int16 int8 uint8 bool complex64 complex128".split()


class Block(nn.Module):
    optional: Optional[torch.Tensor]  # noqa: UP045 (as TorchScript reads it)

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.layers = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
        self.register_buffer("optional", torch.ones(2))
        self.register_buffer("none", None)
        self.register_buffer("temporary", torch.ones(2), persistent=False)

    def forward(self, x):
        return self.layers(self.linear(x))


class Model(nn.Module):
    """Parts in two places, views of one storage, tensors that are no parameters, and every dtype."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.block = self.again = Block()
        self.blocks = nn.ModuleList([nn.Linear(3, 3)] * 2)
        self.tied = self.block.linear.weight
        self.view = nn.Parameter(self.block.linear.weight.detach()[1:])
        self.parts = nn.ParameterList([nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(()))])
        self.constant, self.size, self.names = torch.ones(3), 3, ["a"]
        self.by_name = {"a": torch.ones(2)}
        self.register_buffer("input_resolution", torch.tensor(224))
        self.register_buffer("transposed", torch.randn(4, 6, generator=generator)[1:3].t())
        self.register_buffer("strided", torch.randn(20, generator=generator)[2:17:3])
        self.register_buffer("empty", torch.zeros(0, 3))
        for name in DTYPES:
            numbers = torch.randint(0, 100, (3, 2), generator=generator)
            self.register_buffer(f"as_{name}", numbers.to(getattr(torch, name)))

    def forward(self, x):
        return self.again(self.block(x))


def trace(path):
    torch.jit.trace(Model(), torch.ones(1, 3)).save(str(path))


WRITERS = {
    "scripted": lambda path: torch.jit.script(Model()).save(str(path)),
    "traced": trace,
    "half": lambda path: torch.jit.script(Model()).half().save(str(path)),
    "extra files": lambda path: torch.jit.script(Model()).save(str(path), _extra_files={"note.txt": b"a"}),
    "lite": lambda path: torch.jit.script(Model())._save_for_lite_interpreter(str(path)),
    "frozen": lambda path: torch.jit.freeze(torch.jit.script(Model().eval())).save(str(path)),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_tensors_are_those_of_torch(tmp_path, writer):
    path = tmp_path / "model.pt"
    WRITERS[writer](path)
    wanted = torch.jit.load(str(path), map_location="cpu").state_dict()
    found = read_torchscript(path)
    assert is_torchscript(path) and list(found) == list(wanted)
    assert bool(wanted) == (writer != "frozen")  # whose weights are constants of its code
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].stride()) == (tensor.dtype, tensor.stride()), name
        assert torch.equal(found[name], tensor), name
    if wanted:
        assert found["block.linear.weight"].data_ptr() == found["again.linear.weight"].data_ptr()


class Evil(nn.Module):
    """Writes a file when it is restored."""

    def __init__(self, path):
        super().__init__()
        self.w, self.path = nn.Parameter(torch.zeros(2)), path

    def forward(self, x):
        return x

    @torch.jit.export
    def __getstate__(self):
        return self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]):
        self.path, self.training = state[0], state[1]
        torch.save("text of an attacker", state[0])


def test_an_archive_that_writes_a_file_writes_none(tmp_path):
    written, path = tmp_path / "written", tmp_path / "model.pt"
    torch.jit.script(Evil(str(written))).save(str(path))
    with pytest.raises(RuntimeError):
        torch.jit.load(str(path))
    assert written.exists()  # the attack works
    written.unlink()
    with pytest.raises(ValueError, match=r"model.pt .*Evil restores itself by code \(__setstate__\), which is not run"):
        read_torchscript(path)
    assert not written.exists()


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    path = tmp_path_factory.mktemp("torchscript") / "model.pt"
    torch.jit.script(nn.Linear(2, 3)).save(str(path))
    return path


def replaced(archive, path, **records):
    """A copy of an archive with other bytes in the records named, `data` for data.pkl, where CLASS is its class."""
    with zipfile.ZipFile(archive) as old:
        cls = re.search(rb"c(__torch__\S*\n\w+)", old.read("model/data.pkl"))[1]
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            data = records.get(info.filename.partition("/")[2].partition(".")[0].replace("/", "_"))
            new.writestr(info, old.read(info) if data is None else data.replace(b"CLASS", cls))
    return path


def text(value):
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def number(value):
    return b"J" + value.to_bytes(4, "little", signed=True)


def stored(record="0", kind="torch\nFloatStorage", size=6):
    return b"(" + text("storage") + b"c" + kind.encode() + b"\n" + text(record) + text("cpu") + number(size) + b"tQ"


def tensor(offset=0, shape=(3, 2), stride=(2, 1), **storage):
    sizes = b"".join(b"(" + b"".join(map(number, values)) + b"t" for values in (shape, stride))
    made = b"(" + stored(**storage) + number(offset) + sizes + b"\x89ccollections\nOrderedDict\n)Rt"
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + made + b"R"


def module(*items):
    """A pickle of the archive's class with a state of names and values."""
    return b"\x80\x02" + instance(*items) + b"."


def instance(*items):
    return b"cCLASS\n)\x81}(" + b"".join(items) + b"ub"


def shared(levels):
    """Modules each of which holds the next twice."""
    inner = b"q\x00".join((instance(), b""))
    for _ in range(levels):
        inner = b"cCLASS\n)\x81}(" + text("a") + inner + text("b") + b"h\x00ubq\x00"
    return b"\x80\x02" + inner + b"."


CYCLE = b"\x80\x02cCLASS\n)\x81q\x00}(" + text("a") + b"h\x00ub."
HUGE = 2**31 - 1
PICKLES = {
    "nothing": (b"", "its pickle has no end"),
    "cut": (module(text("weight"), tensor())[:-9], "cut short"),
    "a call": (b"\x80\x02cos\nsystem\n" + text("a") + b"\x85R.", "it refers to os.system, and nothing in it was run"),
    "a built-in": (b"\x80\x02cbuiltins\neval\n" + text("1") + b"\x85R.", "it refers to builtins.eval"),
    "a call of a text": (b"\x80\x02" + text("os.system") + text("true") + b"\x85R.", "a call of 'os.system'"),
    "another operation": (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "instruction b'.*x8c'"),
    "a state of a class": (b"\x80\x02cCLASS\n}b.", "a state of"),
    "a dict": (b"\x80\x02}.", "it holds no module"),
    "another class": (b"\x80\x02c__torch__\nOther\n)\x81}b.", "it holds no module"),
    "no state": (b"\x80\x02cCLASS\n)\x81.", "restores itself by code"),
    "a deep key": (b"\x80\x02}(" + b")" + b"\x85" * (2 * 10**5) + b"K\x01u.", "a key of nested tuples"),
    "a deep value": (b"\x80\x02}(" + text("a") + b")" + b"\x85" * (2 * 10**5) + b"u.", "it holds no module"),
    "a cycle": (CYCLE, "the names of its tensors have more than"),
    "shared twice": (shared(60), "the names of its tensors have more than"),
    "a huge shape": (module(text("weight"), tensor(shape=(HUGE, HUGE))), "reaches beyond its 24 bytes"),
    "a huge stride": (module(text("weight"), tensor(stride=(HUGE, 1))), "reaches beyond its 24 bytes"),
    "an offset": (module(text("weight"), tensor(offset=1)), "reaches beyond its 24 bytes"),
    "a negative size": (module(text("weight"), tensor(shape=(-3, 2))), r"shape \(-3, 2\)"),
    "a negative offset": (module(text("weight"), tensor(offset=-1)), r"a tensor of shape \(3, 2\)"),
    "other strides": (module(text("weight"), tensor(stride=(1,))), r"strides \(1,\)"),
    "no record": (module(text("weight"), tensor(record="7")), "'data/7'"),
    "a record elsewhere": (module(text("weight"), tensor(record="../data.pkl")), "'data/../data.pkl'"),
    "a class for a dtype": (module(text("weight"), tensor(kind="os\nsystem")), "it refers to os.system"),
}  # fmt: skip


@pytest.mark.parametrize("name", PICKLES)
def test_crafted_pickles_are_one_error(archive, tmp_path, name):
    data, why = PICKLES[name]
    path = replaced(archive, tmp_path / "bad.pt", data=data)
    with pytest.raises(ValueError, match=f"bad.pt cannot be read as a TorchScript archive: .*({why})") as caught:
        read_torchscript(path)
    assert len(str(caught.value)) < 600


def test_what_is_written_by_hand_is_read(archive, tmp_path):
    """The parts that the crafted pickles are made of are right."""
    path = replaced(archive, tmp_path / "good.pt", data=module(text("weight"), tensor()))
    assert torch.equal(read_torchscript(path)["weight"], torch.jit.load(str(archive)).weight)
    for other in (dict(kind="torch\nQInt8Storage"), dict(shape=(2**28, 2), stride=(0, 1))):
        path = replaced(archive, tmp_path / "other.pt", data=module(text("weight"), tensor(**other)))
        assert isinstance(read_torchscript(path)["weight"], Unreadable)


def test_damage_is_seen(archive, tmp_path):
    data, path = archive.read_bytes(), tmp_path / "bad.pt"
    weight = torch.jit.load(str(archive)).weight.detach().numpy().tobytes()
    position = data.index(weight)
    path.write_bytes(data[: position + 5] + bytes([data[position + 5] ^ 1]) + data[position + 6 :])
    with pytest.raises(ValueError, match="bad.pt .*: the CRC-32 of model/data/0 is not what was written"):
        read_torchscript(path)
    for length in (0, 10, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match="bad.pt cannot be read as a TorchScript archive: "):
            read_torchscript(path)


def test_records_are_no_longer_than_the_file(archive, tmp_path):
    path = replaced(archive, tmp_path / "bad.pt", byteorder=b"big")
    with pytest.raises(ValueError, match="bad.pt .*its numbers are not little-endian"):
        read_torchscript(path)
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(tmp_path / "zeros.pt", "w") as new:
        for info in old.infolist():
            zeros = info.filename.endswith((".pkl", ".py"))
            kind = zipfile.ZIP_DEFLATED if zeros else info.compress_type
            new.writestr(info.filename, bytes(2**26) if zeros else old.read(info), kind)
    assert (tmp_path / "zeros.pt").stat().st_size < 2**20
    with pytest.raises(ValueError, match=r"'?data.pkl'? has 67,108,864 bytes; at most"):
        read_torchscript(tmp_path / "zeros.pt")


@pytest.mark.parametrize("name", ["none.pt", "folder", "fifo"])
def test_what_is_no_file(tmp_path, name):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    for read in (is_torchscript, read_torchscript):
        with pytest.raises((ValueError, FileNotFoundError), match=re.escape(name)):
            read(tmp_path / name)

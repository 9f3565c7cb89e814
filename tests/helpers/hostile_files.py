"""Files made to break a reader: (name, maker) pairs, where a maker writes into a folder and says what to load.

A name that begins with "fine" is of a file that must load, one with "refused" of one that must not; any other may do
either. `by` among the arguments that a maker gives is what loads its file; by default it is fastprior.load. All is made
by code: nothing is downloaded, and nothing random is left to chance.
"""

import io
import json
import os
import struct
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import safetensors.torch
import torch

import fastprior
from fastprior.checkpoints import prior_transformer
from helpers.checkpoint_cases import DIM, make_prior, network_of
from helpers.learned import with_table
from helpers.pickles_by_hand import archive, call, entries, name_of, plain, tensor

Maker = Callable[[Path], tuple[Path, dict]]
QUERY, TO_Q = "net.learned_query", "net.causal_transformer.layers.0.0.to_q.weight"
BETAS, LAYER = "noise_scheduler.betas", "net.causal_transformer.layers."
HUGE = 10**9
JUNK = {  # JSON values that stand where others belong
    "null": None, "true": True, "zero": 0, "minus": -1, "huge": HUGE, "huger": 10**30, "half": 0.5, "nan": float("nan"),
    "inf": float("inf"), "text": "text", "long": "x\n" * 10**5, "empty": "", "list": [1], "dict": {"a": 1}, "none": {},
    "surrogate": "\ud800",
}  # fmt: skip


@lru_cache
def prior() -> fastprior.DiffusionPrior:
    return make_prior()


def state_dict() -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in prior().state_dict().items()}


def saved(payload, old=False) -> Maker:
    def make(folder):
        path = folder / "file.pth"
        torch.save(payload() if callable(payload) else payload, path, _use_new_zipfile_serialization=not old)
        return path, {}

    return make


def written(data, name="file.pth", **kwargs) -> Maker:
    def make(folder):
        (folder / name).write_bytes(data() if callable(data) else data)
        return folder / name, kwargs

    return make


def with_entry(key, value) -> Maker:
    return saved(lambda: {**state_dict(), key: value() if callable(value) else value})


FLOATS = [("data/0", bytes(64))]


def pickled(name: str, data: bytes, records=FLOATS) -> tuple[str, Maker]:
    return name, written(archive(data, records))


# what stands in a tensor's place


class Tagged(torch.Tensor):
    """A subclass that files name."""


def tensors_of_kinds() -> Iterator[tuple[str, Maker]]:
    def nested():
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])

    def quantized(value):
        return torch.quantize_per_tensor(value, 0.1, 0, torch.qint8)

    kinds = {
        "refused sparse": lambda t: t.to_sparse(),
        "refused compressed sparse": lambda t: t.expand(2, *t.shape).reshape(2, -1).to_sparse_csr(),
        "refused meta": lambda t: t.to("meta"),
        "refused quantized": quantized,
        "refused nested": lambda t: nested(),
        "refused complex": lambda t: t.to(torch.complex64),
        "refused bool": lambda t: t.bool(),
        "refused int": lambda t: t.long(),
        "refused int8": lambda t: t.to(torch.int8),
        "refused subclass": lambda t: t.as_subclass(Tagged),
        "refused empty": lambda t: t[:0],
        "refused number": lambda t: t.sum(),
        "refused rank": lambda t: t[None, None, None],
        "refused nan": lambda t: t.fill_(float("nan")),
        "refused inf": lambda t: t.fill_(-float("inf")),
        "refused string": lambda t: "weights",
        "refused list": lambda t: t.tolist(),
        "refused none": lambda t: None,
        "refused overlapping": lambda t: torch.ones(9).as_strided((3000, 3000), (0, 0)),
        "fine parameter": lambda t: torch.nn.Parameter(t),
        "fine transposed": lambda t: t.T.contiguous().T if t.ndim == 2 else t,
        "fine part": lambda t: torch.cat((t, t))[: len(t)],
        "fine half": lambda t: t.half(),
        "fine double": lambda t: t.double(),
    }
    for name, change in kinds.items():
        for key in (QUERY, TO_Q):
            yield f"{name} {key}", with_entry(key, lambda c=change, k=key: c(state_dict()[k]))
        if not name.startswith("fine"):
            name = name.removeprefix("refused ")
        yield f"{name} {BETAS}", with_entry(BETAS, lambda c=change: c(state_dict()[BETAS]))
        other = lambda c=change: {"model": state_dict(), "optimizer": {"state": c(torch.ones(3))}}  # noqa: E731
        yield f"{name} apart", saved(other)
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz):
        # the noise schedule stays what it is
        changed = lambda d=dtype: {k: v.to(d) if k.startswith("net.") else v for k, v in state_dict().items()}  # noqa: E731
        yield f"fine {dtype}", saved(changed)
    yield "refused all int", saved(lambda: {key: value.int() for key, value in state_dict().items()})
    yield "all half", saved(lambda: {key: value.half() for key, value in state_dict().items()})
    yield "refused numbers", saved({QUERY: 1, TO_Q: 2})


def strange_keys() -> Iterator[tuple[str, Maker]]:
    one = torch.ones(2)
    keys = {
        "none": None, "tuple": (1, 2), "int": 7, "bytes": b"key", "surrogate": "\ud800", "long": "k" * 10**6,
        "empty": "", "control": "a\x1b[2J\nb", "true": True, "float": 0.5, "huge int": 10**300, "dots": "....",
        "wrapper": "module.",
    }  # fmt: skip
    for name, key in keys.items():
        yield f"key {name}", with_entry(key, one)
        yield f"fine key {name} above", saved(lambda k=key: {k: {"x": one}, "model": state_dict()})
    for number in (str(HUGE), str(10**30), "9" * 5000, "-1", "٣", "99", "001"):
        expected = "" if len(number) > 1000 else "refused "
        yield f"{expected}layer {number:.20}", with_entry(f"{LAYER}{number}.0.to_q.weight", one)
        yield (
            f"layer of the network {number:.20}",
            saved(lambda n=number: {**network_of(state_dict()), f"causal_transformer.layers.{n}.0.to_q.weight": one}),
        )
    yield (
        "refused many layers",
        saved(lambda: {**state_dict(), **{f"{LAYER}{n}.0.to_q.weight": torch.ones(0) for n in range(2000)}}),
    )
    yield "refused many priors", saved({f"{n}.{QUERY}": one for n in range(3000)})


def structures() -> Iterator[tuple[str, Maker]]:
    def shared():
        node = {"w": torch.ones(1)}
        for _ in range(60):
            node = {"a": node, "b": node}
        return {**node, "model": state_dict()}

    def views(count=5000):
        one = torch.ones(1 << 18)
        return {**state_dict(), **{f"net.more.{n}": one.expand(1, -1) for n in range(count)}}

    deep = 30000
    closing = {"dict": (b"}" + plain("a"), b"s"), "list": (b"]", b"a"), "tuple": (b"", b"\x85")}
    for kind, (opening, close) in closing.items():
        value = opening * deep + b"N" + close * deep
        yield pickled(f"refused deep {kind}", entries(model=value))
        yield pickled(f"refused deep {kind} as version", entries(version=value, config=value, fastprior=b"N"))
        yield pickled(f"refused deep {kind} as header", entries(fastprior=b"}" + plain("net") + value + b"s"))
        yield pickled(f"refused deep {kind} as key", b"\x80\x02}" + value + b"Ns.")
    yield "refused shared dicts", saved(shared)
    cycle = b"\x80\x02}q\x00" + plain("a") + b"h\x00s" + plain("b") + b"h\x00s" + plain("net") + b"h\x00s."
    yield pickled("refused cyclic dict", cycle)
    yield pickled("refused cyclic list", b"\x80\x02]q\x00h\x00ah\x00a.")
    yield pickled("refused cyclic key", b"\x80\x02}q\x00h\x00Ns.")
    laughs = (
        b"\x80\x02}"
        + plain("version")
        + b"]q\x00"
        + b"".join(b"](" + b"h%c" % n * 10 + b"eq%c" % (n + 1) for n in range(20))
    )
    laughs += name_of("torch.torch_version", "TorchVersion") + b"h\x14\x85\x81s."
    yield pickled("refused laughs", laughs)
    yield "many views of one storage", saved(views)
    yield "fine shared", saved(lambda: {"ema": (s := state_dict()), "model": s, "more": [s, s]})
    yield "fine ordered", saved(lambda: OrderedDict(state_dict()))
    for name, payload in JUNK.items():
        yield f"refused payload {name}", saved(payload)
    yield "refused tensor", saved(torch.ones(3))
    yield "refused set", saved({1, 2})
    yield "refused nothing known", saved({"a": {"b": torch.ones(2)}})


def beside_weights() -> Iterator[tuple[str, Maker]]:
    junk = {**JUNK, "tensor": torch.ones(2), "tuple": ((1,),), "set": {1}, "complex": 1j, "bytes": b"x"}
    for name, value in junk.items():
        for key in ("version", "config", "optimizer", "metadata", "fastprior", "prior", "net"):
            yield f"{key} {name}", saved(lambda k=key, v=value: {"model": state_dict(), k: v})
        yield f"config net {name}", saved(lambda v=value: {"model": state_dict(), "config": {"net": {"dim": v}}})
        yield (
            f"refused header net {name}",
            saved(lambda v=value: {"model": state_dict(), "fastprior": {"format": 1, "net": v, "prior": {}}}),
        )


# files of ours


@lru_cache
def own_parts() -> tuple[str, bytes]:
    """The header, as JSON, and the bytes of a file of fastprior.save."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.safetensors"
        fastprior.save(with_table(prior(), 3), path, metadata={"a": 1})
        with safetensors.safe_open(path, "pt") as file:
            return file.metadata()["fastprior"], path.read_bytes()


def own_file(change=lambda header: None, tensors=lambda state: None, metadata=None) -> Maker:
    """A safetensors file of fastprior.save whose header, as a dict, or tensors are changed."""

    def make(folder):
        path = folder / "file.safetensors"
        text, data = own_parts()
        header, state = json.loads(text), safetensors.torch.load(data)
        header = change(header) or header
        state = tensors(state) or state
        safetensors.torch.save_file(state, path, metadata={"fastprior": json.dumps(header), **(metadata or {})})
        return path, {}

    return make


def headers() -> Iterator[tuple[str, Maker]]:
    yield "fine own file", own_file()
    for name, value in JUNK.items():
        if name == "surrogate":
            continue  # no JSON that safetensors takes
        for key in ("format", "version", "net", "prior", "metadata", "checksums", "learned_tables", "more"):
            yield f"header {key} {name}", own_file(lambda header, k=key, v=value: header.update({k: v}))
        yield f"header {name}", own_file(lambda header, v=value: v)
        for key in ("evaluations", "times", "rows", "scales", "digests", "held_out"):
            yield (
                f"header learned_tables {key} {name}",
                own_file(lambda header, k=key, v=value: header["learned_tables"][0].update({k: v})),
            )
        for key in ("dim", "depth", "dim_head", "heads", "ff_mult", "num_timesteps", "max_text_len", "num_time_embeds",
                    "num_text_embeds", "text_dim", "conditions", "dot_scale", "rotary_emb", "make"):  # fmt: skip
            yield f"header net {key} {name}", own_file(lambda header, k=key, v=value: header["net"].update({k: v}))
        for key in ("timesteps", "image_embed_dim", "beta_schedule", "loss_type"):
            yield f"header prior {key} {name}", own_file(lambda header, k=key, v=value: header["prior"].update({k: v}))
    many = {f"c{n}": {"kind": "scalar"} for n in range(20000)}
    yield "refused many conditions", own_file(lambda header: header["net"].update(conditions=many))
    yield (
        "refused schedule",
        own_file(
            lambda header: header["prior"].update(timesteps=10**12),
            lambda state: {key: value for key, value in state.items() if key.startswith("net.")},
        ),
    )
    for name in ("prior_transformer", "text"):
        net = dict(make=name, num_layers=HUGE, num_embeddings=HUGE, embedding_dim=DIM)
        yield f"refused make {name}", own_file(lambda header, n=net: header.update(net=n))

    def flipped(state):
        state[TO_Q].view(torch.int32)[0, 0] ^= 1

    yield "refused flipped bit", own_file(tensors=flipped)
    yield "fine converted", own_file(tensors=lambda state: {k: v.half() if k == TO_Q else v for k, v in state.items()})
    yield "refused sums of others", own_file(lambda h: h.update(checksums=dict.fromkeys(h["checksums"], "float32 0")))
    copies = {f"{LAYER}{n}.0.to_q.weight": TO_Q for n in range(5000)}
    yield "refused tensors in metadata", own_file(metadata=copies)


def safetensors_by_hand() -> Iterator[tuple[str, Maker]]:
    def file(header, data=bytes(64), length=None):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text) if length is None else length) + text + data

    def entry(**values):
        return {"w": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64], **values}}

    contents = {
        "no prior": file(entry()),
        "long header": file(entry(), length=2**62),
        "short header": file(entry(), length=3),
        "no data": file(entry(), b""),
        "more data": file(entry(), bytes(80)),
        "dtype": file(entry(dtype="F99")),
        "dtype kind": file(entry(dtype=7)),
        "shape": file(entry(shape=[HUGE, HUGE])),
        "shape overflow": file(entry(shape=[2**62, 16])),
        "shape kind": file(entry(shape="16")),
        "negative shape": file(entry(shape=[-16])),
        "offsets": file(entry(data_offsets=[0, 2**60])),
        "offsets back": file(entry(data_offsets=[64, 0])),
        "list": file([1]),
        "null": file(b"{null}"),
        "deep": file(b'{"a":' * 10**5),
        "not utf-8": file(b"{\xff\xff}"),
        "metadata kind": file({**entry(), "__metadata__": {"a": 1}}),
        "metadata list": file({**entry(), "__metadata__": [1]}),
        "deep own header": file({**entry(), "__metadata__": {"fastprior": "[" * 10**5}}),
        "own header no json": file({**entry(), "__metadata__": {"fastprior": "{"}}),
        "own header list": file({**entry(), "__metadata__": {"fastprior": "[1]"}}),
        "eight zeros": bytes(8) + b"{}",
        "nothing": b"",
        "start alone": b"\0\0\0\0\0\0\0\0{",
        "web page": b"<!doctype html>" + bytes(100),
        "deep json": b'{"a":' * 10**5,
    }
    for name, data in contents.items():
        yield f"refused safetensors {name}", written(data, "file.safetensors")
        yield f"refused {name} as .pth", written(data)


# archives


def flip(name: str, at=0):
    """Flip a bit in the bytes of a record, by what the central directory says."""

    def alter(data):
        with zipfile.ZipFile(io.BytesIO(bytes(data))) as file:
            entry = file.getinfo(next(n for n in file.namelist() if n.endswith(name)))
        lengths = struct.unpack("<HH", data[entry.header_offset + 26 : entry.header_offset + 30])
        data[entry.header_offset + 30 + sum(lengths) + at] ^= 1
        return bytes(data)

    return alter


@lru_cache
def torch_archive() -> bytes:
    out = io.BytesIO()
    torch.save(state_dict(), out)
    return out.getvalue()


def archives() -> Iterator[tuple[str, Maker]]:
    def unchecked():
        torch.serialization.set_crc32_options(False)
        try:
            return torch_archive.__wrapped__()
        finally:
            torch.serialization.set_crc32_options(True)

    def reversed_numbers():
        return torch_archive().replace(b"little", b"bigend")

    yield "fine archive", written(torch_archive)
    yield "fine archive without checksums", written(unchecked)
    for name in ("data/3", "data/0", "data.pkl", "byteorder", "data/20"):
        yield f"refused flipped {name}", written(lambda n=name: flip(n)(bytearray(torch_archive())))
    yield "refused other order of bytes", written(reversed_numbers)
    for end in (10, 100, 1000, 5000):
        yield f"refused cut by {end}", written(lambda e=end: torch_archive()[:-e])
    good = entries(w=tensor("0", 16, (16,), (1,)))
    yield pickled("refused good but no prior", good)
    yield "refused compressed", written(archive(good, [("data/0", bytes(10**7))], zipfile.ZIP_DEFLATED))
    yield "refused twice", written(archive(good, FLOATS * 2))
    yield pickled("refused no record", good, [])
    yield pickled("refused storage of another name", entries(w=tensor("../../x", 16, (16,), (1,))))
    claims = {
        "beyond": ((10**12,), (1,), 0), "beyond by offset": ((1,), (1,), 10**12), "expanded": ((10**12,), (0,), 0),
        "negative stride": ((4,), (-1,), 8), "negative size": ((-4,), (1,), 0), "ranks": ((2, 2), (1,), 0),
        "overflow": ((2**62, 2**62), (0, 0), 0), "many": ((1,) * 500, (1,) * 500, 0),
        "empty": ((0, 2**62), (2**62, 1), 0), "float": ((1.5,), (1,), 0), "none": (None, None, 0),
        "bool": ((True,), (1,), 0), "negative offset": ((1,), (1,), -1),
    }  # fmt: skip
    for name, (size, stride, offset) in claims.items():
        value = tensor("0", 16, size, stride, offset)
        yield pickled(f"refused shape {name}", entries(**{"net.learned_query": value}))
        yield pickled(f"refused shape {name} in all", entries(**dict.fromkeys(state_dict(), value)))
    made = {
        "bytearray": call("builtins", "bytearray", plain(10**10)),
        "tensor": call("torch", "FloatTensor", plain(10**10)),
        "getattr": call("builtins", "getattr", plain("a"), plain("b")),
        "system": call("os", "system", plain("true")),
        "storage": call("torch", "FloatStorage", plain(10**10)),
        "encode": call("_codecs", "encode", plain("x"), plain("idna")),
        "device": call("torch", "device", plain("gpu:x")),
        "size": call("torch", "Size", plain("text")),
        "dtype": name_of("torch", "load"),
        "string": b"U\xff",
        "memo": b"j\xff\xff\xff\xff",
        "long memo": b"Nr\xff\xff\xff\xff",
        "no mark": b"t",
        "empty stack": b"000",
        "long": b"X\xff\xff\xff\xff",
        "frame": b"\x95\xff\xff\xff\xff\xff\xff\xff\x7f",
        "bytes": b"\x96\xff\xff\xff\xff\xff\xff\xff\x7f",
        "build": name_of("collections", "OrderedDict") + plain({"__call__": 1}) + b"b",
        "build of a class": name_of("numpy", "dtype") + plain({"value": 1}) + b"b",
        "moved": call("torch._utils", "_rebuild_device_tensor_from_cpu_tensor", tensor("0", 16, (10**11,), (0,)),
                      name_of("torch", "float64"), plain("cpu"), plain(False)),
        "sparse": call("torch._utils", "_rebuild_sparse_tensor", plain(1), plain((1,))),
        "storage type": call("torch._utils", "_rebuild_tensor_v2", plain(1), plain(0), plain((1,)), plain((1,))),
        "numpy": call("numpy.core.multiarray", "scalar", plain(1), plain("x")),
        "numpy string": call("numpy", "dtype", plain("S999999999"), plain(False), plain(True)),
        "date": call("datetime", "timedelta", plain(10**300)),
        "colliding": b"}(" + b"".join(plain((2**61 - 1) * n << 64) + b"N" for n in range(1, 3000)) + b"u",
    }  # fmt: skip
    for name, value in made.items():
        yield pickled(f"refused made {name}", entries(a=value))
    yield "fine old", saved(state_dict, old=True)
    old = io.BytesIO()
    torch.save({"w": torch.ones(16)}, old, _use_new_zipfile_serialization=False)
    yield "refused old, no prior", written(old.getvalue())
    for at in range(0, len(old.getvalue()), 11):
        yield f"refused old cut at {at}", written(old.getvalue()[:at])
    yield "refused old, larger", written(old.getvalue().replace(b"K\x10", b"J\xff\xff\xff\x7f", 1))


# paths, indexes and configurations


def paths() -> Iterator[tuple[str, Maker]]:
    def fifo(folder):
        os.mkfifo(folder / "file.pth")
        return folder / "file.pth", {}

    def fifo_beside(name, into):
        def make(folder):
            os.mkfifo(folder / name)
            path, kwargs = saved(state_dict)(folder)
            return (folder if into else path), kwargs

        return make

    def device(folder):
        (folder / "file.safetensors").symlink_to("/dev/zero")
        return folder / "file.safetensors", {}

    def link(folder):
        path, kwargs = saved(state_dict)(folder)
        (folder / "link.pth").symlink_to(path)
        return folder / "link.pth", kwargs

    yield "refused fifo", fifo
    yield "refused device", device
    yield "refused missing", lambda folder: (folder / "none.pth", {})
    yield "refused folder", lambda folder: (folder, {})
    yield "refused fifo as index", fifo_beside("model.safetensors.index.json", True)
    yield "fine fifo as config beside", fifo_beside("config.json", False)
    yield "fine link", link


def indexes() -> Iterator[tuple[str, Maker]]:
    def index(weight_map, write=lambda folder: None):
        def make(folder):
            text = weight_map if isinstance(weight_map, bytes) else json.dumps({"weight_map": weight_map}).encode()
            (folder / "model.safetensors.index.json").write_bytes(text)
            safetensors.torch.save_file(state_dict(), folder / "part.safetensors")
            write(folder)
            return folder, {}

        return make

    def linked(folder):
        (folder / "blobs").mkdir()
        (folder / "part.safetensors").rename(folder / "blobs" / "1")
        (folder / "part.safetensors").symlink_to(folder / "blobs" / "1")

    good = dict.fromkeys(state_dict(), "part.safetensors")
    yield "fine index", index(good)
    yield "fine index of links", index(good, linked)
    for name, value in {**JUNK, "part": "part.safetensors/x", "nul": "a\0b", "name": "n" * 5000}.items():
        yield f"refused weight_map {name}", index(value)
        yield f"refused weight_map to {name}", index({QUERY: value})
    for name in ("../x", "/etc/passwd", "a/../../x", "..\\x", "c:\\x", "", "."):
        yield f"refused weight_map to {name!r}", index({QUERY: name})
    for text in (b"[1]", b"{", b"", b"[" * 10**6, b"\xff", b'{"weight_map": {"a": NaN}}', b"9" * 10**5):
        yield f"refused index {text[:30]!r}", index(text)
    yield "refused long index", index(b" " * 2**25)
    yield "refused fifo as part", index({QUERY: "pipe"}, lambda folder: os.mkfifo(folder / "pipe"))
    yield "refused key", index({**good, "k\n" * 10**5: "part.safetensors"})


def configs() -> Iterator[tuple[str, Maker]]:
    def given(config, beside=False):
        def make(folder):
            (folder / "file.pth").write_bytes(torch_archive())
            path = folder / "config.json"
            path.write_bytes(config if isinstance(config, bytes) else json.dumps(config).encode())
            return folder / "file.pth", {} if beside else {"config": path}

        return make

    def direct(config):
        def make(folder):
            (folder / "file.pth").write_bytes(torch_archive())
            return folder / "file.pth", {"config": config}

        return make

    for name, value in JUNK.items():
        for key in ("net", "prior", "data", "clip", "version", "metadata"):
            yield f"given config {key} {name}", direct({"net": {}, key: value})
        for key in ("dim", "depth", "heads", "num_timesteps", "max_text_len", "rotary_emb", "ff_mult", "conditions"):
            yield f"config net {key} {name}", direct({"net": {"dim": DIM, key: value}})
            yield f"config beside {key} {name}", given({"net": {"dim": DIM, key: value}}, True)
        for key in ("timesteps", "image_embed_dim", "beta_schedule", "net"):
            yield f"config prior {key} {name}", direct({"prior": {key: value}})
        yield f"given config {name}", direct(value)
    for text in (b"[1]", b"{", b"", b"[" * 10**5, b'{"net":' * 10**5, b"\xff\xfe", b"NaN", b" " * 2**25):
        yield f"refused config file {text[:20]!r}", given(text)
        yield f"fine config file beside {text[:20]!r}", given(text, True)
    yield "refused config unknown", direct({"k\n" * 10**6: 1})
    yield "fine config", direct({"net": {"dim": DIM}})


# priors of Kandinsky and Karlo


def original_state() -> dict[str, torch.Tensor]:
    """A prior of one layer under its original names."""
    width, dim, block = 64, 8, "transformer.resblocks.0"
    shapes = {
        "time_embed.0": (width, width), "time_embed.2": (width, width), "text_enc_proj": (width, dim),
        "text_emb_proj": (width, dim), "clip_img_proj": (width, dim), "out_proj": (dim, width), "final_ln": (width,),
        f"{block}.attn.c_qkv": (3 * width, width), f"{block}.attn.c_proj": (width, width), f"{block}.ln_1": (width,),
        f"{block}.ln_2": (width,), f"{block}.mlp.c_fc": (4 * width, width), f"{block}.mlp.c_proj": (width, 4 * width),
    }  # fmt: skip
    state = {"model.positional_embedding": torch.ones(1, 9, width), "model.prd_emb": torch.ones(1, 1, width)}
    for name, shape in shapes.items():
        state |= {f"model.{name}.weight": torch.ones(shape), f"model.{name}.bias": torch.ones(shape[0])}
    return state


def originals() -> Iterator[tuple[str, Maker]]:
    def original(change=lambda state: None, stats=lambda: torch.ones(2, 8), **kwargs):
        def make(folder):
            state = original_state()
            state = change(state) or state
            torch.save(state, folder / "prior.ckpt")
            torch.save(stats(), folder / "stats.th")
            by = dict(by=prior_transformer.load, clip_stats=folder / "stats.th")
            return folder / "prior.ckpt", by | kwargs

        return make

    query = "model.prd_emb"
    yield "fine original", original()
    for name, value in JUNK.items():
        for key in (
            "num_attention_heads",
            "num_layers",
            "embedding_dim",
            "num_embeddings",
            "time_embed_act_fn",
            "dropout",
        ):
            yield f"original {key} {name}", original(config={key: value})
        yield f"refused original stats {name}", original(stats=lambda v=value: v)
        yield f"original config {name}", original(config=value)
        for key in (query, "model.out_proj.weight", "model.positional_embedding", "model.clip_img_proj.weight"):
            yield f"refused original {key} {name}", original(lambda state, k=key, v=value: state.update({k: v}))
    kinds = {
        "sparse": lambda t: t.to_sparse(), "meta": lambda t: t.to("meta"), "complex": lambda t: t.to(torch.complex64),
        "int": lambda t: t.int(), "nan tensor": lambda t: t * float("nan"), "number": lambda t: t.sum(),
        "no rows": lambda t: t[:0], "rank": lambda t: t[None, None], "expanded": lambda t: torch.ones(1).expand(10**12),
    }  # fmt: skip
    for name, change in kinds.items():
        for key in original_state():
            if key.endswith("weight") or "emb" in key:
                yield f"refused original {key} {name}", original(lambda s, k=key, c=change: s.update({k: c(s[k])}))
        yield f"refused original stats {name}", original(stats=lambda c=change: [c(torch.ones(8)), torch.ones(8)])
    for number in (HUGE, 10**30, -1, 3):
        key = f"model.transformer.resblocks.{number}.ln_1.weight"
        yield f"refused original layer {number}", original(lambda state, k=key: state.update({k: torch.ones(1)}))
    for name, make in archives():
        if name.startswith("refused"):
            yield f"{name} as original", lambda folder, m=make: (m(folder)[0], dict(by=prior_transformer.load))


def all_cases() -> list[tuple[str, Maker]]:
    return [case for make in (*FEW, *MANY) for case in make()]


def some_cases() -> list[tuple[str, Maker]]:
    """All of the kinds that have few, and a part of those that put every JSON value in every place."""
    return [case for make in FEW for case in make()] + [case for make in MANY for case in list(make())[::5]]


FEW = tensors_of_kinds, strange_keys, structures, safetensors_by_hand, archives, paths, indexes
MANY = beside_weights, headers, configs, originals

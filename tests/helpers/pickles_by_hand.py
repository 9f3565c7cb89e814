"""Pickles of tensors written opcode by opcode, and archives of them as torch.save writes those."""

import io
import pickle
import zipfile


def name_of(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def plain(value) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def call(module: str, name: str, *arguments: bytes) -> bytes:
    return name_of(module, name) + b"(" + b"".join(arguments) + b"tR"


def stored(key: str, numel: int, kind="FloatStorage") -> bytes:
    """A persistent id of the storage in the record data/<key>."""
    return b"(" + plain("storage") + name_of("torch", kind) + b"".join(map(plain, (key, "cpu", numel))) + b"tQ"


def tensor(key: str, numel: int, size, stride, offset=0, kind="FloatStorage") -> bytes:
    values = stored(key, numel, kind), plain(offset), plain(size), plain(stride), plain(False), plain(None)
    return call("torch._utils", "_rebuild_tensor_v2", *values)


def entries(**values: bytes) -> bytes:
    """A pickle of a dict."""
    return b"\x80\x02}" + b"".join(plain(key) + value + b"s" for key, value in values.items()) + b"."


def archive(data: bytes, records=(), compression=zipfile.ZIP_STORED, names=None, alter=None) -> bytes:
    """A zip archive as torch.save writes it, of a pickle and records of bytes."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as file:
        for name, content in [("data.pkl", data), ("byteorder", b"little"), ("version", b"3\n"), *records]:
            file.writestr(f"archive/{name}", content)
    return out.getvalue() if alter is None else alter(bytearray(out.getvalue()))

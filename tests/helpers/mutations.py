"""Mutations of files: of bytes anywhere, and of what a format keeps, with lengths and sums made right again.

Each takes a `random.Random` and the bytes of a file, and gives bytes; the same seed gives the same bytes. Those of a
format may raise where it is no longer that.
"""

import io
import json
import math
import pickletools
import re
import struct
import tarfile
import zipfile
from random import Random

import torch

NUMBERS = 0, 1, -1, 2, 7, 127, 128, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32, 10**9, 2**53, 2**63 - 1, 2**63, 10**18
BOMB_BYTES = 2**26  # what a bomb unpacks to
DEEP = 100_000

# bytes


def _span(draw: Random, data: bytes) -> tuple[int, int]:
    start = draw.randrange(len(data) + 1)
    return start, min(len(data), start + draw.choice((1, 1, 2, 4, 8, 16, 64, 512, 4096)))


def _number(draw: Random) -> bytes:
    value, code = draw.choice(NUMBERS), draw.choice(("B", "<H", ">H", "<I", ">I", "<Q", ">Q"))
    return struct.pack(code, value % 2 ** (8 * struct.calcsize(code)))


def _flip(draw: Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 4, 16))):
        if changed:
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _overwrite(draw: Random, data: bytes) -> bytes:
    start, new = draw.randrange(len(data) + 1), _number(draw)
    return data[:start] + new + data[start + len(new) :]


def _cut(draw: Random, data: bytes) -> bytes:
    return data[: draw.randrange(len(data) + 1)]


def _insert(draw: Random, data: bytes) -> bytes:
    start = draw.randrange(len(data) + 1)
    new = draw.choice((_number(draw), draw.randbytes(draw.choice((1, 3, 64))), b"\0" * draw.choice((1, 8, 512))))
    return data[:start] + new + data[start:]


def _delete(draw: Random, data: bytes) -> bytes:
    start, stop = _span(draw, data)
    return data[:start] + data[stop:]


def _zero(draw: Random, data: bytes) -> bytes:
    start, stop = _span(draw, data)
    return data[:start] + bytes([draw.choice((0, 0, 255))]) * (stop - start) + data[stop:]


def _repeat(draw: Random, data: bytes) -> bytes:
    start, stop = _span(draw, data)
    return data[:stop] + data[start:stop] * draw.choice((1, 2, 16)) + data[stop:]


def _swap(draw: Random, data: bytes) -> bytes:
    (a, b), (c, d) = sorted((_span(draw, data), _span(draw, data)))
    return data if c < b else data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def _digits(draw: Random, data: bytes) -> bytes:
    """Another number in the place of one that is written out."""
    found = list(re.finditer(rb"-?\d+", data[: 2**16]))
    match = draw.choice(found)
    return data[: match.start()] + str(draw.choice(NUMBERS)).encode() + data[match.end() :]


BYTES = (_flip, _flip, _overwrite, _cut, _insert, _delete, _zero, _repeat, _swap, _digits)


def splice(draw: Random, data: bytes, other: bytes) -> bytes:
    """The beginning of one file and the end of another."""
    at = draw.randrange(len(data) + 1)
    return data[:at] + other[min(len(other), at if draw.random() < 0.5 else draw.randrange(len(other) + 1)) :]


# JSON


def _odd_value(draw: Random):
    plain = [
        None,
        True,
        False,
        "",
        "x",
        "-1",
        "\ud800",
        "a\nb\x1b[31m",
        "/etc/passwd",
        "../up",
        [],
        {},
        [[]],
        {"": None},
    ]
    floats = [0.0, -0.5, 1e-320, 1e300, float("inf"), float("-inf"), float("nan")]
    large = ["long " * 2000, list(range(3000)), {str(i): i for i in range(500)}, 10**400]
    return draw.choice((draw.choice(plain), draw.choice(NUMBERS), draw.choice(floats), draw.choice(large)))


def _places(value, found: list) -> list:
    """Every (container, key) of a JSON value."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        found.append((value, key))
        _places(value[key], found)
    return found


def _change(draw: Random, value):
    """A JSON value with one entry changed; what is a string of JSON is changed inside."""
    places = _places(value, [])
    if not places or draw.random() < 0.02:
        return _odd_value(draw)
    container, key = draw.choice(places)
    old, kind = container[key], draw.randrange(8)
    if isinstance(old, str) and old[:1] == "{" and draw.random() < 0.9:
        try:
            container[key] = json.dumps(_change(draw, json.loads(old)))
            return value
        except ValueError:
            pass
    if kind < 4:
        container[key] = _odd_value(draw)
    elif kind == 4:
        del container[key]
    elif kind == 5 and isinstance(container, dict):
        container[draw.choice((str(key) + "x", str(_odd_value(draw))[:3000], "__proto__"))] = container.pop(key)
    elif kind == 6:
        other, place = draw.choice(places)
        container[key] = other[place] if place in (other if isinstance(other, dict) else range(len(other))) else None
    elif isinstance(old, (int, float)) and not isinstance(old, bool):
        container[key] = draw.choice((-old, old + 1, old * 2, old - 1, str(old), float(old), [old]))
    else:
        container[key] = [old]
    return value


def _json(draw: Random, data: bytes) -> bytes:
    value = json.loads(data)
    kind = draw.randrange(40)
    if kind == 0:
        return draw.choice((b"[", b'{"a":', b'{"weight_map":{"a":')) * DEEP
    if kind == 1:
        return draw.choice((data.decode().encode("utf-16"), b"\xef\xbb\xbf" + data, data + data, b"\xff" + data, b""))
    if kind == 2 and isinstance(value, dict) and value:  # a key twice
        key = draw.choice(list(value))
        return b"{" + json.dumps({key: _odd_value(draw)}).encode()[1:-1] + b"," + data.strip()[1:]
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        value = _change(draw, value)
    return json.dumps(value).encode()


# safetensors


def _safetensors(draw: Random, data: bytes) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + length], data[8 + length :]
    kind = draw.randrange(6)
    if kind == 0:
        body = draw.choice(BYTES)(draw, body)
    elif kind == 1:
        header = _digits(draw, header)
    elif kind == 2:
        dtypes = rb'"(F32|F16|BF16|F64|I64|I32|U8|BOOL|F8_E4M3|F8_E5M2|F4|C64|U64)"'
        found = list(re.finditer(dtypes, header))
        if found:
            match = draw.choice(found)
            new = draw.choice(
                (b"F16", b"BF16", b"F64", b"I64", b"I32", b"U8", b"BOOL", b"F8_E4M3", b"C64", b"F4", b"X")
            )
            header = header[: match.start(1)] + new + header[match.end(1) :]
    else:
        header = _json(draw, header)
    return len(header).to_bytes(8, "little") + header + body


# pickles


_OPS = (
    b"(", b"0", b"2", b"N", b"\x88", b")", b"}", b"]", b"t", b"\x85", b"\x86", b"s", b"u", b"a", b"e", b"R", b"b", b"Q",
    b".", b"K\7", b"J\xff\xff\xff\xff", b"h\0", b"q\0", b"h\3", b"X\1\0\0\0x",
    b"\x8b\xff\xff\xff\x7f", b"T\xff\xff\xff\x7f",
    b"cposix\nsystem\n", b"cbuiltins\neval\n", b"c__builtin__\ngetattr\n", b"ctorch\nload\n",
    b"ccollections\nOrderedDict\n", b"X\4\0\0\0true\x85cposix\nsystem\nR", b"G\x7f\xf8\0\0\0\0\0\0",
    b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f", b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch.nested._internal.nested_tensor\nNestedTensor\n",
)  # fmt: skip


def _laughs(draw: Random) -> bytes:
    """Three of three of three …: small in a pickle, and endless for who walks it."""
    levels = b"".join(
        b"K" + bytes([n]) + bytes([104, n]) * 3 + b"\x87q" + bytes([n + 1]) + b"s"
        for n in range(1, draw.choice((9, 40)))
    )
    return b"\x80\2}q\0K\0}q\1s" + levels + b"X\5\0\0\0modelh\x08s."


def _deep(draw: Random) -> bytes:
    return b"\x80\2}X\5\0\0\0model" + b"}X\1\0\0\0a" * DEEP + b"K\1" + b"s" * DEEP + b"s."


def _cycle(draw: Random) -> bytes:
    return b"\x80\x02}q\x00X\x05\x00\x00\x00modelh\x00s."


def _pickle(draw: Random, data: bytes) -> bytes:
    kind = draw.randrange(30)
    if kind < 3:
        return (_laughs, _deep, _cycle)[kind](draw)
    ops = [(op, arg, at) for op, arg, at in pickletools.genops(data)]
    ends = [at for _, _, at in ops[1:]] + [ops[-1][2] + 1]
    rest, index = data[ends[-1] :], draw.randrange(len(ops))
    (op, arg, start), stop = ops[index], ends[index]
    if kind < 10:  # the number or string of an op
        index = draw.choice([i for i, (o, a, _) in enumerate(ops) if isinstance(a, (int, str)) or o.name == "GLOBAL"])
        (op, arg, start), stop = ops[index], ends[index]
        if op.name == "GLOBAL":
            others = """torch FloatStorage|torch LongStorage|torch BFloat16Storage|posix system|torch float8_e5m2|
                torch float8_e4m3fn|torch._utils _rebuild_parameter|torch._utils _rebuild_sparse_tensor|builtins list|
                torch._utils _rebuild_meta_tensor_no_storage|torch._utils _rebuild_qtensor|collections OrderedDict|
                packaging.version Version|numpy ndarray""".split("|")
            new = b"c" + draw.choice(others).strip().replace(" ", "\n").encode() + b"\n"
        elif isinstance(arg, str):
            text = draw.choice((arg + "x", "", "model", "0", "9" * 30, "net.causal_transformer.layers.1000000000.0.g",
                                "cpu", "meta", "cuda:0", "a\x1b[0m\n", "x" * 5000)).encode()  # fmt: skip
            new = b"X" + struct.pack("<I", len(text)) + text
        else:
            value = draw.choice((arg + 1, arg - 1, arg * 1000, draw.choice(NUMBERS), -draw.choice(NUMBERS)))
            encoded = value.to_bytes((value.bit_length() + 8) // 8 or 1, "little", signed=True)
            new = b"\x8a" + bytes([len(encoded)]) + encoded
        if op.name in ("BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "PROTO"):
            new = data[start : start + 1] + bytes([draw.randrange(256)]) * (stop - start - 1)
        return data[:start] + new + data[stop:]
    if kind < 14:
        return data[:start] + data[stop:]
    if kind < 18:
        return data[:stop] + data[start:stop] + data[stop:]
    if kind < 22:
        other = draw.randrange(len(ops))
        a, b = sorted((index, other))
        parts = [data[at:end] for (_, _, at), end in zip(ops, ends)]
        parts[a], parts[b] = parts[b], parts[a]
        return b"".join(parts) + rest
    if kind < 28:
        return data[:start] + draw.choice(_OPS) + data[start:]
    return draw.choice(BYTES)(draw, data)


# zip archives


def _zip(draw: Random, data: bytes) -> bytes:
    """One of the records changed, its sum and sizes made right."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    pickles = [i for i, (name, _) in enumerate(records) if name.endswith(".pkl")]
    index = draw.choice(pickles) if pickles and draw.random() < 0.6 else draw.randrange(len(records))
    name, content = records[index]
    kind, packed = draw.randrange(20), None
    if name.endswith(".pkl") and kind < 16:
        records[index] = name, _pickle(draw, content)
    elif kind < 10:
        records[index] = name, draw.choice(BYTES)(draw, content)
    elif kind == 10:
        del records[index]
    elif kind == 11:
        records.append((name, draw.choice(records)[1]))
    elif kind == 12:
        records.append((draw.choice(("../up", "/abs", "archive/x", name + "/", "", "a" * 5000)), content))
    elif kind == 13:
        records[index] = draw.choice(("data.pkl", name + "x", "other/" + name.rpartition("/")[2])), content
    elif kind == 14:
        packed, records[index] = index, (name, b"\0" * BOMB_BYTES)
    elif kind == 15:
        packed = index
    else:
        records[index] = name, content * 2 if len(content) < 2**16 else content[:7]
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for number, (name, content) in enumerate(records):
            compression = zipfile.ZIP_DEFLATED if number == packed else zipfile.ZIP_STORED
            info = zipfile.ZipInfo(name)
            info.compress_type = compression
            archive.writestr(info, content, compresslevel=1)
    return file.getvalue()


def _zip_fields(draw: Random, data: bytes) -> bytes:
    """A field of one of the records' headers, in the directory at the end or before its data."""
    sign, fields = draw.choice(((b"PK\1\2", ((8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (42, 4))),
                                (b"PK\3\4", ((8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2))),
                                (b"PK\5\6", ((8, 2), (10, 2), (12, 4), (16, 4), (20, 2)))))  # fmt: skip
    found = [match.start() for match in re.finditer(re.escape(sign), data)]
    (field, size), at = draw.choice(fields), draw.choice(found)
    old = int.from_bytes(data[at + field : at + field + size], "little")
    value = draw.choice((draw.choice(NUMBERS), old + 1, old - 1, old + 64, old // 2)) % 2 ** (8 * size)
    return data[: at + field] + value.to_bytes(size, "little") + data[at + field + size :]


# what torch.save wrote, as values


def _odd_tensor(draw: Random, tensor: torch.Tensor):
    dtype = draw.choice((torch.float16, torch.float64, torch.int8, torch.int64, torch.bool, torch.complex64))
    kinds = (
        lambda: tensor.to(dtype),
        lambda: tensor.float() * draw.choice((math.nan, math.inf, 1e38, 0.0, -1.0)),
        lambda: torch.where(torch.arange(tensor.numel()).view(tensor.shape) == 0, math.nan, tensor.float()),
        lambda: tensor[..., None].transpose(0, -1),
        lambda: tensor.flatten()[: draw.choice((0, 1))],
        lambda: torch.zeros(1).expand(draw.choice((tensor.shape, (10**9,), (10**6, 10**6)))),
        lambda: tensor.to_sparse(),
        lambda: torch.empty(tensor.shape, device="meta"),
        lambda: tensor.to(torch.float8_e4m3fn),
        lambda: torch.nn.Parameter(tensor.float()),
        lambda: tensor.tolist() if tensor.numel() < 100 else str(tensor.shape),
        lambda: tensor.item() if tensor.numel() == 1 else tensor.sum(),
    )
    return draw.choice(kinds)()


def _payload(draw: Random, data: bytes) -> bytes:
    """One of the values changed, with the types that the rest has."""
    payload = torch.load(io.BytesIO(data), weights_only=True)
    for _ in range(draw.choice((1, 1, 1, 2))):
        places = _places(payload, [])
        rare = [(container, key) for container, key in places if not torch.is_tensor(container[key])]
        container, key = draw.choice(rare if rare and draw.random() < 0.5 else places)
        if torch.is_tensor(container[key]) and draw.random() < 0.8:
            container[key] = _odd_tensor(draw, container[key])
        elif draw.random() < 0.2:
            del container[key]
        elif draw.random() < 0.2 and isinstance(container, dict):
            container[draw.choice((f"{key}x", 5, "net.causal_transformer.layers.999999999.0.norm.g"))] = container.pop(
                key
            )
        else:
            container[key] = draw.choice((container, _odd_value(draw), {"a": [container[key]]}, torch.zeros(3)))
    file = io.BytesIO()
    torch.save(payload, file, _use_new_zipfile_serialization=data[:2] == b"PK")
    return file.getvalue()


# .npy, parquet, tar


_DESCRIPTIONS = """'<f4' '<f2' '>f4' '<f8' '|O' '<U9' '<i4' '|V4' '<c8' '<M8[ns]' '|b1' [('a','<f4')]
    [('a','|O')] '<f16' ('<f4',(2,)) 'x' None 1 '|S0' '|V0'""".split()
_SHAPES = """() (0,) (0,8) (5,0) (-1,8) (5,-8) (10**9,8) (1000000000000000000,8) (5,8,1) (True,8) (5.0,8) ('5',8) [5,8]
    5 None (0,1000000000000000000) (1,)*99 (18446744073709551616,8) (4611686018427387904,4611686018427387904)""".split()


def _npy(draw: Random, data: bytes) -> bytes:
    length = int.from_bytes(data[8:10], "little")
    header, body, version = data[10 : 10 + length].decode("latin1"), data[10 + length :], data[6:8]
    kind = draw.randrange(8)
    if kind == 0:
        body = draw.choice(BYTES)(draw, body)
    elif kind == 1:
        header = re.sub(r"'descr': [^,]*,", f"'descr': {draw.choice(_DESCRIPTIONS)},", header)
    elif kind == 2:
        header = re.sub(r"'shape': \([^)]*\)", lambda _: f"'shape': {draw.choice(_SHAPES)}", header)
    elif kind == 3:
        new = draw.choice(("True", "False", "1", "None", "'x'"))
        header = re.sub(r"'fortran_order': \w+", f"'fortran_order': {new}", header)
    elif kind == 4:
        version = draw.choice((b"\1\0", b"\2\0", b"\3\0", b"\0\0", b"\xff\1"))
    elif kind == 5:
        long = "(" * 20000, "{" * 200, "[" * 99999, "-" * 9999 + "1", header * 20, header.strip() + " " * 60000
        header = draw.choice((*long, "{}", "", "1"))
    else:
        header = draw.choice((_digits, *BYTES))(draw, header.encode("latin1")).decode("latin1")
    size = 4 if version[0] >= 2 else 2
    encoded = header.encode("latin1")[: 2 ** (8 * size) - 1]
    return b"\x93NUMPY" + version + len(encoded).to_bytes(size, "little") + encoded + body


def _parquet(draw: Random, data: bytes) -> bytes:
    """Bytes of the footer, or of a page's header, where lengths and counts are."""
    length = int.from_bytes(data[-8:-4], "little")
    body, footer = data[: -8 - length], data[-8 - length : -8]
    kind = draw.randrange(10)
    if kind < 6:
        footer = draw.choice((_flip, _flip, _overwrite, _insert, _delete, _varint))(draw, footer)
    elif kind < 9:
        at = 4 + draw.choice((0, 0, draw.randrange(max(1, len(body) - 4))))
        body = body[:at] + draw.choice((_flip, _overwrite, _varint))(draw, body[at : at + 40]) + body[at + 40 :]
    else:
        length = draw.choice(NUMBERS) % 2**32
        return body + footer + length.to_bytes(4, "little") + b"PAR1"
    return body + footer + len(footer).to_bytes(4, "little") + b"PAR1"


def _varint(draw: Random, data: bytes) -> bytes:
    """A number of Thrift's compact form in the place of a byte."""
    value, encoded = draw.choice(NUMBERS) % 2**64, b""
    value = (value << 1) ^ -(draw.random() < 0.2) & (2**64 - 1)
    while value > 127:
        encoded, value = encoded + bytes([value & 127 | 128]), value >> 7
    at = draw.randrange(len(data) + 1)
    return data[:at] + encoded + bytes([value]) + data[at + 1 :]


_TAR_FIELDS = (
    (0, 100),
    (100, 8),
    (124, 12),
    (136, 12),
    (156, 1),
    (157, 100),
    (257, 8),
    (345, 155),
    (386, 12),
    (483, 12),
)


def _tar(draw: Random, data: bytes) -> bytes:
    """A field of a member's header, whose sum is made right."""
    heads = [at for at in range(0, len(data) - 511, 512) if data[at + 257 : at + 262] == b"ustar"]
    at, (field, size) = draw.choice(heads), draw.choice(_TAR_FIELDS)
    head = bytearray(data[at : at + 512])
    if field == 156:
        new = draw.choice(b"0123456780gxLKSVNDMA\0\xff").to_bytes(1, "little")
    elif field in (0, 157, 345):
        names = (
            b"../../up",
            b"/etc/passwd",
            b"a/../b.npy",
            b"\xff\xfe",
            b"0.txt",
            b"1.json",
            b".",
            b"",
            b"a\nb.npy",
            b"0",
        )
        new = draw.choice(names)
    else:
        new = draw.choice((b"0", b"7" * (size - 1), b"\x80" + b"\xff" * (size - 1), b"\xff" * size, b"-1", b"x",
                           b"%o" % (draw.choice(NUMBERS) % 8 ** (size - 1))))  # fmt: skip
    head[field : field + size] = new[:size].ljust(size, b"\0")
    if draw.random() < 0.9:
        head[148:156] = b" " * 8
        head[148:156] = b"%06o\0 " % sum(head)
    extra = b""
    if draw.random() < 0.15:  # a header of headers before it
        extra = _pax(draw)
    return data[:at] + extra + bytes(head) + data[at + 512 :]


def _pax(draw: Random) -> bytes:
    keys = (
        "path",
        "size",
        "linkpath",
        "GNU.sparse.map",
        "GNU.sparse.size",
        "GNU.sparse.numblocks",
        "hdrcharset",
        "mtime",
    )
    values = "0", "-1", "10" * 9, "1,2,3", "x", "0.npy", "nan", "1e400", "../up", "BINARY"
    info = tarfile.TarInfo("0.npy")
    info.pax_headers = {draw.choice(keys): draw.choice(values) for _ in range(draw.choice((1, 2)))}
    made = info.create_pax_header({"name": "x", **info.get_info()}, "utf-8")
    return made[:-512] if len(made) > 512 else made


def _legacy(draw: Random, data: bytes) -> bytes:
    """One of the pickles that begin a file."""
    parts, at = [], 0
    while data[at : at + 1] == b"\x80" and len(parts) < 8:
        end = max(place for _, _, place in pickletools.genops(data[at:])) + at + 1
        parts.append(data[at:end])
        at = end
    index = draw.randrange(len(parts))
    parts[index] = _pickle(draw, parts[index])
    return b"".join(parts) + data[at:]


FORMATS = {
    ".json": (_json, _json, _json),
    ".safetensors": (_safetensors, _safetensors),
    ".npy": (_npy, _npy),
    ".parquet": (_parquet, _parquet),
    ".tar": (_tar, _tar),
}


def mutate(draw: Random, name: str, data: bytes, others: list[bytes]) -> bytes:
    """A file changed once or a few times; `others` are files of its kind, to splice with."""
    suffix = name[name.rfind(".") :] if "." in name else ""
    own = (_zip, _zip, _zip_fields, _payload, _payload) if data[:2] == b"PK" else FORMATS.get(suffix, ())
    if not own and data[:1] == b"\x80":  # torch.save's before 1.6: pickles one after the other
        own = (_legacy, _payload)
    for _ in range(draw.choice((1, 1, 1, 1, 2, 3))):
        if others and draw.random() < 0.04:
            data, own = splice(draw, data, draw.choice(others)), ()
            continue
        try:
            data = draw.choice(own if own and draw.random() < 0.65 else BYTES)(draw, data)
        except Exception:  # what was changed before is no longer of its format
            data = _insert(draw, data)
        own = tuple(change for change in own if change is not _payload)  # torch.load may never end on what was changed
    return data

"""What a file is that is no checkpoint, for messages: what was downloaded, or named, in place of one."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

from fastprior.reading import open_regular, read_json
from fastprior.utils import first_few

START = 4096  # bytes that are looked at

_SIGNATURES = (
    (b"\x1f\x8b", "a gzip archive: unpack it"),
    (b"BZh", "a bzip2 archive: unpack it"),
    (b"\xfd7zXZ", "an xz archive: unpack it"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive: unpack it"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it"),
    (b"Rar!", "a rar archive: unpack it"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x89HDF", "an HDF5 file"),
    (b"GGUF", "a GGUF file"),
    (b"PAR1", "a parquet file"),
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"%PDF", "a PDF document"),
)
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the number with which torch's files before 1.6 begin
_LFS = re.compile(rb"version https?://[\w./-]*git-lfs[\w./-]*\s.*?(?:size (\d+))?\s*$", re.DOTALL)
_PAGE = re.compile(rb"\s*(?:<\?xml[^>]*>\s*)?<(?:!doctype html|html|head|body|error)\b", re.IGNORECASE)


def _json(path: Path) -> str | None:
    try:
        value = read_json(path, kind=None)
    except ValueError:
        return None
    if isinstance(value, dict) and "weight_map" in value:
        return "the index of a model in several files: give it, or its folder, to fastprior.load"
    keys = f" with the keys {first_few(value)}" if isinstance(value, dict) and value else ""
    return f"a JSON file{keys}, such as a configuration, not weights"


def _zip(path: Path) -> str | None:
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except Exception:  # damaged archives raise nearly any type
        return None
    if any(name.endswith("/constants.pkl") for name in names):
        return "a TorchScript archive: save the module's state_dict() where it can be loaded"
    if any(name.endswith("data.pkl") for name in names):
        return None  # torch.save's
    return f"a zip archive of {first_few(names) or 'nothing'}: unpack it"


def describe(path: Path) -> str | None:
    """What a file is, where it is plainly something else than weights; None where that cannot be told."""
    with open_regular(path) as file:
        start = file.read(START)
    if not start:
        return "empty"
    if start[4:9] == b"\0\0\0\0{":  # a safetensors file
        return None
    if match := _LFS.match(start):
        size = f" of {int(match[1]):,} bytes" if match[1] else ""
        return f"a Git LFS pointer to weights{size} that were not downloaded: run `git lfs pull`"
    if _PAGE.match(start):
        return "a web page, such as of a login or an error, that was downloaded in place of the weights"
    for signature, kind in _SIGNATURES:
        if start.startswith(signature):
            return kind
    if start[257:262] == b"ustar":
        return "a tar archive: unpack it"
    if start.startswith(b"PK"):
        return _zip(path)
    if start.lstrip()[:1] in (b"{", b"["):
        return _json(path)
    if start[0] == 0x80 and len(start) > 1 and not start.startswith(_LEGACY[: len(start)]):
        return f"a pickle of protocol {start[1]} that torch.save did not write: save its tensors by torch.save"
    return None

"""Files of anybody are opened without waiting, read within limits, and quoted briefly."""

import os
import re
import socket

import pytest
import torch

from fastprior.reading import QUOTED, open_regular, parse_json, quoted, read_json


def make(path, kind):
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(os.path.relpath(path))
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")


@pytest.mark.parametrize("kind", ["FIFO", "socket", "directory", "device"])
def test_only_regular_files_are_opened(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "a", kind)
    (tmp_path / "link").symlink_to("a")
    for path in (tmp_path / "a", tmp_path / "link"):
        for read in (open_regular, read_json):
            with pytest.raises(ValueError, match=f"^{re.escape(str(path))} is a {kind}; it must be a regular file"):
                read(path)


def test_links_and_what_is_not_there(tmp_path):
    (tmp_path / "a").write_text("[1]")
    (tmp_path / "link").symlink_to("a")
    assert read_json(tmp_path / "link", kind=list) == [1]
    (tmp_path / "broken").symlink_to("nothing")
    with pytest.raises(FileNotFoundError, match="broken does not exist"):
        read_json(tmp_path / "broken")
    with pytest.raises(ValueError, match="link has more than 2 bytes"):
        read_json(tmp_path / "link", most=2)


@pytest.mark.parametrize(
    "text, why",
    [
        ("[" * 10**5, "nested too deeply"), ('{"a":' * 10**5, "nested too deeply"), ('{"a": NaN}', "NaN is no JSON"),
        ("[-Infinity]", "-Infinity is no JSON"), ("{", "Expecting"), (b"\xff\xfe\xff", "decode"),
        ("9" * 9999, "digits"), ("[1]", "x.json holds a JSON list; it must be a dict"),
    ],
)  # fmt: skip
def test_what_is_no_json_is_one_error(text, why):
    with pytest.raises(ValueError, match=f"^x.json .*{re.escape(why.removeprefix('x.json '))}") as caught:
        parse_json(text, "x.json", kind=dict)
    assert len(str(caught.value)) < 2 * QUOTED


def test_quotes_are_short_whatever_the_value():
    cyclic, shared, deep = [], {}, []
    cyclic.append(cyclic)
    for _ in range(200):
        shared, deep = {"a": shared, "b": shared}, [deep]
    for value in (cyclic, shared, deep, "a\n\x1b" * 10**6, "\ud800", 10**10**5, {"k" * 10**6: 1}, torch.ones(3), b"x"):
        text = quoted(value)
        assert len(text) <= QUOTED + 5 and text.isprintable()
    assert quoted("a\n") == "'a\\n'" and quoted([1, None]) == "[1, None]" and quoted(True) == "True"

"""`fastprior bench --serve`: one load on three servers, as a table, a file of figures, and a picture."""

import json

import pytest

import fastprior
from fastprior.cli import command_line as cli
from helpers.priors import make_prior
from helpers.servers import serving


@pytest.fixture
def checkpoint(tmp_path) -> str:
    fastprior.save(make_prior(), tmp_path / "prior.safetensors")
    return str(tmp_path / "prior.safetensors")


@pytest.mark.slow
def test_a_load_on_three_servers(checkpoint, tmp_path, capsys):
    files = [tmp_path / name for name in ("load.png", "load.json")]
    command = ["bench", "--serve", "--checkpoint", checkpoint, "--timesteps", "9", "--short", "4", "--requests", "30"]
    command += ["--load", "0.5", "2", "--rows", "4", "--plot", str(files[0]), "--json", str(files[1])]
    assert cli.main(command) == 0
    first, second, title, *rows = capsys.readouterr().out.splitlines()
    assert first == "float32, 4 and 9 steps, cond_scale 1, 30 requests a rate" and second.startswith("one at a time: ")
    assert title.split()[:3] == ["server", "of", "one"]
    assert len(rows) == 5, "one at a time is left out at twice what it manages"
    figures = json.loads(files[1].read_text())
    assert [(level["server"], level["share"]) for level in figures] == [
        ("step by step", 0.5), ("batches of 16", 0.5), ("one at a time", 0.5),
        ("step by step", 2.0), ("batches of 16", 2.0),
    ]  # fmt: skip
    for row, level in zip(rows, figures):
        assert row.split()[: len(level["server"].split())] == level["server"].split()
        assert level["answered"] == 30 and level["refused"] == {} and level["throughput"] > 0
        assert 0 < level["p50_s"] <= level["p95_s"] <= level["p99_s"]
        assert (level["rows_per_step"] is not None) == (level["server"] == "step by step")
    assert 1 <= figures[0]["rows_per_step"] <= 4
    assert figures[3]["rate"] == pytest.approx(4 * figures[0]["rate"])
    assert files[0].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--load", "0"], "--load [0.0]: rates must be more than 0"), (["--requests", "0"], "--requests 0"),
        (["--plot", "no/such/folder/x.png"], "--plot no/such/folder/x.png: its folder does not exist"),
        (["--rows", "0"], "--rows 0: it must be at least 1"), (["--solver", "euler"], "euler"),
    ],
)  # fmt: skip
def test_bad_options(checkpoint, capsys, options, message):
    assert cli.main(["bench", "--serve", "--checkpoint", checkpoint, *options]) != 0
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_load_on_a_server_elsewhere(capsys, tmp_path):
    with serving(rows=4) as (client, server):
        address, figures = str(client.base_url), tmp_path / "load.json"
        command = ["bench", "--serve", address, "--timesteps", "9", "--requests", "20", "--load", "0.5", "3"]
        assert cli.main([*command, "--json", str(figures)]) == 0
        assert server.engine.stats()["done"] >= 40
    first, _, _, *rows = capsys.readouterr().out.splitlines()
    assert first == f"{address}, tiny, 9 steps, cond_scale 1, 20 requests a rate"
    assert len(rows) == 2 and all(row.split()[:2] == ["the", "server"] for row in rows)
    assert [level["answered"] for level in json.loads(figures.read_text())] == [20, 20]


def test_a_server_that_is_not_there(capsys, checkpoint):
    for options, message in (
        (["--serve", "http://127.0.0.1:9"], "refused"), ([], "--checkpoint PATH must be given"),
        (["--serve", "ftp://x"], "url='ftp://x'; it must be that of a server"),
        (["--serve", "http://x", "--checkpoint", checkpoint], "does not go with it"),
    ):  # fmt: skip
        assert cli.main(["bench", *options]) == 2
        assert message in capsys.readouterr().err

"""`fastprior serve` as operators run it: ready, drained by a signal, aborted by a second, and refused at start."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
import torch

import fastprior
from fastprior.cli import command_line as cli
from helpers import ROOT
from helpers.priors import make_prior, make_text

TEXT = make_text(1, 32)
JSON = {name: t[0].tolist() for name, t in TEXT.items()}
SLOW = "import time; from fastprior.serving.row_model import RowModel; step = RowModel.step\n"
SLOW += "RowModel.step = lambda *args: (time.sleep(0.05), step(*args))[1]\n"  # so that a run takes a second
SLOW += "import sys; from fastprior.cli.command_line import main; sys.exit(main())"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("serve") / "tiny.safetensors"
    fastprior.save(make_prior(timesteps=20), path)
    return str(path)


@contextlib.contextmanager
def running(checkpoint: str, *options: str):
    """A process that serves, once it says so, and its address."""
    command = [sys.executable, "-c", SLOW, "serve", "--checkpoint", checkpoint, "--port", "0", "--rows", "2", *options]
    environment = os.environ | dict(PYTHONPATH=str(ROOT), PYTHONUNBUFFERED="1")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        line = process.stdout.readline()
        assert line.startswith("serving tiny on http://127.0.0.1:"), line + process.stderr.read()
        address, end = line.split()[-1], time.monotonic() + 60
        while time.monotonic() < end:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{address}/health/ready").status_code == 200:
                    break
            time.sleep(0.05)
        yield process, address
    finally:
        process.kill()
        process.wait(20)
        process.stdout.close()
        process.stderr.close()


def ask_behind(address: str, answers: list) -> threading.Thread:
    """Ask for one embedding, in a thread."""

    def ask():
        try:
            answers.append(httpx.post(f"{address}/v1/priors/sample", json=JSON | dict(seed=1), timeout=30).status_code)
        except httpx.TransportError as error:
            answers.append(type(error).__name__)

    thread = threading.Thread(target=ask)
    thread.start()
    end = time.monotonic() + 30
    while httpx.get(f"{address}/stats").json()["running"] == 0 and time.monotonic() < end:
        time.sleep(0.01)
    return thread


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(checkpoint, number):
    with running(checkpoint) as (process, address):
        answers: list = []
        thread = ask_behind(address, answers)
        process.send_signal(number)
        thread.join(30)
        assert answers == [200], "what was on its way was answered"
        assert process.wait(30) == 0
        assert "draining for at most 30 s; a second signal aborts" in process.stderr.read()
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{address}/health/live")


@pytest.mark.slow
def test_a_second_signal_aborts(checkpoint):
    with running(checkpoint) as (process, address):
        answers: list = []
        thread = ask_behind(address, answers)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 1 and time.monotonic() - start < 5
        thread.join(30)
        assert answers != [200] and "aborting" in process.stderr.read()


@pytest.mark.slow
def test_draining_has_an_end(checkpoint):
    with running(checkpoint, "--drain", "0.2", "--steps", "20", "--solver", "ddpm") as (process, address):
        answers: list = []
        thread = ask_behind(address, answers)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (0, 1)
        thread.join(30)
        assert answers and answers != [200]


@pytest.mark.slow
def test_answers_and_options(checkpoint):
    """The name, a key from the environment, 16 bits, and the numbers of a plain call."""
    options = ["--name", "tiny", "--steps", "9", "--solver", "ddim", "--api-key", "secret"]
    with running(checkpoint, *options) as (_, address):
        headers = dict(authorization="Bearer secret")
        answer = httpx.post(f"{address}/v1/priors/sample", json=JSON | dict(seed=4), headers=headers, timeout=30)
        found = torch.tensor(answer.json()["data"][0]["embedding"])
        prior = fastprior.load(checkpoint)
        run = dict(timesteps=9, solver="ddim", num_samples_per_batch=1, progress=False)
        exact = prior.sample(**TEXT, **run, generator=torch.Generator().manual_seed(4))[0]
        assert (found - exact).norm() < 1e-5 * exact.norm()
        assert httpx.get(f"{address}/v1/models").status_code == 401


@pytest.mark.parametrize("options, message", [
    (["--most-rows", "300"], "most_rows=300; it must be at most the queue's length, 256"),
    (["--port", "70000"], "--port 70000: it must be 0 to 65535"),
    (["--waiting", "0"], "--waiting 0: it must be at least 1"),
    (["--timeout", "0"], "timeout=0.0; it must be a finite number of seconds"), (["--drain", "-1"], "drain=-1.0"),
    (["--host", "256.0.0.1"], "256.0.0.1"), (["--clip-model", "ViT-B-32"], "go together"),
    (["--solver", "euler"], "euler"), (["--steps", "99"], "timesteps=99; the schedule has 20"),
])  # fmt: skip
def test_impossible_options_are_refused_at_start(checkpoint, capsys, options, message):
    assert cli.main(["serve", "--checkpoint", checkpoint, "--port", "0", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_port_that_is_taken(checkpoint, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert cli.main(["serve", "--checkpoint", checkpoint, "--port", str(port)]) == 2
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err


def test_a_file_that_is_missing_or_broken(tmp_path, capsys):
    assert cli.main(["serve", "--checkpoint", str(tmp_path / "no.safetensors"), "--port", "0"]) == 2
    assert "no.safetensors" in capsys.readouterr().err
    (tmp_path / "broken.safetensors").write_bytes(json.dumps({}).encode())
    assert cli.main(["serve", "--checkpoint", str(tmp_path / "broken.safetensors"), "--port", "0"]) == 2


def test_without_the_extra(checkpoint, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "fastprior.server.run", raising=False)
    assert cli.main(["serve", "--checkpoint", checkpoint]) == 2
    assert 'uvicorn is not installed: pip install "fastprior[serve]"' in capsys.readouterr().err

"""A replica by itself; and on a real Ray of this machine, where replicas are killed and told to end."""

import asyncio
import functools
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

from fastprior.server.app import Server
from fastprior.server.metrics import Metrics
from fastprior.server.ray_app import Args, Replica, build, deploy
from fastprior.server.settings import Settings
from fastprior.serving.step_engine import StepEngine
from helpers import ROOT
from helpers.bulk_cases import write_prior
from helpers.priors import WordClip, make_prior, relative_error

CONFIG = ROOT / "configs" / "serve-ray.yaml"
RUN = dict(timesteps=16, solver="sde-dpm++", spacing="logsnr")


class Slow(Metrics):
    """Metrics whose engine takes its time for a step."""

    def __init__(self, seconds):
        super().__init__()
        self._seconds = seconds

    def step(self, rows, seconds):
        time.sleep(self._seconds)


def make_tiny():
    torch.manual_seed(0)  # of the stand-in CLIP
    return make_prior(clip=WordClip())


def make_server(folder=None, seconds=0.0, **settings):
    """A server of a tiny prior; the process that has it leaves its number in the folder."""
    prior, metrics = make_tiny(), Slow(seconds)
    if folder is not None:
        (folder / f"{time.time_ns()}-{os.getpid()}").touch()
    engine = StepEngine(prior, rows=4, events=metrics)
    return Server(prior, engine, Settings(**dict(name="tiny") | settings), metrics)


def wanted(text, seed):
    given = dict(num_samples_per_batch=1, progress=False, generator=torch.Generator().manual_seed(seed), **RUN)
    return make_tiny().sample([text], **given)[0]


def is_answered(client, text="a cat", seed=5) -> bool:
    """Whether a text is answered, and if so, by the embedding that the prior makes."""
    try:
        answer = client.post("/v1/embeddings", json=dict(input=text, seed=seed, encoding_format="float"))
    except httpx.TransportError:
        return False
    if answer.status_code != 200:
        return False
    assert relative_error(torch.tensor(answer.json()["data"][0]["embedding"]), wanted(text, seed)) < 1e-5
    return True


def wait_for(found, seconds=60):
    end = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return value


# by itself


@pytest.fixture
def replica():
    found = Replica(make_server)
    yield found
    found.__del__()


def get(replica, path, root_path="", headers=()):
    from starlette.requests import Request

    async def receive():
        return dict(type="http.request", body=b"", more_body=False)

    scope = dict(type="http", method="GET", path=root_path + path, root_path=root_path, query_string=b"")
    return asyncio.run(replica(Request(scope | dict(headers=list(headers)), receive)))


def test_health_is_true(replica, monkeypatch):
    replica.check_health()
    assert get(replica, "/health/ready").status_code == 200
    monkeypatch.setattr(replica._server.engine, "stats", lambda: dict(last_step=time.monotonic() - 100))
    with pytest.raises(RuntimeError, match="the engine has work, and made no step lately"):
        replica.check_health()
    replica._server.engine.close()
    with pytest.raises(RuntimeError, match="the engine has ended"):
        replica.check_health()


def test_the_key_guards_below_any_prefix():
    replica = Replica(functools.partial(make_server, api_key="secret"))
    for prefix in ("", "/prior", "/v1"):
        assert get(replica, "/v1/models", prefix).status_code == 401
        found = get(replica, "/v1/models", prefix, [(b"authorization", b"Bearer secret")])
        assert found.status_code == 200 and found.headers["content-type"] == "application/json"
        assert int(found.headers["content-length"]) == len(found.body) and b'"tiny"' in found.body
        assert get(replica, "/nothing", prefix).status_code == 404
    replica.__del__()


def test_what_cannot_be_warm_is_not_made():
    def closed():
        server = make_server()
        server.engine.close()
        return server

    with pytest.raises(RuntimeError, match="closed"):
        Replica(closed)


@pytest.mark.parametrize(
    "args, said",
    [
        ({}, "checkpoint"),
        (dict(checkpoint="x", row=3), "row\n"),
        (dict(checkpoint="x", rows=0), "rows\n.*greater than or equal to 1"),
        (dict(checkpoint="x", dtype="int8"), "dtype\n"),
        (dict(checkpoint="x", waiting=8), "most_rows=64; it must be at most the queue's length, 8"),
        (dict(checkpoint="x", api_key=""), "api_key is empty"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value) or "none",
)
def test_bad_arguments_are_named(args, said):
    with pytest.raises(ValueError, match=said):
        build(args)


@pytest.mark.slow
def test_a_server_of_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTPRIOR_API_KEY", "secret")
    server = Args(checkpoint=str(write_prior(tmp_path / "mine.safetensors")), rows=2, steps=9, solver="ddim").server()
    assert (server.settings.name, server.settings.api_key, server.engine.rows) == ("mine", "secret", 2)
    found = server.engine.submit(torch.ones(32) / 32**0.5, seed=3).result(60)
    given = dict(timesteps=9, solver="ddim", num_samples_per_batch=1, progress=False)
    draw = torch.Generator().manual_seed(3)
    exact = server.prior.sample(text_embed=torch.ones(1, 32) / 32**0.5, generator=draw, **given)[0]
    assert relative_error(found, exact) < 1e-5
    server.engine.close()


# on Ray


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """A client of a Ray Serve on this machine, without any application."""
    pytest.importorskip("ray.serve")
    import ray
    from ray import serve

    with socket.socket() as free, pytest.MonkeyPatch.context() as patch:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        free.close()
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
        serve.start(http_options=dict(host="127.0.0.1", port=port))
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as found:
            yield found
        serve.shutdown()
        ray.shutdown()


@pytest.fixture
def running(client):
    """Start an application under /, and end it after the test."""
    from ray import serve

    def start(folder, seconds=0.0):
        make = functools.partial(make_server, folder, seconds)
        serve.run(deploy(make, waiting=64, drain=30.0), name="tiny", route_prefix="/", logging_config=None)
        return client

    yield start
    serve.delete("tiny")


def pid(folder, number) -> int | None:
    found = sorted(folder.iterdir())
    return int(found[number].name.split("-")[1]) if len(found) > number else None


@pytest.mark.slow
def test_replicas_answer_and_killed_ones_are_replaced(running, tmp_path):
    client = running(tmp_path, 0.1)
    assert is_answered(client)
    assert client.get("/health/ready").json() == {"status": "ready"}
    assert "fastprior_rows_total" in client.get("/metrics").text
    body, answers = dict(input="a dog", n=4), []
    thread = threading.Thread(target=lambda: answers.append(client.post("/v1/embeddings", json=body).status_code))
    thread.start()
    wait_for(lambda: client.get("/stats").json()["running"] == 4)
    os.kill(pid(tmp_path, 0), signal.SIGKILL)
    thread.join(60)
    assert answers and answers[0] >= 500
    wait_for(lambda: is_answered(client, "a bird", 8))
    assert pid(tmp_path, 1) not in (None, pid(tmp_path, 0))


@pytest.mark.slow
def test_replicas_drain(running, tmp_path):
    from ray import serve

    client, answers = running(tmp_path, 0.02), []
    thread = threading.Thread(target=lambda: answers.append(is_answered(client, "a fish", 9)))
    thread.start()
    wait_for(lambda: client.get("/stats").json()["running"] == 1)
    serve.delete("tiny")
    thread.join(60)
    assert answers == [True]
    with pytest.raises(ProcessLookupError):
        wait_for(lambda: os.kill(pid(tmp_path, 0), 0))


@pytest.mark.slow
def test_the_config_runs(client, tmp_path):
    import ray
    import yaml
    from ray import serve
    from ray.serve.schema import ServeDeploySchema

    config = yaml.safe_load(CONFIG.read_text())
    ServeDeploySchema.model_validate(config)
    (application,) = config["applications"]
    Args.model_validate(application["args"])
    application["args"]["checkpoint"] = str(write_prior(tmp_path / "mine.safetensors"))
    (deployment,) = application["deployments"]
    deployment["ray_actor_options"]["num_cpus"] = 1
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-m", "ray.serve.scripts", "run", "--address", address, "--non-blocking"]
    done = subprocess.run(
        [*command, str(tmp_path / "config.yaml")], capture_output=True, text=True, timeout=100, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    try:
        wait_for(lambda: client.get("/health/ready").status_code == 200)
        assert client.get("/v1/models").json()["data"][0]["id"] == "mine"
        found = serve.status().applications["fastprior"].deployments["Prior"]
        assert found.status == "HEALTHY"
    finally:
        serve.delete("fastprior")

"""A server of a tiny prior on a real socket, for as long as a test takes."""

import asyncio
import contextlib
import socket
import threading
import time

import httpx
import uvicorn

from fastprior.server.app import Server
from fastprior.server.metrics import Metrics
from fastprior.server.run import listen
from fastprior.server.settings import Settings
from fastprior.serving.step_engine import StepEngine
from helpers.priors import WordClip, make_prior


class Gate(Metrics):
    """Metrics whose engine can be held before its next step."""

    def __init__(self):
        super().__init__()
        self.open, self.reached = threading.Event(), threading.Event()
        self.open.set()

    def step(self, rows, seconds):
        super().step(rows, seconds)
        self.reached.set()
        assert self.open.wait(60)

    def hold(self):
        self.reached.clear()
        self.open.clear()


@contextlib.contextmanager
def serving(prior=None, settings: dict | None = None, **engine):
    """A running server, by a client of it and itself."""
    prior, gate = prior or make_prior(clip=WordClip()), Gate()
    engine = StepEngine(prior, events=gate, **dict(rows=4) | engine)
    server = Server(prior, engine, Settings(**dict(name="tiny") | (settings or {})), gate)
    bound = listen("127.0.0.1", 0)
    running = uvicorn.Server(uvicorn.Config(server.app, log_level="error", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=asyncio.run, args=(running.serve(sockets=[bound]),))
    thread.start()
    while not running.started:
        time.sleep(0.001)
    server.warm = True
    host, port = bound.getsockname()
    try:
        with httpx.Client(base_url=f"http://{host}:{port}", timeout=60) as client:
            yield client, server
    finally:
        gate.open.set()
        running.should_exit = True
        engine.close()
        thread.join(20)
        server.close()
        bound.close()
        assert not thread.is_alive()


def raw(client: httpx.Client, data: bytes) -> socket.socket:
    """A connection on which these bytes were sent."""
    found = socket.create_connection((client.base_url.host, client.base_url.port), timeout=20)
    found.sendall(data)
    return found

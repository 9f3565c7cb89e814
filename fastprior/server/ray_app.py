"""The server on Ray Serve: replicas with an engine each, as many as requests need."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

import fastprior
from fastprior.clip import make_adapter
from fastprior.server.app import Server
from fastprior.server.metrics import Metrics
from fastprior.server.run import first_request
from fastprior.server.settings import Settings
from fastprior.serving.step_engine import StepEngine

KEY = "FASTPRIOR_API_KEY"
TARGET = 8  # requests of a replica: about as many rows as share a step on a CPU before it takes longer


class Args(BaseModel):
    """Arguments of `build`, which are those of `fastprior serve`.

    Attributes:
        checkpoint: of a prior; a path that all machines have.
        name: of the model, in requests and answers; by default the file's, without its suffix.
        api_key: that requests under /v1 must carry; by default FASTPRIOR_API_KEY of the environment.
        clip: encodes texts, as `prior.clip` of training configs describes it; by default none, and texts are refused.
        device: "cpu" or "cuda"; by default "cuda" where the replica sees one.
        dtype: of the network.
        steps, solver, spacing: of requests that say nothing of it.
        rows, waiting, alike: see `StepEngine`.
        most_rows, most_body, timeout, drain: see `Settings`.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    checkpoint: str
    name: str | None = None
    api_key: str | None = None
    clip: dict[str, Any] | None = None
    device: Literal["cpu", "cuda"] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    steps: int | None = Field(None, ge=1)
    solver: str | None = None
    spacing: str | None = None
    rows: int | None = Field(None, ge=1)
    waiting: int = Field(256, ge=1)
    alike: bool = False
    most_rows: int = 64
    most_body: int = 32 * 2**20
    timeout: float = 60.0
    drain: float = 30.0

    def settings(self) -> Settings:
        """Settings of a server. Raises ValueError where they are impossible."""
        settings = Settings(
            name=self.name or Path(self.checkpoint).stem,
            api_key=os.environ.get(KEY) if self.api_key is None else self.api_key,
            timeout=self.timeout, most_body=self.most_body, most_rows=self.most_rows, drain=self.drain,
        )  # fmt: skip
        settings.check_queue(self.waiting)
        return settings

    def server(self) -> Server:
        """A server of the checkpoint, in the process that calls it."""
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        clip = None if self.clip is None else make_adapter(**self.clip).to(device)
        prior, metrics = fastprior.load(self.checkpoint, clip=clip, device=device), Metrics()
        engine = StepEngine(
            prior, timesteps=self.steps, solver=self.solver, spacing=self.spacing, dtype=getattr(torch, self.dtype),
            rows=self.rows, waiting=self.waiting, alike=self.alike or None, events=metrics,
        )  # fmt: skip
        return Server(prior, engine, self.settings(), metrics)


class Replica:
    """A replica: made when its first embedding is, drained before it ends.

    Args:
        make: makes its server, in its process.
    """

    def __init__(self, make: Callable[[], Server]):
        self._server = make()
        first_request(self._server).result()
        self._server.warm = True

    async def __call__(self, request: Request) -> Response:
        """What the server's application answers; routes and the key are looked at below the prefix of the route."""
        scope, found = dict(request.scope), Response()
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        scope |= dict(path=path, root_path="")
        parts = []

        async def send(message: dict) -> None:
            if message["type"] == "http.response.start":
                found.status_code, found.raw_headers = message["status"], list(message["headers"])
            else:
                parts.append(message.get("body", b""))

        await self._server.app(scope, request.receive, send)
        found.body = b"".join(parts)
        return found

    def check_health(self) -> None:
        """Raise RuntimeError, for which Ray replaces the replica, where the engine ended or its steps stall."""
        if not self._server.is_ready:
            state = "has ended" if self._server.engine.closed else "has work, and made no step lately"
            raise RuntimeError(f"the engine {state}")

    def __del__(self):
        server = getattr(self, "_server", None)  # none where the constructor failed
        if server is not None and not server.ending:
            server.ending = True
            server.engine.close()
            server.close()


def deploy(make: Callable[[], Server], *, waiting: int, drain: float) -> Any:
    """An application of Ray Serve, not yet running.

    Args:
        make: makes a server; is pickled, and called in each replica.
        waiting: how many embeddings wait in an engine at most. A replica takes twice as many requests, so that it is
            the server that refuses them, and says when to retry.
        drain: seconds that requests have left where a replica is told to end.
    Raises:
        ImportError: there is no Ray Serve.
    """
    try:
        from ray import serve
    except ImportError as error:
        raise ImportError(f'{error.name} is not installed: pip install "fastprior[ray,serve]"') from error
    deployment = serve.deployment(
        Replica, name="Prior", max_ongoing_requests=2 * waiting,
        autoscaling_config=dict(min_replicas=1, max_replicas=1, target_ongoing_requests=TARGET),
        ray_actor_options=dict(num_cpus=1), graceful_shutdown_timeout_s=drain + 5,
        graceful_shutdown_wait_loop_s=min(1.0, drain),
    )  # fmt: skip
    return deployment.bind(make)


def build(args: dict[str, Any]) -> Any:
    """An application of Ray Serve, for `import_path` of its config files.

    Args:
        args: those of `Args`, by name.
    Raises:
        ValueError: an argument is unknown, missing, or impossible; it is named.
        ImportError: there is no Ray Serve.
    """
    asked = Args.model_validate(args)
    asked.api_key = asked.settings().api_key  # of this environment, which replicas elsewhere may not have
    return deploy(partial(Args.server, asked), waiting=asked.waiting, drain=asked.drain)

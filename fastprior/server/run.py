"""A server from its first request to its last: warm before it is ready, drained when it is told to end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import Future

import torch
import torch.nn.functional as F
import uvicorn
from torch import Tensor

from fastprior.server.app import Server

_log = logging.getLogger("fastprior.server")


class _Uvicorn(uvicorn.Server):
    """It ends by itself when told to: the first signal drains, the second aborts, and neither is raised again."""

    def __init__(self, config: uvicorn.Config, server: Server):
        super().__init__(config)
        self._server = server

    def handle_exit(self, sig: int, frame: object) -> None:
        if self.should_exit:
            _log.warning("aborting")
            self.force_exit = True
            return
        _log.warning("draining for at most %g s; a second signal aborts", self._server.settings.drain)
        self._server.ending = self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        kept = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound, before anything slow is done. Raises OSError that names the address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # with the protocol, for which alone asyncio turns Nagle's algorithm off: answers would wait 40 ms for an ACK
    found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
    except OSError as error:
        found.close()
        raise OSError(error.errno, f"cannot listen on {host}:{port}: {error.strerror or error}") from None
    return found


def serve(server: Server, bound: socket.socket, log_level: str = "warning") -> int:
    """Answer until a signal comes; what is on its way then has the settings' `drain` seconds.

    Returns:
        0 where all was answered, 1 where it was aborted, or had not the time.
    """
    config = uvicorn.Config(
        server.app, log_level=log_level, access_log=False, server_header=False,
        timeout_graceful_shutdown=server.settings.drain, timeout_keep_alive=30,
    )  # fmt: skip
    running = _Uvicorn(config, server)

    async def main() -> None:
        warming = asyncio.create_task(_warm_up(server))
        try:
            await running.serve(sockets=[bound])
        finally:
            warming.cancel()

    with running.capture_signals():
        asyncio.run(main())
    stats = server.engine.stats()
    server.engine.close()
    server.close()
    return int(running.force_exit or stats["running"] + stats["waiting"] > 0)


def first_request(server: Server) -> Future[Tensor]:
    """Ask for an embedding, which builds, compiles and measures what later requests find ready."""
    prior = server.prior
    text = dict(text_embed=F.normalize(torch.ones(prior.net.text_embed_dim), dim=-1))
    if prior.condition_on_text_encodings:
        text["text_encodings"] = torch.ones(1, prior.net.text_dim)
    return server.engine.submit(**text, seed=0)


async def _warm_up(server: Server) -> None:
    try:
        await asyncio.wrap_future(first_request(server))
    except Exception:
        _log.exception("the first request failed; the server is not ready")
        return
    server.warm = True
    _log.warning("ready: %d rows at once", server.engine.stats()["rows"])

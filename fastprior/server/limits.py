"""What a request must keep to before anybody reads it: its size, its time, its key."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable
from typing import Any

from fastprior.server.errors import ApiError
from fastprior.server.settings import Settings
from fastprior.server.wire import dumps

Receive = Callable[[], Awaitable[dict]]
Send = Callable[[dict], Awaitable[None]]


class Limits:
    """An ASGI application around another one: bodies arrive whole, in time and within bounds, and with the key.

    A body over the limit is refused while it is read, not after.
    """

    def __init__(self, app: Callable, settings: Settings, note: Callable[[str], None]):
        self._app, self._settings, self._note = app, settings, note
        self._key = None if settings.api_key is None else f"Bearer {settings.api_key}".encode()

    async def __call__(self, scope: dict, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            headers = dict(scope["headers"])
            if scope["path"].startswith("/v1/") and self._key is not None:
                if not hmac.compare_digest(headers.get(b"authorization", b""), self._key):
                    self._note("key")
                    raise ApiError(401, "the API key is missing or wrong", "authorization", "invalid_api_key")
            body = await self._body(headers, receive) if scope["method"] in ("POST", "PUT", "PATCH") else b""
        except ApiError as error:
            await answer(send, error)
            return
        if body is None:  # the client has left
            return
        given = False

        async def replay() -> dict:
            nonlocal given
            if not given:
                given = True
                return dict(type="http.request", body=body, more_body=False)
            return await receive()

        await self._app(scope, replay, send)

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
        most, parts, size = self._settings.most_body, [], 0
        said = headers.get(b"content-length", b"0")
        if said.isdigit() and int(said) > most:
            self._too_large(int(said))

        async def read() -> bytes | None:
            nonlocal size
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > most:
                    self._too_large(size)
                if not message.get("more_body"):
                    return b"".join(parts)

        try:
            return await asyncio.wait_for(read(), self._settings.body_seconds)
        except (TimeoutError, asyncio.TimeoutError):  # which are two before Python 3.11
            self._note("slow body")
            seconds = self._settings.body_seconds
            raise ApiError(408, f"the body did not arrive within {seconds:g} s", "body", "body_timeout") from None

    def _too_large(self, size: int) -> None:
        self._note("body")
        rule = f"it must have at most {self._settings.most_body}"
        raise ApiError(413, f"the body has {size} bytes or more; {rule}", "body", "body_too_large")


async def answer(send: Send, error: ApiError) -> None:
    """Send an error, and close the connection, on which the rest of a body may still come."""
    body: Any = dumps(error.body())
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    headers.append((b"content-length", str(len(body)).encode()))
    headers += [(name.lower().encode(), value.encode()) for name, value in (error.headers or {}).items()]
    await send(dict(type="http.response.start", status=error.status, headers=headers))
    await send(dict(type="http.response.body", body=body))

"""A server of embeddings elsewhere, asked over HTTP as any client would."""

from __future__ import annotations

import http.client
import json
import threading
import urllib.parse
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

KIND = "application/vnd.safetensors"
CALLERS = 512  # requests at once, at most


class Refused(RuntimeError):
    """An answer other than 200.

    Attributes:
        status: of HTTP.
    """

    def __init__(self, status: int, message: str):
        super().__init__(f"{status}: {message}")
        self.status = status


class Remote:
    """A `fastprior serve` by its address; connections are kept.

    Args:
        url: such as http://127.0.0.1:8000.
        api_key: that it asks for.

    Attributes:
        model: what /v1/models says of the one model that is served.

    Raises:
        ValueError: the url is none of http or https.
        OSError, Refused: it does not answer, or not so.
    """

    def __init__(self, url: str, api_key: str | None = None, timeout: float = 300.0):
        found = urllib.parse.urlsplit(url)
        if found.scheme not in ("http", "https") or not found.hostname:
            raise ValueError(f"url={url!r}; it must be that of a server, such as http://127.0.0.1:8000")
        self._connect = http.client.HTTPSConnection if found.scheme == "https" else http.client.HTTPConnection
        self._where, self._timeout, self._prefix = (found.hostname, found.port), timeout, found.path.rstrip("/")
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._kept, self._pool = threading.local(), ThreadPoolExecutor(CALLERS, "fastprior-remote")
        self.model: dict[str, Any] = json.loads(self._ask("GET", "/v1/models"))["data"][0]

    def stats(self) -> dict[str, float]:
        """What its engine does now."""
        return json.loads(self._ask("GET", "/stats"))

    def submit(self, text: dict[str, Tensor], **options: Any) -> Future:
        """Ask for an embedding (dim,) of `text_embed` (dim,) and `text_encodings` (length, dim), in a thread."""
        body = safetensors.torch.save({name: t.contiguous() for name, t in text.items()})
        query = urllib.parse.urlencode({name: value for name, value in options.items() if value is not None})
        return self._pool.submit(self._sample, f"/v1/priors/sample?{query}", body)

    def _sample(self, path: str, body: bytes) -> Tensor:
        found = self._ask("POST", path, body, {"content-type": KIND, "accept": KIND})
        return safetensors.torch.load(found)["image_embeds"][0]

    def _ask(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> bytes:
        """A request on this thread's connection; on a new one where the server has closed that."""
        for again in (True, False):
            connection = getattr(self._kept, "connection", None)
            if connection is None:
                connection = self._kept.connection = self._connect(*self._where, timeout=self._timeout)
            try:
                connection.request(method, self._prefix + path, body, self._headers | (headers or {}))
                answer = connection.getresponse()
                data = answer.read()
                break
            except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
                connection.close()
                self._kept.connection = None
                if not again:
                    raise
        if answer.will_close:
            connection.close()
            self._kept.connection = None
        if answer.status != 200:
            raise Refused(answer.status, data[:300].decode(errors="replace"))
        return data

    def random_texts(self, count: int) -> dict[str, Tensor]:
        """Embeddings (count, dim), and encodings where the prior needs them, as its model says."""
        draw, model = torch.Generator().manual_seed(0), self.model
        embeds = torch.randn(count, model["text_embed_dim"], generator=draw)
        text = dict(text_embed=torch.nn.functional.normalize(embeds, dim=-1))
        if model["needs_text_encodings"]:
            shape = count, model["max_text_len"], model["text_encodings_dim"]
            text["text_encodings"] = torch.randn(shape, generator=draw)
        return text

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

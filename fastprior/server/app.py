"""The application: its routes, and how each answers."""

from __future__ import annotations

import asyncio
import importlib.resources
import logging
import time
from collections.abc import Callable, Collection
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from torch import Tensor

from fastprior.prior.diffusion_prior import DiffusionPrior
from fastprior.server import bodies, wire
from fastprior.server.errors import ApiError
from fastprior.server.limits import Limits
from fastprior.server.metrics import Metrics
from fastprior.server.rows import Gone, Rows
from fastprior.server.schemas import BinaryOptions, EmbeddingsRequest, Options, SampleRequest
from fastprior.server.settings import Settings
from fastprior.server.texts import Texts
from fastprior.serving.step_engine import StepEngine
from fastprior.version import __version__

_log = logging.getLogger(__name__)
BINARY_BODY = {kind: {"schema": {"type": "string", "format": "binary"}} for kind in wire.BINARY}
TENSORS = "it may hold text_embed and text_encodings"
ERROR = {"description": "An error, in OpenAI's shape."}
ERRORS = {status: ERROR for status in (400, 401, 404, 408, 413, 429, 500, 503, 504)}


class Server:
    """An application on an engine, and whether it is ready.

    Args:
        prior: that the engine serves.
        engine: told by `metrics`, see `StepEngine`.
        metrics: figures of both.

    Attributes:
        app: for an ASGI server.
        warm: whether a first request was answered.
        ending: whether it was told to end.
    """

    def __init__(self, prior: DiffusionPrior, engine: StepEngine, settings: Settings, metrics: Metrics):
        settings.check_queue(engine.waiting)
        self.prior, self.engine, self.settings, self.metrics = prior, engine, settings, metrics
        self.warm = self.ending = False
        self._rows = Rows(engine, settings, self._note)
        self._texts = None if prior.clip is None else Texts(prior, engine.waiting)
        self._began = int(time.time())
        api = FastAPI(title="fastprior", version=__version__, docs_url=None, redoc_url=None)
        self._add_errors(api)
        self._add_routes(api)
        routes = {route.path for route in api.routes}
        self.app = Counted(Limits(api, settings, self._note), metrics, routes)

    def _note(self, reason: str) -> None:
        self.metrics.rejected.labels(reason).inc()

    @property
    def is_ready(self) -> bool:
        """Whether it answers: warm, not ending, and idle or with a step of late."""
        if self.ending or not self.warm or self.engine.closed:
            return False
        return time.monotonic() - self.engine.stats()["last_step"] < self.settings.stall

    def _add_errors(self, api: FastAPI) -> None:
        # All are coroutines: Starlette would call plain functions in threads of a pool
        async def of_api(_: Request, error: ApiError) -> Response:
            return _json(error.body(), error.status, error.headers)

        async def of_body(_: Request, error: RequestValidationError) -> Response:
            return await of_api(_, bodies.invalid(error.errors()))

        async def of_route(_: Request, error: HTTPException) -> Response:
            headers = dict(error.headers or {})
            return await of_api(_, ApiError(error.status_code, str(error.detail), None, None, headers))

        async def of_us(_: Request, error: Exception) -> Response:
            _log.error("a request failed", exc_info=error)
            return await of_api(_, ApiError(500, "the server failed; its log says why", None, "internal_error"))

        async def of_gone(_: Request, error: Gone) -> Response:
            return Response(status_code=499)

        for kind, handler in (
            (ApiError, of_api), (RequestValidationError, of_body), (HTTPException, of_route), (Exception, of_us),
            (Gone, of_gone),
        ):  # fmt: skip
            api.add_exception_handler(kind, handler)

    def _add_routes(self, api: FastAPI) -> None:
        binary = {"requestBody": {"required": True, "content": BINARY_BODY | _schema_of(SampleRequest)}}
        of_texts = {"requestBody": {"required": True, "content": _schema_of(EmbeddingsRequest)}}
        api.post("/v1/embeddings", responses=ERRORS, openapi_extra=of_texts)(self.embeddings)
        api.post("/v1/priors/sample", responses=ERRORS, openapi_extra=binary)(self.sample)
        api.get("/v1/models", responses={401: ERROR})(self.models)
        api.get("/health/live", responses={503: ERROR})(self.live)
        api.get("/health/ready", responses={503: ERROR})(self.ready)
        api.get("/metrics")(self.figures)
        api.get("/stats")(self.stats)
        api.get("/", include_in_schema=False)(self.page)

    async def embeddings(self, request: Request) -> Response:
        """Image embeddings of texts."""
        asked = bodies.parsed(await request.body(), EmbeddingsRequest)
        self._check_model(asked)
        if self._texts is None:
            rule = "this server has no CLIP; send text embeddings to /v1/priors/sample"
            raise ApiError(400, f"texts cannot be encoded: {rule}", "input", "no_clip")
        if asked.negative_prompt is not None:
            rule = "this prior is guided away from its learned null embedding, and has no negative prompt"
            raise ApiError(400, f"negative_prompt was given; {rule}", "negative_prompt", "no_negative_prompt")
        width = self.prior.image_embed_dim
        if asked.dimensions not in (None, width):
            raise ApiError(400, f"dimensions={asked.dimensions}; it must be {width}, or left out", "dimensions")
        texts = [asked.input] if isinstance(asked.input, str) else asked.input
        if len(texts) * asked.n > self.settings.most_rows:  # before they are encoded
            rule = f"a request must ask for at most {self.settings.most_rows}"
            raise ApiError(400, f"{len(texts)} texts, {asked.n} embeddings each; {rule}", "input", "too_many_rows")
        tokens = 0

        async def encoded() -> list[dict[str, Tensor]]:
            nonlocal tokens
            found = await self._texts.encode(texts)
            tokens = sum(one.tokens for one in found)
            return [one.condition for one in found]

        embeds = await self._rows.sample(request, encoded(), asked)
        return self._answer(request, embeds, asked.encoding_format, tokens)

    async def sample(self, request: Request) -> Response:
        """An image embedding of a text embedding; the body is JSON, or safetensors with options in the query."""
        if _media(request.headers.get("content-type", "")) in wire.BINARY:
            asked: Any = bodies.validated(dict(request.query_params), BinaryOptions)
            given: dict[str, Any] = wire.load_safetensors(await request.body())
            if strange := sorted(given.keys() - {"text_embed", "text_encodings"}):
                raise ApiError(400, f"the body holds {strange[0][:100]}; {TENSORS}", "body")
        else:
            asked = bodies.parsed(await request.body(), SampleRequest)
            given = dict(text_embed=asked.text_embed, text_encodings=asked.text_encodings)
        self._check_model(asked)
        embeds = await self._rows.sample(request, [self._text(given)], asked)
        return self._answer(request, embeds, asked.encoding_format)

    def _text(self, given: dict[str, Any]) -> dict[str, Tensor]:
        net = self.prior.net
        widths, found = dict(text_embed=(net.text_embed_dim, 1), text_encodings=(net.text_dim, 2)), {}
        for name, (width, ndim) in widths.items():
            value = given.get(name)
            if value is None:
                continue
            if isinstance(value, Tensor):
                value = value[0] if value.ndim == ndim + 1 and len(value) == 1 else value
                if value.ndim != ndim or value.shape[-1] != width or not value.isfinite().all():
                    rule = f"({width},)" if ndim == 1 else f"(length, {width})"
                    shape = tuple(value.shape)
                    raise ApiError(400, f"{name} has shape {shape}; it must be {rule}, of finite numbers", name)
                found[name] = value
            else:
                found[name] = wire.tensor_of(value, name, width, ndim)
        if "text_embed" not in found:
            raise ApiError(400, "text_embed is missing; it must be given", "text_embed")
        if self.prior.condition_on_text_encodings and "text_encodings" not in found:
            rule = "this prior is conditioned on text encodings"
            raise ApiError(400, f"text_encodings is missing; {rule}", "text_encodings")
        return found

    def _check_model(self, asked: Options) -> None:
        if asked.model not in (None, self.settings.name):
            message = f"model={asked.model[:100]!r}; this server has {self.settings.name!r}"
            raise ApiError(404, message, "model", "model_not_found")

    def _answer(self, request: Request, embeds: Tensor, encoding_format: str, tokens: int = 0) -> Response:
        if _media(request.headers.get("accept", "")) in wire.BINARY:
            return Response(wire.save_safetensors(embeds, dict(model=self.settings.name)), media_type=wire.SAFETENSORS)
        data = wire.embeddings(embeds, encoding_format == "base64")
        usage = dict(prompt_tokens=tokens, total_tokens=tokens)
        return _json({"object": "list", "data": data, "model": self.settings.name, "usage": usage})

    async def models(self) -> Response:
        """The one model that is served, and what it takes."""
        prior, net = self.prior, self.prior.net
        model = {"id": self.settings.name, "object": "model", "created": self._began, "owned_by": "fastprior"}
        model |= dict(
            embedding_dim=prior.image_embed_dim, text_embed_dim=net.text_embed_dim, text_encodings_dim=net.text_dim,
            max_text_len=net.max_text_len,
            needs_text_encodings=prior.condition_on_text_encodings, takes_texts=self._texts is not None,
            timesteps=prior.noise_scheduler.num_timesteps, guidance=prior.can_classifier_guidance,
        )  # fmt: skip
        return _json({"object": "list", "data": [model]})

    async def live(self) -> Response:
        """Whether the process can answer at all: 503 where its engine has ended, and it is not ending itself."""
        is_dead = self.engine.closed and not self.ending
        return _json({"status": "dead" if is_dead else "live"}, 503 if is_dead else 200)

    async def ready(self) -> Response:
        """Whether requests are answered: 503 before the first one was, while the server ends, and where steps stall."""
        return _json({"status": "ready"} if self.is_ready else {"status": "not ready"}, 200 if self.is_ready else 503)

    async def figures(self) -> Response:
        """Figures for Prometheus."""
        stats = self.engine.stats()
        text = self.metrics.text(stats["running"], stats["waiting"])
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def stats(self) -> Response:
        """What the engine does now, see `StepEngine.stats`, and how many texts wait to be encoded."""
        stats = self.engine.stats()
        stats["texts_waiting"] = 0 if self._texts is None else self._texts.waiting
        stats["idle_s"] = max(0.0, time.monotonic() - stats.pop("last_step"))
        return _json(stats)

    async def page(self) -> Response:
        """A page to try it, with live curves."""
        file = importlib.resources.files("fastprior.server") / "page.html"
        return Response(file.read_text(encoding="utf-8"), media_type="text/html; charset=utf-8")

    def close(self) -> None:
        """End what encodes texts."""
        if self._texts is not None:
            self._texts.close()


class Counted:
    """An ASGI application whose requests are counted by route and status, and timed."""

    def __init__(self, app: Callable, metrics: Metrics, routes: Collection[str]):
        self._app, self._metrics, self._routes = app, metrics, routes

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 499  # of who left before an answer began

        async def noted(message: dict) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except asyncio.CancelledError:
            raise
        except Exception:
            status = 500
            raise
        finally:
            route = scope["path"] if scope["path"] in self._routes else "unknown"  # few labels, whatever is asked for
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.request_seconds.labels(route).observe(time.perf_counter() - start)


def _media(header: str) -> str:
    return header.partition(";")[0].partition(",")[0].strip().lower()


def _schema_of(kind: type[BaseModel]) -> dict[str, Any]:
    return {"application/json": {"schema": kind.model_json_schema(ref_template="#/components/schemas/{model}")}}


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(wire.dumps(value), status, headers, "application/json")

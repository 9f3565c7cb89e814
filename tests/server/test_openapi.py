"""The OpenAPI document: requests drawn from it, and mutated, get answers that it describes."""

import hypothesis
import pytest
import schemathesis

from fastprior.server.app import Server
from fastprior.server.metrics import Metrics
from fastprior.server.settings import Settings
from fastprior.serving.step_engine import StepEngine
from helpers.priors import WordClip, make_prior
from helpers.servers import serving


def test_the_document():
    metrics = Metrics()
    with StepEngine(make_prior(clip=WordClip()), rows=1, events=metrics) as engine:
        server = Server(engine.prior, engine, Settings(name="tiny"), metrics)
        with serving() as (client, _):
            document = client.get("/openapi.json").json()
        server.close()
    paths = document["paths"]
    assert paths.keys() >= {"/v1/embeddings", "/v1/priors/sample", "/v1/models", "/health/ready", "/metrics"}
    body = paths["/v1/embeddings"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["required"] == ["input"] and {"seed", "steps", "n", "guidance_scale"} <= body["properties"].keys()
    assert "application/vnd.safetensors" in paths["/v1/priors/sample"]["post"]["requestBody"]["content"]


@pytest.mark.slow
def test_requests_drawn_from_it():
    """Whatever comes: no answer is a server's error, and none takes the server down."""

    class AnyLetter(WordClip):
        def tokenize(self, texts):
            return super().tokenize(["".join(chr(ord(c) % 128) for c in text) for text in texts])

    with serving(make_prior(clip=AnyLetter()), waiting=128) as (client, server):
        schema = schemathesis.openapi.from_url(f"{client.base_url}/openapi.json")
        statuses = set()
        for result in schema.get_all_operations():
            operation = result.ok()

            @hypothesis.settings(
                max_examples=40, deadline=None, database=None, derandomize=True,
                suppress_health_check=list(hypothesis.HealthCheck),
            )  # fmt: skip
            @hypothesis.given(case=operation.as_strategy())
            def call(case):
                answer = case.call(base_url=str(client.base_url))
                statuses.add((case.operation.path, answer.status_code))
                assert answer.status_code == 504 or answer.status_code < 500, answer.text[:300]

            call()
        assert ("/v1/embeddings", 200) in statuses and ("/v1/embeddings", 400) in statuses
        assert client.get("/health/ready").status_code == 200 and server.engine.stats()["running"] == 0

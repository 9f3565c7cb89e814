"""A server over real sockets: answers, errors that name the field, limits, and clients that leave."""

import base64
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
import safetensors.torch
import torch

from fastprior.server.settings import Settings
from helpers.priors import WordClip, make_prior, make_text, relative_error
from helpers.servers import raw, serving

RUN = dict(timesteps=16, solver="sde-dpm++", spacing="logsnr")
TEXT = make_text(1, 32)
JSON = dict(text_embed=TEXT["text_embed"][0].tolist(), text_encodings=TEXT["text_encodings"][0].tolist())
SAFETENSORS = "application/vnd.safetensors"


def in_base64(t: torch.Tensor, dtype=np.float32) -> str:
    return base64.b64encode(t.numpy().astype(dtype)).decode()


def wanted(prior, seed=0, text=None, scale=1.0, **run):
    text = dict(text=[text]) if text else TEXT
    draw = torch.Generator().manual_seed(seed)
    given = dict(num_samples_per_batch=1, progress=False, generator=draw, cond_scale=scale, **run or RUN)
    return prior.sample(**text, **given)[0]


def embed_of(entry) -> torch.Tensor:
    value = entry["embedding"]
    return torch.tensor(value) if isinstance(value, list) else torch.frombuffer(
        bytearray(base64.b64decode(value)), dtype=torch.float32
    )  # fmt: skip


@pytest.fixture(scope="module")
def served():
    with serving() as found:
        yield found


def test_texts_with_the_client_of_openai(served):
    client, server = served
    ask = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0).embeddings.create
    for encoding in (openai.omit, "float"):  # the client asks for base64 by itself
        options = dict(seed=5, guidance_scale=3.0, steps=9, solver="ddim")
        found = ask(model="tiny", input=["a cat", "a dog"], encoding_format=encoding, extra_body=options)
        assert [entry.index for entry in found.data] == [0, 1] and found.model == "tiny"
        for number, text in enumerate(("a cat", "a dog")):
            exact = wanted(server.prior, 5 + number, text, 3.0, timesteps=9, solver="ddim")
            assert relative_error(torch.tensor(found.data[number].embedding), exact) < 1e-5
    with pytest.raises(openai.NotFoundError, match="model='gpt'; this server has 'tiny'"):
        ask(model="gpt", input="a cat")
    assert [model.id for model in openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="x").models.list()] == [
        "tiny"
    ]


def test_embeddings_in_every_form(served):
    """Lists, base64 of fp32 and of fp16, and safetensors, both ways."""
    client, server = served
    exact = wanted(server.prior, 3)
    for body in (
        JSON, JSON | dict(text_embed=in_base64(TEXT["text_embed"])),
        JSON | dict(text_encodings=in_base64(TEXT["text_encodings"]), encoding_format="base64"),
    ):  # fmt: skip
        found = client.post("/v1/priors/sample", json=body | dict(seed=3)).json()
        assert relative_error(embed_of(found["data"][0]), exact) < 1e-5
    half = client.post(
        "/v1/priors/sample", json=JSON | dict(text_embed=in_base64(TEXT["text_embed"], np.float16), seed=3)
    )
    assert 1e-6 < relative_error(embed_of(half.json()["data"][0]), exact) < 0.05
    tensors = {name: t[0].contiguous() for name, t in TEXT.items()}
    for body in (tensors, {name: t.contiguous() for name, t in TEXT.items()}):
        data = safetensors.torch.save(body)
        headers = {"content-type": SAFETENSORS, "accept": SAFETENSORS}
        found = client.post("/v1/priors/sample?seed=3&n=2", content=data, headers=headers)
        assert found.headers["content-type"] == SAFETENSORS
        embeds = safetensors.torch.load(found.content)["image_embeds"]
        assert embeds.shape == (2, 32) and relative_error(embeds[0], exact) < 1e-5
        assert relative_error(embeds[1], wanted(server.prior, 4)) < 1e-5


def test_without_a_seed_there_is_another_each_time(served):
    client, _ = served
    found = [embed_of(client.post("/v1/priors/sample", json=JSON).json()["data"][0]) for _ in range(2)]
    assert not torch.equal(*found)


@pytest.mark.parametrize("change, status, param, message", [
    (dict(text_embed=[1.0, 2.0]), 400, "text_embed", "text_embed has shape (2,); it must be (32,)"),
    (dict(text_embed="!!"), 400, "text_embed", "text_embed is no base64"),
    (dict(text_embed="AAAA"), 400, "text_embed", "text_embed has 3 bytes; it must have 128 or 64 bytes"),
    (dict(text_embed=None), 400, "text_embed", "text_embed"),
    (dict(text_embed=[[1.0] * 32]), 400, "text_embed", "text_embed"),
    (dict(text_embed=in_base64(torch.full((32,), torch.nan))), 400, "text_embed", "holds NaN or infinity"),
    (dict(text_encodings=None), 400, "text_encodings", "text_encodings is missing; this prior is conditioned"),
    (dict(text_encodings=[[1.0] * 32, [1.0]]), 400, "text_encodings", "(2, …) with lists of [1, 32]"),
    (dict(text_encodings=[]), 400, "text_encodings", "it must be (length, 32)"),
    (dict(steps=0), 400, "steps", "steps=0: Input should be greater than or equal to 1"),
    (dict(steps=99), 400, "steps", "steps=99; the schedule has 20"),
    (dict(solver="euler"), 400, "solver", "solver='euler'"),
    (dict(guidance_scale="big"), 400, "guidance_scale", 'guidance_scale="big": Input should be a valid number'),
    (dict(seed=-1), 400, "seed", "seed=-1: Input should be greater than or equal to 0"),
    (dict(n=65), 400, "n", "the request asks for 65 embeddings; it must ask for at most 64"),
    (dict(conditions=dict(mood=1.0)), 400, "conditions", "mood"),
    (dict(temperature=1.0), 400, "temperature", "Extra inputs are not permitted"),
    (dict(model="other"), 404, "model", "model='other'; this server has 'tiny'"),
    (dict(timeout=0), 400, "timeout", "timeout=0"),
    (dict(guidance_scale=3e38), 400, None, "is not finite; guidance_scale, eta and the text must not be so large"),
])  # fmt: skip
def test_bad_requests_name_the_field(served, change, status, param, message):
    client, _ = served
    answer = client.post("/v1/priors/sample", json=JSON | change)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param) and message in error["message"], error


@pytest.mark.parametrize("change, message", [
    (dict(input=""), "input"), (dict(input=[]), "input"), (dict(input=[1, 2]), "input"),
    (dict(input="x" * 20_001), "20000"),
    (dict(dimensions=16), "dimensions=16; it must be 32"), (dict(negative_prompt="dog"), "has no negative prompt"),
    (dict(input=["x"] * 65), "at most 64"), (dict(encoding_format="hex"), "encoding_format"),
])  # fmt: skip
def test_bad_texts(served, change, message):
    client, _ = served
    answer = client.post("/v1/embeddings", json=dict(input="a cat") | change)
    assert answer.status_code == 400 and message in answer.json()["error"]["message"]


def test_bodies_that_are_none(served):
    client, _ = served
    headers = {"content-type": SAFETENSORS}
    for content, options in (
        (b"", {}), (b"{", {}), (b"[]", {}), (b"\xff\xfe", {}), (b"[" * 100_000, {}), (b"", dict(headers=headers)),
        (b"\xff" * 100, dict(headers=headers)),
        (safetensors.torch.save(dict(other=torch.zeros(1))), dict(headers=headers)),
        (safetensors.torch.save(dict(text_embed=torch.zeros(32, dtype=torch.int64))), dict(headers=headers)),
    ):  # fmt: skip
        answer = client.post("/v1/priors/sample", content=content, **options)
        assert answer.status_code == 400 and answer.json()["error"]["message"], content[:20]
    assert (
        client.get("/nowhere").status_code == 404 and client.get("/nowhere").json()["error"]["message"] == "Not Found"
    )
    assert client.get("/v1/embeddings").status_code == 405
    assert client.post("/v1/priors/sample", json=JSON).status_code == 200, "none of them hurt it"


def test_health_figures_and_the_page(served):
    client, server = served
    assert client.get("/health/live").status_code == client.get("/health/ready").status_code == 200
    figures = client.get("/metrics").text
    for name in (
        "requests_total",
        "step_seconds_bucket",
        "step_rows_bucket",
        "queue_seconds_sum",
        "rows_total",
        "running",
    ):
        assert f"fastprior_{name}" in figures, name
    assert 'fastprior_requests_total{code="200",route="/health/live"}' in figures
    assert "unknown" not in figures or 'route="unknown"' in figures
    assert client.get("/stats").json().keys() >= {"running", "waiting", "steps", "row_steps", "rows", "idle_s"}
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html") and "v1/embeddings" in page.text
    assert "http" not in page.text.replace("http-equiv", ""), "it needs nothing from elsewhere"
    model = client.get("/v1/models").json()["data"][0]
    assert model["embedding_dim"] == 32 and model["takes_texts"] and model["timesteps"] == 20
    server.warm = False
    assert client.get("/health/ready").status_code == 503 and client.get("/health/live").status_code == 200
    server.warm = True


def test_not_ready_where_steps_stall():
    with serving(settings=dict(stall=0.05)) as (client, server):
        server.metrics.hold()
        future = server.engine.submit(TEXT["text_embed"][0], TEXT["text_encodings"][0])
        assert server.metrics.reached.wait(20)
        time.sleep(0.1)
        assert client.get("/health/ready").status_code == 503
        server.metrics.open.set()
        future.result(20)
        assert client.get("/health/ready").status_code == 200, "it is idle"


@pytest.mark.slow
def test_a_full_queue_and_a_deadline():
    with serving(rows=1, waiting=4, settings=dict(most_rows=4)) as (client, server):
        server.metrics.hold()
        futures = [server.engine.submit(TEXT["text_embed"][0], TEXT["text_encodings"][0])]
        assert server.metrics.reached.wait(20)
        late = client.post("/v1/priors/sample", json=JSON | dict(n=3, timeout=0.05), timeout=20)
        assert late.status_code in (429, 504)  # it waits until the engine looks again
        futures += [server.engine.submit(TEXT["text_embed"][0], TEXT["text_encodings"][0])]
        full = client.post("/v1/priors/sample", json=JSON | dict(n=4))
        assert full.status_code == 429 and int(full.headers["retry-after"]) >= 1
        assert full.json()["error"]["code"] == "queue_full"
        server.metrics.open.set()
        assert all(future.result(20).isfinite().all() for future in futures)
        again = client.post("/v1/priors/sample", json=JSON | dict(n=4))
        assert again.status_code == 200 and len(again.json()["data"]) == 4
        assert 'fastprior_rejected_total{reason="queue"} 1.0' in client.get("/metrics").text


@pytest.mark.slow
def test_a_deadline_is_504():
    with serving(rows=1) as (client, server):
        server.metrics.hold()
        first = server.engine.submit(TEXT["text_embed"][0], TEXT["text_encodings"][0])
        assert server.metrics.reached.wait(20)
        answer = client.post("/v1/priors/sample", json=JSON | dict(timeout=0.05))
        assert answer.status_code == 504 and answer.json()["error"]["param"] == "timeout"
        server.metrics.open.set()
        assert first.result(20).isfinite().all()


def test_a_client_that_leaves_frees_its_row():
    with serving(rows=1) as (client, server):
        server.metrics.hold()
        body = json.dumps(JSON).encode()
        head = f"POST /v1/priors/sample HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        connection = raw(client, head + body)
        assert server.metrics.reached.wait(20)
        connection.close()
        end = time.monotonic() + 20
        while server.engine.stats()["cancelled"] == 0 and time.monotonic() < end:
            time.sleep(0.01)
            server.metrics.open.set()
        stats = server.engine.stats()
        assert stats["cancelled"] == 1 and stats["done"] == 0 and stats["running"] == 0
        assert client.post("/v1/priors/sample", json=JSON).status_code == 200


def test_bodies_that_are_too_large_or_too_slow():
    with serving(settings=dict(most_body=10_000, body_seconds=0.3)) as (client, _):
        said = client.post("/v1/priors/sample", content=b"x" * 10_001)
        assert said.status_code == 413 and "it must have at most 10000" in said.json()["error"]["message"]
        head = b"POST /v1/priors/sample HTTP/1.1\r\nHost: x\r\n"
        with raw(client, head + b"Transfer-Encoding: chunked\r\n\r\n") as chunked:
            for _ in range(3):  # of which it reads what is one too many, and no more
                chunked.sendall(b"1000\r\n" + b"x" * 4096 + b"\r\n")
            assert chunked.recv(4096).startswith(b"HTTP/1.1 413 ")
        with raw(client, head + b"Content-Length: 100\r\n\r\n{") as slow:
            start = time.monotonic()
            assert slow.recv(4096).startswith(b"HTTP/1.1 408 ") and 0.2 < time.monotonic() - start < 5
        assert client.get("/health/live").status_code == 200
        figures = client.get("/metrics").text
        assert 'reason="body"} 2.0' in figures and 'reason="slow body"} 1.0' in figures


def test_a_key():
    with serving(settings=dict(api_key="secret")) as (client, _):
        for headers in ({}, {"authorization": "Bearer other"}, {"authorization": "secret"}):
            answer = client.post("/v1/priors/sample", json=JSON, headers=headers)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        assert (
            client.post("/v1/priors/sample", json=JSON, headers={"authorization": "Bearer secret"}).status_code == 200
        )
        assert client.get("/health/ready").status_code == 200 and client.get("/v1/models").status_code == 401


def test_a_prior_without_a_clip():
    with serving(prior=make_prior()) as (client, _):
        answer = client.post("/v1/embeddings", json=dict(input="a cat"))
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "no_clip"
        assert client.post("/v1/priors/sample", json=JSON).status_code == 200


def test_extra_conditions():
    prior = make_prior(dict(conditions=dict(score=dict(kind="scalar"), style=dict(kind="vector", size=2))))
    with serving(prior=prior) as (client, _):
        asks = [
            JSON | dict(seed=0, conditions=given) for given in (None, dict(score=2.0), dict(score=2.0, style=[1, 2]))
        ]
        found = [embed_of(client.post("/v1/priors/sample", json=ask).json()["data"][0]) for ask in asks]
        assert not torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])
        exact = prior.sample(
            **TEXT, conditions=dict(score=torch.tensor([2.0]), style=torch.tensor([[1.0, 2.0]])), progress=False,
            num_samples_per_batch=1, generator=torch.Generator().manual_seed(0), **RUN,
        )[0]  # fmt: skip
        assert relative_error(found[2], exact) < 1e-5


def test_texts_that_wait_are_encoded_together():
    clip = WordClip()
    with serving(prior=make_prior(clip=clip)) as (client, _):
        answer = client.post("/v1/embeddings", json=dict(input=[f"text {n}" for n in range(20)], seed=0))
        assert len(answer.json()["data"]) == 20 and clip.calls == 1


def test_a_text_that_cannot_be_encoded_fails_alone(caplog):
    """Beside others in one batch; what the CLIP says of it is in the log."""
    clip, gate, encode = WordClip(), threading.Event(), WordClip.embed_text

    def held(self, text):
        assert gate.wait(20)
        return encode(self, text)

    clip.embed_text = held.__get__(clip)
    with serving(prior=make_prior(clip=clip)) as (client, _), ThreadPoolExecutor(4) as pool:
        asks = [
            pool.submit(client.post, "/v1/embeddings", json=dict(input=text)) for text in ("first", "a", "\u1234", "b")
        ]
        time.sleep(0.3)  # three wait together behind the first
        gate.set()
        assert sorted(ask.result().status_code for ask in asks) == [200, 200, 200, 500]
    assert "index out of range" in caplog.text


@pytest.mark.parametrize("change, message", [
    (dict(timeout=0.0), "timeout=0.0; it must be a finite number of seconds, more than 0"),
    (dict(drain=-1.0), "drain=-1.0"), (dict(stall=float("nan")), "stall=nan"), (dict(most_body=0), "most_body=0"),
    (dict(most_rows=0), "most_rows=0"), (dict(api_key=" "), "api_key is empty"),
])  # fmt: skip
def test_bad_settings(change, message):
    with pytest.raises(ValueError) as error:
        Settings(name="x", **change)
    assert message in str(error.value)


def test_a_queue_shorter_than_a_request():
    with pytest.raises(ValueError, match="most_rows=64; it must be at most the queue's length, 10"):
        Settings(name="x").check_queue(10)

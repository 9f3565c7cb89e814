"""Requests that would cost the others something: each fails alone, in bounded time, with the status that fits."""

import gc
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch

from fastprior.cli import command_line as cli
from fastprior.demos.digits import DigitsClip
from fastprior.server import wire
from helpers.priors import WordClip, make_prior, make_text, relative_error
from helpers.servers import raw, serving

TEXT = make_text(1, 32)
JSON = {name: t[0].tolist() for name, t in TEXT.items()}
RUN = dict(timesteps=16, solver="sde-dpm++", spacing="logsnr")
MANY = 500_000
CONDITIONS = dict(
    style=dict(kind="category", size=5), score=dict(kind="scalar"), palette=dict(kind="vector", size=2)
)  # fmt: skip


class HeldClip(WordClip):
    """A CLIP that waits before it encodes."""

    def __init__(self):
        super().__init__()
        self.open, self.reached = threading.Event(), threading.Event()

    def embed_text(self, text):
        self.reached.set()
        assert self.open.wait(60)
        return super().embed_text(text)


def until(condition) -> None:
    """Wait until something holds."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="module")
def served():
    with serving(make_prior(dict(conditions=CONDITIONS), clip=WordClip())) as found:
        yield found


@pytest.mark.parametrize("path, body, param", [
    ("priors/sample", b'{"text_embed":[' + b'"a",' * MANY + b"1]}", "text_embed"),
    ("priors/sample", b'{"text_embed":"AA","text_encodings":[' + b'["a"],' * MANY + b"[1]]}", "body"),
    ("priors/sample", b'{"text_encodings":[],"conditions":[' + b'"a",' * MANY + b"1]}", "text_embed"),
    ("priors/sample", b"{" + b",".join(b'"%d":0' % n for n in range(MANY)) + b"}", "0"),
    ("embeddings", b'{"input":[' + b"1," * MANY + b"1]}", "input"),
    ("embeddings", b'{"input":[' + b'"a",' * MANY + b'"a"]}', "input"),
], ids=["embed", "encodings", "conditions", "names", "numbers", "texts"])  # fmt: skip
@pytest.mark.slow
def test_one_error_of_half_a_million(served, path, body, param):
    """A list of all errors took seconds and gigabytes, and meanwhile nobody else was answered."""
    client, _ = served
    start = time.perf_counter()
    answer = client.post(f"/v1/{path}", content=body)
    seconds, error = time.perf_counter() - start, answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param and len(answer.content) < 2000
    assert seconds < 1.5


@pytest.mark.parametrize("value", [["1"] * 32, [True] * 32, [None] * 32, [10**400] * 32, [1e39] * 32, {"a": 1}, 3])
def test_what_is_no_vector(served, value):
    client, _ = served
    body = json.dumps(JSON | dict(text_embed=value))
    answer = client.post("/v1/priors/sample", content=body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] in ("text_embed", "body")


def test_conditions_of_each_kind(served):
    """Integers for categories, and whole numbers for scalars and vectors, as JSON writes them."""
    client, server = served
    answer = client.post(
        "/v1/priors/sample", json=JSON | dict(seed=1, conditions=dict(style=3, score=2, palette=[1, 0.5]))
    )
    values = dict(style=torch.tensor([3]), score=torch.tensor([2.0]), palette=torch.tensor([[1.0, 0.5]]))
    draw = torch.Generator().manual_seed(1)
    given = dict(num_samples_per_batch=1, progress=False, generator=draw)
    exact = server.prior.sample(**TEXT, conditions=values, **given, **RUN)[0]
    assert relative_error(torch.tensor(answer.json()["data"][0]["embedding"]), exact) < 1e-5
    none = client.post("/v1/priors/sample", json=JSON | dict(seed=1, conditions=dict(style=None)))
    plain = client.post("/v1/priors/sample", json=JSON | dict(seed=1))
    assert none.json() == plain.json()


@pytest.mark.parametrize("conditions, message", [
    (dict(style=1.5), "conditions['style']=1.5; it must be an integer"),
    (dict(style=7), "conditions['style'] holds 7; it must be below its size, 5"),
    (dict(style=True), "conditions['style']=True; it must be an integer"),
    (dict(style=2**63), "it must be an integer"),
    (dict(score="x"), "conditions['score']=x; it must be a number"),
    (dict(score=[1, 2]), "conditions['score']=[1, 2]; it must be a number"),
    (dict(palette=[1]), "conditions['palette'] has shape (1,); it must be (2,)"),
    (dict(mood=1), "unknown name 'mood'"), ([1], "conditions is a list; it must be an object"),
])  # fmt: skip
def test_bad_conditions(served, conditions, message):
    client, _ = served
    answer = client.post("/v1/priors/sample", json=JSON | dict(conditions=conditions))
    error = answer.json()["error"]
    assert answer.status_code == 400 and message in error["message"] and error["param"] == "conditions", error


def test_what_is_not_finite_is_the_requests_fault(served):
    """400, which the clients of OpenAI do not try again as they do a 500."""
    client, _ = served
    answer = client.post("/v1/priors/sample", json=JSON | dict(guidance_scale=1e308))
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "not_finite"
    assert client.post("/v1/priors/sample", json=JSON).status_code == 200


def test_tokens_are_counted(served):
    client, _ = served
    answer = client.post("/v1/embeddings", json=dict(input=["a cat", "dog"]))
    assert answer.json()["usage"] == dict(prompt_tokens=8, total_tokens=8), "tokens of this CLIP are letters"


def test_a_text_that_cannot_be_encoded_fails_alone():
    """Also where it waits for its CLIP together with others."""
    clip, held, encode = DigitsClip(), threading.Event(), DigitsClip.embed_text
    clip.embed_text = lambda text: (held.wait(60), encode(clip, text))[1]
    prior = make_prior(dict(dim=64, max_text_len=8), image_channels=1, clip=clip)
    with serving(prior) as (client, _), ThreadPoolExecutor(4) as pool:
        asks = []
        for text in ("a three", "a four", "!", "a five"):
            asks.append(pool.submit(client.post, "/v1/embeddings", json=dict(input=text)))
            time.sleep(0.05)  # the first runs, and the others wait for it
        held.set()
        found = [ask.result(60) for ask in asks]
        assert [answer.status_code for answer in found] == [200, 200, 400, 200]
        assert found[2].json()["error"]["param"] == "input" and "has 0 words" in found[2].json()["error"]["message"]


def test_texts_that_wait_are_limited_and_have_deadlines():
    clip = HeldClip()
    prior = make_prior(clip=clip)
    with serving(prior, waiting=2, settings=dict(most_rows=2)) as (client, server), ThreadPoolExecutor(4) as pool:

        def ask(text, **options):
            return pool.submit(client.post, "/v1/embeddings", json=dict(input=text) | options)

        first = ask("runs")
        assert clip.reached.wait(20)
        second = ask(["wait", "too"])
        until(lambda: client.get("/stats").json()["texts_waiting"] == 2)
        full = ask("is one too many").result(20)
        assert full.status_code == 429 and int(full.headers["retry-after"]) >= 1
        assert 'fastprior_rejected_total{reason="queue"} 1.0' in client.get("/metrics").text
        clip.open.set()
        assert first.result(20).status_code == 200
        assert second.result(20).status_code in (200, 429)  # it found the place of the first taken, or free
        clip.open.clear()
        late = ask("is late", timeout=0.1).result(20)
        assert late.status_code == 504 and late.json()["error"]["param"] == "timeout"
        clip.open.set()
        assert ask("again").result(20).status_code == 200 and server.engine.stats()["running"] == 0


@pytest.mark.slow
def test_who_leaves_while_a_text_is_encoded_asks_for_nothing(caplog):
    clip = HeldClip()
    with serving(make_prior(clip=clip)) as (client, server):
        body = json.dumps(dict(input="a cat")).encode()
        head = f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        connection = raw(client, head + body)
        assert clip.reached.wait(20)
        connection.close()
        until(lambda: 'code="499",route="/v1/embeddings"' in client.get("/metrics").text)
        clip.open.set()
        assert client.post("/v1/embeddings", json=dict(input="a dog")).status_code == 200
        until(lambda: server.engine.stats()["done"] == 1)
        assert server.engine.stats()["cancelled"] == 0, "of the first nothing came to the engine"
    gc.collect()
    assert "never retrieved" not in caplog.text


@pytest.mark.slow
def test_slow_readers_hold_up_nobody():
    """Answers of which nobody takes a byte, many more than the buffers of their sockets hold."""
    with serving(make_prior(clip=WordClip())) as (client, server):
        body = json.dumps(JSON | dict(n=64, steps=1, solver="ddim")).encode()
        head = f"POST /v1/priors/sample HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        idle = [raw(client, (head + body) * 3) for _ in range(4)]
        start = time.monotonic()
        for _ in range(5):
            assert client.post("/v1/priors/sample", json=JSON).status_code == 200
        assert time.monotonic() - start < 20
        for connection in idle:
            connection.close()
        until(lambda: server.engine.stats()["running"] == 0)


def test_answers_do_not_wait_for_acknowledgements(served):
    """Heads and bodies of answers are two packets: with Nagle's algorithm the second came 40 ms later."""
    client, _ = served
    took = []
    for _ in range(30):
        start = time.perf_counter()
        client.post("/v1/priors/sample", content=b"{}")
        took.append(time.perf_counter() - start)
    assert sorted(took)[15] < 0.03


def test_not_live_once_the_engine_has_ended():
    with serving() as (client, server):
        assert client.get("/health/live").status_code == 200
        server.engine.close()
        assert client.get("/health/live").status_code == 503 and client.get("/health/ready").status_code == 503
        answer = client.post("/v1/priors/sample", json=JSON)
        assert answer.status_code == 503 and answer.headers["retry-after"]


def test_refused_requests_are_counted_too():
    with serving(settings=dict(api_key="secret", most_body=100)) as (client, _):
        headers = dict(authorization="Bearer secret")
        assert client.post("/v1/embeddings", content=b"x" * 200, headers=headers).status_code == 413
        assert client.get("/v1/models").status_code == 401
        for n in range(3):
            assert client.get(f"/nowhere/{n}").status_code == 404
        figures = client.get("/metrics").text
        for labels, count in (
            ('code="413",route="/v1/embeddings"', 1), ('code="401",route="/v1/models"', 1),
            ('code="404",route="unknown"', 3),
        ):  # fmt: skip
            assert f"fastprior_requests_total{{{labels}}} {count}.0" in figures, labels


def test_nothing_is_fetched_from_elsewhere(served):
    client, _ = served
    assert client.get("/docs").status_code == client.get("/redoc").status_code == 404


@pytest.mark.parametrize("given", [["--api-key", ""], []])
def test_an_empty_key_is_no_open_door(tmp_path, monkeypatch, capsys, given):
    """As of `--api-key "$KEY"` where KEY is not set."""
    monkeypatch.setenv("FASTPRIOR_API_KEY", "")
    assert cli.main(["serve", "--checkpoint", str(tmp_path / "no.safetensors"), "--port", "0", *given]) == 2
    assert "api_key is empty" in capsys.readouterr().err


def test_64_embeddings_of_768_in_base64_take_a_millisecond():
    embeds, best = torch.randn(64, 768), float("inf")
    for _ in range(50):
        start = time.perf_counter()
        data = wire.dumps(wire.embeddings(embeds, as_base64=True))
        best = min(best, time.perf_counter() - start)
    assert len(data) > 64 * 4096 and best < 1e-3


def test_many_clients_at_once(served):
    """Different requests at once have the answers that they have alone."""
    client, _ = served
    with httpx.Client(base_url=client.base_url, timeout=60) as other:
        asks = [JSON | dict(seed=seed, steps=(4, 8, 16)[seed % 3], solver="ddim") for seed in range(12)]
        with ThreadPoolExecutor(6) as pool:
            together = list(pool.map(lambda ask: other.post("/v1/priors/sample", json=ask).json()["data"], asks))
        assert together == [client.post("/v1/priors/sample", json=ask).json()["data"] for ask in asks]

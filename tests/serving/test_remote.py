"""A server elsewhere: the same numbers, its refusals, and connections that it closed."""

import pytest
import torch

from fastprior.serving.remote import Refused, Remote
from helpers.priors import make_text, relative_error
from helpers.servers import serving


def test_the_numbers_of_a_plain_call():
    text = {name: t[0] for name, t in make_text(1, 32).items()}
    with serving(settings=dict(api_key="secret")) as (client, server):
        remote = Remote(str(client.base_url), "secret")
        assert remote.model["id"] == "tiny" and remote.stats()["running"] == 0
        assert remote.random_texts(3)["text_encodings"].shape == (3, 7, 32)
        futures = [remote.submit(text, seed=seed, steps=9, solver="ddim", spacing=None) for seed in range(3)]
        for seed, future in enumerate(futures):
            exact = server.engine.submit(**text, seed=seed, timesteps=9, solver="ddim").result(20)
            assert relative_error(future.result(20), exact) < 1e-6
        with pytest.raises(Refused, match=r"400: .*steps=99; the schedule has 20") as error:
            remote.submit(text, steps=99).result(20)
        assert error.value.status == 400
        with pytest.raises(Refused, match="401"):
            Remote(str(client.base_url))
        remote.submit({"text_embed": torch.zeros(3)}, n=1).exception(20)
        assert remote.submit(text, seed=0).result(20).isfinite().all(), "its connection is a new one where it must be"
        remote.close()


def test_no_server():
    with pytest.raises(ValueError, match="url='nowhere'"):
        Remote("nowhere")
    with pytest.raises(OSError):
        Remote("http://127.0.0.1:9")

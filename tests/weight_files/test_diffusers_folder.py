"""Folders of diffusers models, of which any file may hold anything: one error each, and nothing built beyond them."""

import json
import math
import os
import time

import pytest
import torch
from safetensors.torch import save_file

from fastprior.models.prior_transformer.model import PriorTransformer

WEIGHTS = "diffusion_pytorch_model"


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    model = PriorTransformer(
        num_attention_heads=2, attention_head_dim=4, num_layers=2, embedding_dim=8, num_embeddings=3
    )
    model.save_pretrained(tmp_path / "prior")
    return tmp_path / "prior"


def state_of(folder):
    return PriorTransformer.from_pretrained(folder).state_dict()


def config(folder, **changed):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


CONFIGS = {  # entries, and what is said of them
    "billion layers": (dict(num_layers=10**9), "num_layers=1000000000; the weights have 2 layers"),
    "4000 layers": (dict(num_layers=4000), "num_layers=4000; the weights have 2 layers"),
    "no layers": (dict(num_layers=0), "num_layers=0; the weights have 2 layers"),
    "a string": (dict(num_layers="2"), "num_layers='2'; the weights have 2 layers"),
    "true": (dict(num_layers=True), "num_layers=True; the weights have 2 layers"),
    "a float": (dict(num_layers=2.0), "num_layers=2.0; it must be an integer"),
    "default layers": (dict(num_layers=None), "num_layers=None; the weights have 2 layers"),
    "no heads": (dict(num_attention_heads=0), "num_attention_heads=0; it must be at least 1"),
    "heads": (dict(num_attention_heads=10**12), "num_attention_heads=1000000000000; it must be at most 1,048,576"),
    "wide": (dict(attention_head_dim=2**20, num_attention_heads=2**20), "there is no model of this config"),
    "wider": (dict(attention_head_dim=2**15, num_attention_heads=2**15), "the weights do not fit|there is no model"),
    "positions": (dict(num_embeddings=10**12), "num_embeddings=1000000000000; it must be at most"),
    "more positions": (
        dict(num_embeddings=2**20),
        r"positional_embedding \(1, 7, 8\), which must be \(1, 1048580, 8\)",
    ),
    "nan": (dict(dropout="x"), "dropout='x'; it must be between 0 and 1"),
    "an activation": (dict(time_embed_act_fn=["silu"]), r"time_embed_act_fn=\['silu'\]; it must be one of 'silu'"),
    "a norm": (dict(norm_in_type={"a": 1}), r"norm_in_type=\{'a': 1\}; it must be 'layer' or None"),
    "unknown": ({"k" * 10**5: 1}, "the config has the unknown key 'kkk"),
    "another model": (dict(added_emb_type=None), "unexpected: prd_embedding"),
    "more of it": (dict(norm_in_type="layer"), "missing: norm_in.bias, norm_in.weight"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_bounded_by_the_weights(folder, name):
    changed, why = CONFIGS[name]
    config(folder, **changed)
    start = time.perf_counter()
    with pytest.raises(ValueError, match=f"^{folder}: .*({why})") as caught:
        PriorTransformer.from_pretrained(folder)
    assert len(str(caught.value)) < 1000
    assert time.perf_counter() - start < 5, "billions of layers take longer"


TEXTS = {
    "nothing": ("", "is not JSON"), "a list": ("[1]", "holds a JSON list; it must be a dict"),
    "null": ("null", "holds a JSON NoneType; it must be a dict"), "a number": ("7", "holds a JSON int"),
    "deep": ("[" * 10**5, "nested too deeply"), "nan": ('{"dropout": NaN}', "NaN is no JSON number"),
    "long": (" " * (2**24 + 1), "has more than 16,777,216 bytes"), "bytes": (b"\xff\xfe\x00", "is not JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_a_config_of_any_kind(folder, name):
    text, why = TEXTS[name]
    (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=f"^{folder}/config.json .*{why}"):
        PriorTransformer.from_pretrained(folder)


def one(change):
    def weights(folder):
        state = state_of(folder)
        state["proj_in.weight"] = change(state["proj_in.weight"])
        return state

    return weights


BAD = {  # weights, and what is said of them
    "nan": (one(lambda t: t.detach().clone().fill_(math.nan)), "holds NaN or infinity in proj_in.weight"),
    "infinity": (one(lambda t: t.half().fill_(-math.inf)), "holds NaN or infinity in proj_in.weight"),
    "integers": (one(lambda t: t.to(torch.int64)), "proj_in.weight has dtype torch.int64; it must be floating point"),
    "complex": (one(lambda t: t.to(torch.complex64)), "proj_in.weight has dtype torch.complex64"),
    "float8": (one(lambda t: t.to(torch.float8_e5m2)), "proj_in.weight has dtype torch.float8_e5m2"),
    "sparse": (one(lambda t: t.detach().to_sparse()), "proj_in.weight is a sparse tensor; it must be a dense tensor"),
    "meta": (one(lambda t: t.to("meta")), "proj_in.weight is a tensor without numbers"),
    "a list": (one(lambda t: [1.0]), "proj_in.weight is a list; it must be a tensor"),
    "a shape": (one(lambda t: t[1:].clone()), r"of another shape: proj_in.weight \(7, 8\), which must be \(8, 8\)"),
    "huge views": (one(lambda t: t.detach()[:1, :1].expand(2**20, 2**20)), "proj_in.weight is a view|claim"),
    "another name": (lambda folder: state_of(folder) | {"a": torch.ones(2)}, "; unexpected: a$"),
    "numbers for names": (lambda folder: {1: torch.ones(2)}, "holds 1; it must hold tensors by name"),
    "nothing": (lambda folder: {}, "num_layers=2; the weights have 0 layers"),
    "no dict": (lambda folder: [torch.ones(2)], "holds a list; it must"),
}


@pytest.mark.parametrize("name", BAD)
def test_weights_of_any_kind(folder, name):
    make, why = BAD[name]
    state = make(folder)
    os.remove(folder / f"{WEIGHTS}.safetensors")
    torch.save(state, folder / f"{WEIGHTS}.bin")
    with pytest.raises(ValueError, match=f"^{folder}.*({why})"):
        PriorTransformer.from_pretrained(folder)


INDEXES = {
    "a list": "[]", "null": "null", "no map": "{}", "a list for a map": '{"weight_map": []}',
    "numbers": '{"weight_map": {"a": 1}}', "not JSON": "{", "deep": '{"weight_map":' * 10**5,
    "above": '{"weight_map": {"a": "../other.safetensors"}}', "elsewhere": '{"weight_map": {"a": "/etc/hostname"}}',
}  # fmt: skip


@pytest.mark.parametrize("name", INDEXES)
def test_an_index_of_any_kind(folder, name):
    os.remove(folder / f"{WEIGHTS}.safetensors")
    (folder / f"{WEIGHTS}.safetensors.index.json").write_text(INDEXES[name])
    with pytest.raises(ValueError, match=f"^{folder}/{WEIGHTS}.safetensors.index.json "):
        PriorTransformer.from_pretrained(folder)


def test_what_is_right_is_read(folder):
    state = state_of(folder)
    state["causal_attention_mask"] = torch.full((7, 7), -math.inf)  # which some files hold
    save_file(state, folder / f"{WEIGHTS}.safetensors", metadata={"format": "pt"})
    for dtype in (None, torch.float16, torch.bfloat16, torch.float64):
        model = PriorTransformer.from_pretrained(folder, torch_dtype=dtype)
        assert model.dtype == (dtype or torch.float32)
        assert torch.equal(model.proj_in.weight, state["proj_in.weight"].to(model.dtype))
    for dtype in (torch.int8, torch.float8_e4m3fn, torch.complex64, "float16"):
        with pytest.raises(ValueError, match="^torch_dtype=.*; it must be floating point of 16 bits or more"):
            PriorTransformer.from_pretrained(folder, torch_dtype=dtype)

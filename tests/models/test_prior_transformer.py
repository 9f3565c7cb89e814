"""PriorTransformer, within diffusers and without, against the installed diffusers."""

import copy
import json
import pickle
import random
import subprocess
import sys

import pytest
import torch

import fastprior
from fastprior.kernels import ops
from fastprior.models.prior_transformer import cached_blocks
from fastprior.models.prior_transformer.model import PriorTransformer
from fastprior.models.prior_transformer.prompt_memory import remembered
from helpers.priors import relative_error
from helpers.pt_cases import (
    CONFIG,
    MAKES,
    TOLERANCE,
    make_inputs,
    make_stock,
    within_diffusers,
    without_diffusers,
)

diffusers = pytest.importorskip("diffusers")

OPTIONS = {
    "norm_in_type": [None, "layer"],
    "embedding_proj_norm_type": [None, "layer"],
    "encoder_hid_proj_type": ["linear", None],
    "added_emb_type": ["prd", None],
    "time_embed_act_fn": ["silu", "gelu", "mish", "relu", "swish"],
    "time_embed_dim": [None, 24],
    "embedding_proj_dim": [None, 12],
    "clip_embed_dim": [None, 28],
    "num_layers": [2, 1],
    "dropout": [0.0, 0.1],
    "attention_head_dim": [8, 5],
}


def sweep():
    """Every value of every option on its own, then seeded mixtures."""
    draw = random.Random(0)
    yield "default", {}
    yield "odd width", dict(num_attention_heads=3, attention_head_dim=5)
    for name, values in OPTIONS.items():
        for value in values[1:]:
            yield f"{name}={value}", {name: value}
    for index in range(12):
        yield f"mixture {index}", {name: draw.choice(values) for name, values in OPTIONS.items()}


SWEEP = dict(sweep())


def fitting(config: dict) -> dict:
    """The config with as many positions as there are tokens; an unprojected text is left out of the sequence."""
    config = dict(config)
    suffix = 2 + (config.get("added_emb_type", "prd") is not None)
    config["additional_embeddings"] = 1 + suffix
    if config.get("encoder_hid_proj_type", "linear") is None:
        config["num_embeddings"], config["additional_embeddings"] = 1, suffix
    return config


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("name", SWEEP)
def test_every_option_as_in_diffusers(name, make):
    stock = make_stock(**fitting(SWEEP[name]))
    ours = MAKES[make](stock)
    for mask in (True, False):
        given = make_inputs(stock.config, mask=mask)
        with torch.no_grad():
            wanted = stock(**given).predicted_image_embedding
            for _ in range(2):
                assert relative_error(ours(**given).predicted_image_embedding, wanted) < TOLERANCE
        assert remembered(ours) is not None or not mask, "the prefix must be kept where there can be one"
        got = ours(**given, return_dict=False)[0]
        assert got.requires_grad and relative_error(got.detach(), wanted) < TOLERANCE
        if not SWEEP[name].get("dropout"):
            cotangent = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
            got.backward(cotangent)
            stock.zero_grad()
            stock(**given).predicted_image_embedding.backward(cotangent)
            for (key, own), theirs in zip(ours.named_parameters(), stock.parameters()):
                assert (own.grad is None) == (theirs.grad is None), key
                if theirs.grad is not None:
                    assert relative_error(own.grad, theirs.grad) < 10 * TOLERANCE or theirs.grad.abs().max() < 1e-6, key
            ours.zero_grad()


TIMES = {
    "int": 13,
    "float": 13.7,
    "0-d": torch.tensor(13),
    "0-d float": torch.tensor(13.5),
    "one": torch.tensor([13]),
    "vector": torch.tensor([13, 1, 999, 4]),
}
MASKS = {
    "bool": lambda mask: mask,
    "float": lambda mask: mask.float(),
    "long": lambda mask: mask.long(),
    "none real": lambda mask: mask & False,
    "holes": lambda mask: mask & torch.tensor([True, False, True, True, False, True, True]),
    "left": lambda mask: mask.flip(1),
    "soft": lambda mask: mask * 0.9998,
    "beyond": lambda mask: mask * 1.0005,
}


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("time", TIMES)
def test_times(time, make):
    stock = make_stock()
    given = make_inputs(stock.config) | dict(timestep=TIMES[time])
    with torch.no_grad():
        wanted = stock(**given)[0]
        assert relative_error(MAKES[make](stock)(**given)[0], wanted) < TOLERANCE
        assert relative_error(stock(**given | dict(timestep=12))[0], wanted) > 10 * TOLERANCE, "times must matter"


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("name", MASKS)
def test_masks(name, make):
    stock = make_stock()
    ours, given = MAKES[make](stock), make_inputs(stock.config)
    given["attention_mask"] = MASKS[name](given["attention_mask"])
    with torch.no_grad():
        assert relative_error(ours(**given)[0], stock(**given)[0]) < TOLERANCE
    entry = remembered(ours)
    if name == "beyond":  # undoes causality, so nothing can be kept
        assert entry is None
    else:
        real = given["attention_mask"].ne(0).sum(dim=1)
        assert entry.prefix.k.shape[3] == real.max() + 1, "padding was not packed away"


SEQUENCES = {  # latents of several tokens, positions that belong to them alone, text that is wide enough already
    "unprojected text": (dict(encoder_hid_proj_type=None, num_attention_heads=5, attention_head_dim=4), None, True),
    "3-D of one": (dict(), 1, True),
    "3-D of three": (dict(additional_embeddings=6), 3, True),
    "3-D of three without prd": (dict(additional_embeddings=5, added_emb_type=None), 3, True),
    "Shap-E": (dict(additional_embeddings=0, added_emb_type=None, encoder_hid_proj_type=None), 7, False),
    "Shap-E with prd": (dict(additional_embeddings=0, encoder_hid_proj_type=None, clip_embed_dim=40), 7, False),
}


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("name", SEQUENCES)
def test_other_sequences(name, make):
    config, tokens, mask = SEQUENCES[name]
    stock = make_stock(**config)
    ours, given = MAKES[make](stock), make_inputs(stock.config, tokens=tokens, mask=mask)
    if name == "unprojected text":
        given["encoder_hidden_states"] = torch.randn(4, 7, 20, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for _ in range(2):
            assert relative_error(ours(**given)[0], stock(**given)[0]) < TOLERANCE
    assert (remembered(ours) is not None) == mask


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("samples", [1, 3])
def test_steps_behind_a_prefill(samples, make):
    stock = make_stock()
    ours, given = MAKES[make](stock), make_inputs(stock.config, rows=4)
    del given["timestep"]
    times = torch.tensor([3, 500, 999])
    many = {name: t.repeat_interleave(samples, dim=0) for name, t in given.items()}
    x = many["hidden_states"] = torch.randn(4 * samples, 20, generator=torch.Generator().manual_seed(2))
    given.pop("hidden_states")
    with torch.no_grad():
        cond = ours.prefill(**given, times=times)
        for index in range(3):
            wanted = stock(**many, timestep=times[index])[0]
            assert relative_error(ours.step(x, torch.tensor(index), cond), wanted) < TOLERANCE
        each = torch.arange(4 * samples) % 3
        wanted = stock(**many, timestep=times[each])[0]
        assert relative_error(ours.step(x, each, cond), wanted) < TOLERANCE


@pytest.mark.parametrize(
    "kinds, chosen, prompts",
    [
        ([0, 1, 2], [0, 1, 2], None),
        ([0, 0, 1, 1], [0, 2], None),
        ([5, 5, 5], [0], None),
        ([0, 0, 0, 1, 2, 3], [0, 3, 4, 5], [0, 0, 0, 1, 2, 3]),
        ([3, 3, 3, 3, 1, 1, 2, 2], [4, 6, 0], [2, 2, 0, 1]),
        ([1, 0, 1], [1, 0], [1, 0, 1]),
    ],
)
def test_rows_that_are_the_same_run_once(kinds, chosen, prompts):
    kinds = torch.tensor(kinds)
    tensors = [kinds[:, None].expand(-1, 2).float(), torch.zeros(len(kinds), 3, 2), kinds[:, None] > 0]
    got, order = cached_blocks.distinct(tensors)
    repeats = len(kinds) // (len(got) if order is None else len(order))
    order_or_all = torch.arange(len(got)) if order is None else order
    assert torch.equal(kinds[got[order_or_all]].repeat_interleave(repeats), kinds)
    assert sorted(kinds[got].tolist()) == sorted(set(kinds.tolist())) and len(got) == len(chosen)
    assert (None if order is None else len(order)) == (None if prompts is None else len(prompts))


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_16_bits(autocast, dtype, make):
    stock, exact = make_stock(num_layers=2, attention_head_dim=16), None
    given = make_inputs(stock.config)
    with torch.no_grad():
        exact = stock.double()(**{k: v.double() if v.is_floating_point() else v for k, v in given.items()})[0]
        stock = stock.float() if autocast else stock.to(dtype)
        ours = MAKES[make](stock)
        if not autocast:
            given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.items()}
        with torch.autocast("cpu", dtype, enabled=autocast):
            wanted = stock(**given)[0]
            ours(**given)
            got = ours(**given)[0]
    assert got.dtype == wanted.dtype == dtype
    assert remembered(ours) is not None
    assert torch.nn.functional.cosine_similarity(got.double(), wanted.double()).min() > 0.999
    errors = [(t.double() - exact).square().mean().sqrt() for t in (got, wanted)]
    assert errors[0] <= 2 * errors[1]


@pytest.mark.slow
def test_on_kernels():
    stock = make_stock(num_layers=2, attention_head_dim=16, num_attention_heads=2)
    ours, given = without_diffusers(stock), make_inputs(stock.config)
    with torch.no_grad(), ops.using("triton"):
        for _ in range(2):
            assert relative_error(ours(**given)[0], stock(**given)[0]) < TOLERANCE
        assert remembered(ours) is not None
    few = without_diffusers(make_stock())
    with torch.no_grad(), ops.using("triton"):
        few(**given)
        assert remembered(few) is None, "the kernels take no heads of 8"


# what clients do with the model


class Doubling:
    """A processor of somebody's own: attention without a mask, twice."""

    calls = 0

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        Doubling.calls += 1
        return 2 * attn.to_out[0](attn.to_v(hidden_states))


@pytest.mark.parametrize("processor", ["AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "Doubling"])
def test_attention_processors(processor):
    from diffusers.models import attention_processor

    stock = make_stock()
    ours, given = within_diffusers(stock), make_inputs(stock.config)
    assert ours.attn_processors.keys() == stock.attn_processors.keys() and len(ours.attn_processors) == 3
    made = {
        "Doubling": Doubling, "SlicedAttnProcessor": lambda: attention_processor.SlicedAttnProcessor(2),
    }.get(processor) or getattr(attention_processor, processor)  # fmt: skip
    with torch.no_grad():
        before = ours(**given)[0]
        for model in (stock, ours):
            model.set_attn_processor(made())
        Doubling.calls = 0
        got = ours(**given)[0]
        assert Doubling.calls == (3 if processor == "Doubling" else 0)
        assert relative_error(got, stock(**given)[0]) < TOLERANCE
        assert (remembered(ours) is None) == (processor == "Doubling")
        assert (relative_error(got, before) > 0.01) == (processor == "Doubling")
        ours.set_default_attn_processor() if processor != "Doubling" else ours.set_attn_processor(
            attention_processor.AttnProcessor2_0()
        )
        assert relative_error(ours(**given)[0], before) < TOLERANCE


@pytest.mark.parametrize("make", MAKES)
def test_blocks_can_be_looped_over(make):
    stock = make_stock()
    x = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(0))
    mask = torch.full((11, 11), -10000.0).triu(1).expand(8, -1, -1)
    got = wanted = x
    for own, theirs in zip(MAKES[make](stock).transformer_blocks, stock.transformer_blocks):
        got, wanted = own(got, attention_mask=mask), theirs(wanted, attention_mask=mask)
    assert relative_error(got, wanted) < TOLERANCE
    block = MAKES[make](stock).transformer_blocks[0]
    assert relative_error(block(x), stock.transformer_blocks[0](x)) < TOLERANCE


@pytest.mark.parametrize("make", MAKES)
def test_gradient_checkpointing(make):
    stock = make_stock()
    with pytest.raises(ValueError, match="does not support gradient checkpointing"):
        stock.enable_gradient_checkpointing()
    ours, given = MAKES[make](stock), make_inputs(stock.config)
    calls = []
    ours.transformer_blocks[1].register_forward_pre_hook(lambda *_: calls.append(1))
    found = {}
    for keep in (False, True):
        ours.disable_gradient_checkpointing() if keep else ours.enable_gradient_checkpointing()
        ours.zero_grad()
        calls.clear()
        ours(**given)[0].square().mean().backward()
        found[keep] = ours.proj_in.weight.grad.clone(), len(calls)
    assert found[False][1] == 2 and found[True][1] == 1, "the block must run again in backward, with checkpointing"
    assert torch.equal(found[False][0], found[True][0]) and found[True][0].abs().max() > 0


@pytest.mark.parametrize("make", MAKES)
def test_statistics_of_the_latents(make):
    stock = make_stock()
    ours, latents = MAKES[make](stock), torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ours.post_process_latents(latents), stock.post_process_latents(latents))
    ours.clip_mean = None
    assert torch.equal(ours.post_process_latents(latents), latents * ours.clip_std)
    ours.clip_std = None
    assert torch.equal(ours.post_process_latents(latents), latents)
    assert relative_error(ours(**make_inputs(stock.config))[0], stock(**make_inputs(stock.config))[0]) < TOLERANCE


@pytest.mark.parametrize("make", MAKES)
def test_copies_and_pickles_do_not_share_a_prefix(make):
    ours = MAKES[make](make_stock())
    given = make_inputs(ours.config)
    with torch.no_grad():
        wanted = ours(**given)[0]
        for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert type(other) is type(ours) and remembered(other) is None
            assert torch.equal(other(**given)[0], wanted)


# files


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("writer", ["stock", "within", "without"])
def test_folders(writer, variant, safe, tmp_path):
    stock = make_stock(embedding_proj_dim=12)
    given, model = make_inputs(stock.config), {"stock": lambda m: m, **MAKES}[writer](stock)
    model.save_pretrained(tmp_path / "prior", variant=variant, safe_serialization=safe)
    readers = dict(stock=diffusers.PriorTransformer, ours=fastprior.PriorTransformer, own=PriorTransformer)
    with torch.no_grad():
        wanted = stock(**given)[0]
        for name, reader in readers.items():
            kwargs = {} if name == "own" else dict(use_safetensors=safe)
            loaded = reader.from_pretrained(tmp_path, subfolder="prior", variant=variant, **kwargs)
            assert type(loaded) is reader and not loaded.training
            assert relative_error(loaded(**given)[0], wanted) < TOLERANCE, name
            half = reader.from_pretrained(tmp_path / "prior", variant=variant, torch_dtype=torch.float16, **kwargs)
            assert {t.dtype for t in half.parameters()} == {torch.float16} and half.dtype == torch.float16


def test_sharded_folder(tmp_path):
    stock = make_stock()
    stock.save_pretrained(tmp_path, max_shard_size="30KB", variant="fp16")
    assert len(list(tmp_path.glob("*-of-*.safetensors"))) > 2
    loaded = PriorTransformer.from_pretrained(tmp_path, variant="fp16")
    assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in stock.state_dict().items())


@pytest.mark.parametrize("safe", [True, False])
def test_repository_on_the_hub(safe, tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    stock = make_stock()
    stock.save_pretrained(tmp_path / "prior", variant="fp16", safe_serialization=safe)
    asked = []

    def download(repo_id, *, allow_patterns, **kwargs):
        asked.append(allow_patterns)
        assert (repo_id, kwargs) == ("someone/prior", dict(revision="main"))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    load = PriorTransformer.from_pretrained
    loaded = load("someone/prior", subfolder="prior", variant="fp16", revision="main")
    assert torch.equal(loaded.prd_embedding, stock.prd_embedding)
    suffixes = [".safetensors"] if safe else [".safetensors", ".bin"]
    assert len(asked) == len(suffixes), "pickles are downloaded only where there is nothing else"
    for names, suffix in zip(asked, suffixes):
        assert names[:2] == ["prior/config.json", f"prior/diffusion_pytorch_model.fp16{suffix}"]
        assert all(name.startswith("prior/") for name in names)


def test_statistics_may_be_missing(tmp_path):
    stock = make_stock()
    stock.clip_mean = stock.clip_std = None
    stock.save_pretrained(tmp_path)
    loaded = PriorTransformer.from_pretrained(tmp_path)
    assert loaded.clip_mean is None and loaded.clip_std is None


def change(tmp_path, **config):
    text = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(text | config))


BAD_FOLDERS = {
    "no config": (lambda path: (path / "config.json").unlink(), FileNotFoundError, "has no config.json"),
    "no weights": (
        lambda path: (path / "diffusion_pytorch_model.safetensors").unlink(),
        FileNotFoundError,
        "has no weights of variant=None; one must be there of diffusion_pytorch_model.safetensors",
    ),
    "torn config": (lambda path: (path / "config.json").write_text("{"), ValueError, "config.json is not JSON"),
    "unknown key": (
        lambda path: change(path, num_layer=3),
        ValueError,
        "unknown key 'num_layer'; the nearest is 'num_la",
    ),
    "other shape": (
        lambda path: change(path, num_embeddings=9),
        ValueError,
        r"of another shape: positional_embedding \(1, 11, 32\), which must be \(1, 13, 32\)",
    ),
    "torn weights": (
        lambda path: (path / "diffusion_pytorch_model.safetensors").write_bytes(b"\0" * 40),
        ValueError,
        "cannot be read",
    ),
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_bad_folders(name, tmp_path):
    make_stock().save_pretrained(tmp_path)
    break_it, kind, message = BAD_FOLDERS[name]
    break_it(tmp_path)
    with pytest.raises(kind, match=message):
        PriorTransformer.from_pretrained(tmp_path)


def test_save_into_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file' is a file; it must be a folder"):
        without_diffusers(make_stock()).save_pretrained(tmp_path / "file")


# errors

BAD_CONFIGS = [
    (dict(norm_in_type="batch"), "norm_in_type='batch'; it must be 'layer' or None"),
    (dict(embedding_proj_norm_type="rms"), "embedding_proj_norm_type='rms'; it must be 'layer' or None"),
    (dict(encoder_hid_proj_type="mlp"), "encoder_hid_proj_type='mlp'; it must be 'linear' or None"),
    (dict(added_emb_type="x"), "added_emb_type='x'; it must be 'prd' or None"),
    (dict(time_embed_act_fn="tanh"), "time_embed_act_fn='tanh'; it must be one of 'silu'"),
]


@pytest.mark.parametrize("config, message", BAD_CONFIGS)
def test_bad_configs(config, message):
    with pytest.raises(ValueError, match=message):
        PriorTransformer(**CONFIG, **config)


BAD_INPUTS = {
    "hidden_states": (torch.zeros(4, 19), r"hidden_states has shape \(4, 19\); it must be \(4, \[tokens\], 20\)"),
    "proj_embedding": (torch.zeros(4, 21), r"proj_embedding has shape \(4, 21\); it must be \(4, \[tokens\], 20\)"),
    "encoder_hidden_states": (torch.zeros(3, 7, 20), r"encoder_hidden_states has shape \(3, 7, 20\); it must be \(4, "),
    "attention_mask": (torch.ones(4, 8), r"attention_mask has shape \(4, 8\); it must be \(4, 7\)"),
    "timestep": (torch.arange(3), "timestep has 3 elements; it must have 1 or as many as hidden_states"),
    "no text": (None, "encoder_hidden_states is None; it must be given"),
    "tokens": (torch.zeros(4, 2, 20), r"there are 12 tokens; they must be num_embeddings \+ additional_embeddings, 11"),
}


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("name", BAD_INPUTS)
@pytest.mark.parametrize("grad", [False, True])
def test_bad_inputs(name, make, grad):
    ours = MAKES[make](make_stock())
    value, message = BAD_INPUTS[name]
    argument = {"no text": "encoder_hidden_states", "tokens": "hidden_states"}.get(name, name)
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=message):
        ours(**make_inputs(ours.config) | {argument: value})


def dropped_out(model):
    model.train().transformer_blocks[0].attn1.to_out[1].p = 0.5


BAD_PREFILLS = {
    "no mask": (lambda model: dict(attention_mask=None), "attention_mask is None; it must be given"),
    "mask": (lambda model: dict(attention_mask=torch.full((4, 7), 2.0)), "has values beyond 0 and 1"),
    "dropout": (dropped_out, "cannot run behind a prefix: dropout is active"),
    "hook": (
        lambda model: model.transformer_blocks[0].register_forward_hook(lambda *_: None) and None,
        "has a hook or a replaced forward",
    ),
    "processor": (lambda model: model.set_attn_processor(Doubling()), "an attention processor is a Doubling"),
    "devices": (lambda model: model.proj_in.to("meta") and None, "the weights lie on several devices, or on none"),
    "stranger": (lambda model: setattr(model, "proj_in", Stranger(20, 32)), "a Stranger stands in the model"),
}


class Stranger(torch.nn.Linear):
    pass


@pytest.mark.parametrize("name", BAD_PREFILLS)
def test_bad_prefills(name):
    ours = within_diffusers(make_stock())
    change, message = BAD_PREFILLS[name]
    given = make_inputs(ours.config) | (change(ours) or {})
    del given["hidden_states"], given["timestep"]
    with pytest.raises(ValueError, match=message):
        ours.prefill(**given, times=torch.arange(3))


WITHOUT = """
import sys
import torch, fastprior
from fastprior import *
heavy = "diffusers", "transformers", "peft", "accelerate", "pydantic", "open_clip", "embedding_reader"
assert not [name for name in heavy if name in sys.modules]
sys.modules["diffusers"] = None
prior = fastprior.PriorTransformer(num_attention_heads=2, attention_head_dim=16, num_layers=1, embedding_dim=8)
prior.save_pretrained(sys.argv[1])
prior = fastprior.PriorTransformer.from_pretrained(sys.argv[1])
with torch.no_grad():
    cond = prior.prefill(torch.ones(1, 8), torch.ones(1, 77, 8), torch.ones(1, 77), torch.tensor([3]))
    got = prior.step(torch.ones(1, 8), torch.tensor(0), cond)
    full = prior(torch.ones(1, 8), 3, torch.ones(1, 8), torch.ones(1, 77, 8), torch.ones(1, 77))
assert (got - full.predicted_image_embedding).abs().max() < 1e-5
try:
    fastprior.accelerate_prior(prior)
except ImportError as error:
    print(error)
assert not [name for name in heavy[1:] if name in sys.modules]
"""


@pytest.mark.slow
def test_without_diffusers(tmp_path):
    run = subprocess.run([sys.executable, "-c", WITHOUT, tmp_path], capture_output=True, text=True)
    assert run.stdout == "accelerate_prior needs diffusers: pip install diffusers\n", run.stderr

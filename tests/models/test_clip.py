"""CLIP adapters against dalle2-pytorch's, on tiny random models kept on disk."""

import copy
import importlib.util
import json
import math
import pickle
import re
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from torch import nn

from fastprior import clip as fp
from helpers.at_once import at_once

# OpenAI distributes TorchScript archives, which newer torch releases call deprecated
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore::torch.jit.TracerWarning")

CLIP_FILE = Path(fp.__file__)
TOKENIZER_FILE = CLIP_FILE.with_name("tokenizer.py")
EMBED = 32
TEXT_WIDTHS = {"fp-same": EMBED, "fp-wide": 64}

needs_open_clip = pytest.mark.skipif(importlib.util.find_spec("open_clip") is None, reason="needs open_clip")


def assert_same(ours, theirs, tol=1e-6):
    """Equal up to `tol` of the reference's scale, which must not be zero; NaN fails."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    scale = theirs.abs().max().item()
    assert scale > 1e-2, "the reference is zero: nothing is tested"
    assert (ours - theirs).abs().max().item() <= tol * scale


def randomise(module, seed=0):
    """Weights that no term of the model can be dropped from unnoticed: norms, biases and positions are not 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module


def make_tokens(batch=4, length=77, vocab=49408):
    """Rows that end at several places, one with a 0 before the end, one without an end; past the end, noise."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, min(vocab, 49000), (batch, length), generator=generator)
    if vocab == 49408:
        tokens[0, 5], tokens[0, 6:] = fp.EOS_ID, 0
        tokens[1, 9] = fp.EOS_ID
        tokens[1, 4] = 0
        tokens[2, 3], tokens[2, 7] = fp.EOS_ID, fp.EOS_ID
    else:
        tokens[0, 5:] = 0
    return tokens


def make_images(size=32, batch=2):
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """{model name: path of its weights}; registers each config with OpenCLIP, and one with a custom text tower."""
    open_clip = pytest.importorskip("open_clip")
    folder = tmp_path_factory.mktemp("open_clip")
    paths = {}
    for name, width in TEXT_WIDTHS.items():
        config = {
            "embed_dim": EMBED,
            "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
            "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": width, "heads": 2, "layers": 2},
        }
        (folder / f"{name}.json").write_text(json.dumps(config))
        (folder / f"{name}-custom.json").write_text(json.dumps(dict(config, custom_text=True)))
    open_clip.add_model_config(folder)
    for seed, name in enumerate(TEXT_WIDTHS):
        model = randomise(open_clip.create_model(name), seed)
        paths[name] = paths[f"{name}-custom"] = str(folder / f"{name}.pt")
        torch.save(model.state_dict(), paths[name])
    return paths


@pytest.fixture(scope="module")
def peer():
    pytest.importorskip("dalle2_pytorch")
    from dalle2_pytorch import dalle2_pytorch

    return dalle2_pytorch


@pytest.fixture
def adapter(checkpoints):
    return fp.OpenClipAdapter("fp-wide", checkpoints["fp-wide"])


# OpenCLIP


def test_a_clip_is_made_again_of_its_description(checkpoints):
    tokens = make_tokens()
    for quick in (False, True):
        adapter = fp.OpenClipAdapter("fp-wide", checkpoints["fp-wide"], force_quick_gelu=quick)
        again = fp.make_adapter(**json.loads(json.dumps(adapter.description)))
        assert torch.equal(again.embed_text(tokens).text_embed, adapter.embed_text(tokens).text_embed)
    with pytest.raises(ValueError, match="pretrained='no-such-tag'; it must be a file, or a tag of fp-wide: it has"):
        fp.make_adapter("open_clip", "fp-wide", {"pretrained": "no-such-tag"})


@pytest.mark.parametrize("suffix", ["", "-custom"], ids=["clip", "custom_text"])
@pytest.mark.parametrize("name", TEXT_WIDTHS)
def test_open_clip_matches_peer(peer, checkpoints, name, suffix):
    theirs = peer.OpenClipAdapter(name, checkpoints[name]).eval()
    ours = fp.OpenClipAdapter(name + suffix, checkpoints[name + suffix])
    tokens, images = make_tokens(), make_images()
    with torch.no_grad():
        text, expected = ours.embed_text(tokens), theirs.embed_text(tokens)
        image, expected_image = ours.embed_image(images), theirs.embed_image(images)
    assert_same(text.text_embed, expected.text_embed)
    assert_same(text.text_encodings, expected.text_encodings)
    assert_same(image.image_embed, expected_image.image_embed)
    assert image.image_encodings is None
    assert type(text).__name__ == type(expected).__name__ and text._fields == expected._fields
    assert type(image).__name__ == type(expected_image).__name__ and image._fields == expected_image._fields
    for field in ("image_size", "image_channels", "max_text_len"):
        assert getattr(ours, field) == getattr(theirs, field)
    assert ours.dim_text_encodings == theirs.dim_latent == TEXT_WIDTHS[name]
    assert ours.dim_latent == text.text_embed.shape[-1] == image.image_embed.shape[-1] == EMBED
    if not suffix:
        assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_text_mask_keeps_tokens_through_the_first_end_except_zeros(adapter):
    kept = adapter.embed_text(make_tokens()).text_encodings.abs().sum(dim=-1) > 0
    expected = torch.zeros(4, 77, dtype=torch.bool)
    expected[0, :6] = expected[1, :10] = expected[2, :4] = expected[3] = True
    expected[1, 4] = False
    assert torch.equal(kept, expected)


def test_embeddings_are_normalised_frozen_and_distinct(adapter):
    text, image = adapter.embed_text(make_tokens())[0], adapter.embed_image(make_images())[0]
    for embed in (text, image):
        assert embed.dtype == torch.float32 and not embed.requires_grad
        torch.testing.assert_close(embed.norm(dim=-1), torch.ones(len(embed)))
        assert (embed[0] - embed[1]).abs().max() > 0.01
    assert not any(p.requires_grad for p in adapter.parameters())
    assert not any(m.training for m in nn.Sequential(adapter).train()[0].modules())


def test_long_text_is_cut(adapter):
    tokens = make_tokens(length=90)
    assert_same(adapter.embed_text(tokens).text_encodings, adapter.embed_text(tokens[:, :77]).text_encodings)


@pytest.mark.parametrize("name", ["fp-wide", "fp-wide-custom"])
def test_text_may_be_shorter_than_the_context(name, checkpoints):
    """As a tokenizer with a smaller context gives it; one of the rows is cut before its end."""
    adapter, tokens = fp.OpenClipAdapter(name, checkpoints[name]), make_tokens()
    tokens[:, 12:] = 0
    short, whole = adapter.embed_text(tokens[:, :12]), adapter.embed_text(tokens)
    assert whole.text_encodings[:, 12:].abs().max() == 0
    assert_same(short.text_embed, whole.text_embed)
    assert_same(short.text_encodings, whole.text_encodings[:, :12])


def test_half_precision_model_gives_fp32(adapter):
    tokens, images = make_tokens(), make_images()
    expected = adapter.embed_text(tokens).text_embed, adapter.embed_image(images).image_embed
    adapter.to(torch.bfloat16)
    text, image = adapter.embed_text(tokens), adapter.embed_image(images)
    assert text.text_encodings.dtype == torch.float32
    # bfloat16 keeps 8 bits: 2^-8 a rounding, some tens of roundings through two layers
    assert_same(text.text_embed, expected[0], tol=0.1)
    assert_same(image.image_embed, expected[1], tol=0.1)


def test_tokenize_feeds_embed_text(adapter):
    tokens = adapter.tokenize(["a cat", "long " * 100])
    assert tokens.shape == (2, 77) and tokens.dtype == torch.int64
    assert tokens[0].tolist() == [49406, 320, 2368, fp.EOS_ID] + [0] * 73
    assert tokens[1, -1] == fp.EOS_ID
    encodings = adapter.embed_text(tokens).text_encodings
    assert encodings[0, 3].abs().max() > 0 and encodings[0, 4:].abs().max() == 0


def test_clear_removes_the_hook_and_stops_the_adapter(adapter):
    copied = copy.deepcopy(adapter)
    hooks = adapter.clip.ln_final._forward_hooks
    assert len(hooks) == 1
    adapter.clear()
    adapter.clear()
    assert len(hooks) == 0
    for call in (lambda: adapter.embed_text(make_tokens()), lambda: adapter.embed_image(make_images())):
        with pytest.raises(RuntimeError, match="OpenClipAdapter was cleared"):
            call()
    assert copied.embed_text(make_tokens()).text_encodings.abs().max() > 0
    copied.clear()
    assert len(copied.clip.ln_final._forward_hooks) == 0


OPENAI_NAMES = (
    "context_length", "vocab_size", "logit_scale.shape", "token_embedding.weight.shape", "positional_embedding.shape",
    "text_projection.shape", "ln_final.weight.shape", "transformer.width", "transformer.layers", "visual.output_dim",
    "visual.input_resolution", "visual.conv1.weight.shape", "visual.class_embedding.shape", "visual.proj.shape",
    "visual.positional_embedding.shape", "visual.ln_post.weight.shape", "visual.transformer.width", "dtype",
)  # fmt: skip


@pytest.mark.parametrize("model", ["fp-wide", "fp-wide-custom", "fp-openai"])
def test_names_of_openais_clip(checkpoints, openai_files, model):
    """What clients read and call through an adapter, as OpenAI's own package has it."""
    from clip.model import CLIP

    openai = model == "fp-openai"
    ours = (
        fp.OpenAIClipAdapter(model, openai_files["state_dict"])
        if openai
        else fp.OpenClipAdapter(model, checkpoints[model])
    )
    theirs = CLIP(EMBED, 32, 2, 64, 16, 77, 49408, 64, 1, 2)
    for name in OPENAI_NAMES:
        found, wanted = attrgetter(name)(ours.clip), attrgetter(name)(theirs)
        assert found == wanted or (not openai and re.match("visual.*(shape|width)$", name)), name
    assert torch.equal(ours.clip.build_attention_mask(), theirs.build_attention_mask())
    assert isinstance(ours.find_layer("visual.ln_post"), nn.LayerNorm) and ours.find_layer("none") is None
    images, tokens = make_images(), make_tokens()
    wanted, embed = ours.clip.visual(images), ours.embed_text(tokens).text_embed
    for adapter in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), ours):
        assert type(adapter.clip) is type(ours.clip)
        assert_same(adapter.clip.encode_image(images), wanted)
        assert_same(nn.functional.normalize(adapter.clip.encode_text(tokens), dim=-1), embed)
        adapter.to(torch.bfloat16)
        assert adapter.clip.dtype == adapter.clip.encode_image(images).dtype == torch.bfloat16
    with pytest.raises(AttributeError, match="nothing"):
        ours.clip.nothing  # noqa: B018


def test_no_state_stays_on_the_adapter(adapter):
    adapter.embed_text(make_tokens())
    adapter.clip.encode_text(make_tokens())
    with pytest.raises(IndexError):
        adapter.embed_text(make_tokens() + 10**6)
    assert adapter._captured == {}


def test_threads_get_their_own_encodings(adapter):
    batches = [make_tokens().roll(i, dims=1) for i in range(4)]
    expected = [adapter.embed_text(tokens).text_encodings for tokens in batches]

    def work(tokens):
        return [adapter.embed_text(tokens).text_encodings for _ in range(5)]

    for outputs, reference in zip(at_once(work, batches), expected):
        for output in outputs:
            assert_same(output, reference, tol=1e-5)  # threads may split a matmul's sum differently


def test_model_without_token_encodings_is_refused(adapter, monkeypatch):
    text = make_tokens()
    monkeypatch.setattr(adapter.clip, "encode_text", lambda t: adapter.clip.ln_final(torch.ones(len(t), 64)))
    with pytest.raises(ValueError, match=r"'fp-wide' gave no encoding for each token of text \(4, 77\)"):
        adapter.embed_text(text)


def test_text_tower_without_ln_final_is_refused(monkeypatch):
    monkeypatch.setattr(fp, "_load_open_clip", lambda name, pretrained, **options: (nn.Linear(1, 1), None))
    with pytest.raises(ValueError, match="'some-hf' has no ln_final"):
        fp.OpenClipAdapter("some/hf", None)


def test_missing_open_clip_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match=r'pip install "fastprior\[clip\]"'):
        fp.OpenClipAdapter()


# OpenAI


@pytest.fixture(scope="module")
def openai_files(tmp_path_factory):
    """A tiny model of OpenAI's own package, as a state dict and as the TorchScript archive that OpenAI distributes."""
    open_clip, openai = pytest.importorskip("open_clip"), pytest.importorskip("clip.model")
    folder = tmp_path_factory.mktemp("openai")
    config = {
        "embed_dim": EMBED,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
    }
    (folder / "fp-openai.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "fp-openai.json")
    model = randomise(openai.CLIP(EMBED, 32, 2, 64, 16, 77, 49408, 64, 1, 2)).eval()
    model.register_buffer("input_resolution", torch.tensor(32))
    archive, state = folder / "archive.pt", folder / "state.pt"
    torch.jit.trace(model, (make_images(), make_tokens())).save(archive)
    torch.save({k: v for k, v in model.state_dict().items() if k != "input_resolution"}, state)
    return {"archive": archive, "state_dict": state}


@pytest.mark.parametrize("kind", ["archive", "state_dict"])
def test_openai_matches_peer(peer, openai_files, kind):
    theirs = peer.OpenAIClipAdapter(str(openai_files["state_dict"])).float()
    ours = fp.OpenAIClipAdapter("fp/openai", openai_files[kind])
    # OpenAI's package rounds weights to fp16 on the way: the same weights are compared, their loading in the next test
    ours.load_state_dict(theirs.state_dict())
    tokens, images = make_tokens(), make_images(size=40)
    with torch.no_grad():
        text, expected = ours.embed_text(tokens), theirs.embed_text(tokens)
        assert_same(ours.embed_image(images).image_embed, theirs.embed_image(images).image_embed, tol=1e-5)
    assert_same(text.text_embed, expected.text_embed, tol=1e-5)
    assert_same(text.text_encodings, expected.text_encodings, tol=1e-5)
    assert (ours.image_size, ours.max_text_len, ours.image_channels) == (32, 77, 3)
    assert (ours.dim_latent, ours.dim_text_encodings) == (EMBED, 64)


@pytest.mark.parametrize("kind", ["archive", "state_dict"])
def test_openai_loads_every_weight(openai_files, kind):
    saved = torch.load(openai_files["state_dict"], weights_only=True)
    loaded = fp.OpenAIClipAdapter("fp-openai", openai_files[kind]).clip.state_dict()
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[key], saved[key]) for key in saved)


@needs_open_clip
@pytest.mark.parametrize("adapter_class", [fp.OpenAIClipAdapter, fp.OpenClipAdapter])
def test_openai_tag_is_given_quick_gelu(monkeypatch, adapter_class):
    import open_clip

    calls = []

    def create(*args, **kwargs):
        calls.append((args, kwargs))
        raise InterruptedError

    monkeypatch.setattr(open_clip, "create_model_and_transforms", create)
    with pytest.raises(InterruptedError):
        adapter_class("ViT-L/14", "openai", cache_dir="somewhere", device="meta")
    options = {"pretrained": "openai", "cache_dir": "somewhere", "device": "meta", "force_quick_gelu": True}
    assert calls == [(("ViT-L-14",), options)]


@needs_open_clip
@pytest.mark.parametrize("name", ["RN50", "ViT-B/32", "ViT-L/14@336px"])
def test_openai_names_are_known_to_open_clip(monkeypatch, name):
    import open_clip

    names = []
    monkeypatch.setattr(fp, "_load_open_clip", lambda name, *_, **__: names.append(name) or (nn.Identity(), None))
    with pytest.raises(ValueError, match="no ln_final"):
        fp.OpenAIClipAdapter(name)
    assert names[0] in open_clip.list_models()


# x-clip and CoCa


@pytest.fixture
def x_clip_model(peer):
    sizes = dict(dim_text=24, dim_image=16, dim_latent=EMBED, num_text_tokens=50, text_enc_depth=1, text_seq_len=12)
    heads = dict(text_heads=2, text_dim_head=8, visual_heads=2, visual_dim_head=8)
    model = peer.CLIP(**sizes, **heads, visual_enc_depth=1, visual_image_size=32, visual_patch_size=16)
    return randomise(model).eval()


@pytest.fixture
def coca_model(peer):
    class Patches(nn.Module):
        def forward(self, image):
            return nn.functional.unfold(image, 16, stride=16).transpose(1, 2)[..., :EMBED]

    sizes = dict(dim=EMBED, num_tokens=50, unimodal_depth=1, multimodal_depth=1, num_img_queries=4)
    return randomise(peer.CoCa(**sizes, dim_head=8, heads=2, img_encoder=Patches())).eval()


def same_embeddings(ours, theirs, length):
    tokens, images = make_tokens(length=length, vocab=50), make_images(48)
    for result, expected in (
        (ours.embed_text(tokens), theirs.embed_text(tokens)),
        (ours.embed_image(images), theirs.embed_image(images)),
    ):
        assert result._fields == expected._fields
        for a, b in zip(result, expected):
            assert_same(a, b)
            assert not a.requires_grad
    assert ours.embed_text(tokens).text_encodings[0, 5:].abs().max() == 0
    for field in ("dim_latent", "image_size", "image_channels", "max_text_len"):
        assert getattr(ours, field) == getattr(theirs, field)
    assert ours.dim_text_encodings == ours.embed_text(tokens).text_encodings.shape[-1]


def test_x_clip_matches_peer(peer, x_clip_model):
    ours = fp.as_clip_adapter(x_clip_model)
    assert type(ours) is fp.XClipAdapter
    same_embeddings(ours, peer.XClipAdapter(x_clip_model), length=14)


def test_x_clip_images_are_not_dropped_out_while_a_prior_trains(x_clip_model):
    ours = fp.as_clip_adapter(x_clip_model)
    nn.Sequential(ours).train()
    assert ours.embed_image(make_images()).image_encodings.shape[1] == 4  # visual_patch_dropout leaves 2 in training


def test_x_clip_without_text_cls_is_refused(peer):
    model = peer.CLIP(text_enc_depth=1, visual_enc_depth=1, text_causal_mask=True, text_eos_id=1, text_seq_len=12)
    with pytest.raises(ValueError, match="text CLS token"):
        fp.XClipAdapter(model).embed_text(make_tokens(length=12, vocab=50))


def test_coca_matches_peer(peer, coca_model):
    overrides = dict(image_size=32, image_channels=3, max_text_len=12)
    ours = fp.as_clip_adapter(coca_model, **overrides)
    assert type(ours) is fp.CoCaAdapter and ours.overrides == overrides
    same_embeddings(ours, peer.CoCaAdapter(coca_model, **overrides), length=14)


@pytest.mark.parametrize("name", ["image_size", "image_channels", "max_text_len"])
def test_coca_names_a_missing_override(name):
    adapter = fp.CoCaAdapter(nn.Identity(), other=1)
    with pytest.raises(ValueError, match=rf"CoCaAdapter needs {name}=.*given: \['other'\]"):
        getattr(adapter, name)


# The plugin point


class Pixels(fp.BaseClipAdapter):
    image_size, image_channels, max_text_len, dim_latent = 32, 3, 8, 4

    def __init__(self):
        super().__init__(nn.Linear(4, 4))


class Duck(nn.Module):
    def __init__(self):
        super().__init__()
        self.dim_latent = 4

    def embed_text(self, text): ...

    def embed_image(self, image): ...


def test_adapters_pass_unchanged(peer, x_clip_model):
    for adapter in (Pixels(), Duck(), peer.XClipAdapter(x_clip_model), peer.BaseClipAdapter(nn.Identity())):
        assert fp.as_clip_adapter(adapter, image_size=1) is adapter


@pytest.mark.parametrize("wrong", [nn.Linear(1, 1), "ViT-B/32", None], ids=lambda w: type(w).__name__)
def test_other_objects_are_refused(wrong):
    rule = r"clip must be an adapter \(a torch module with embed_text, embed_image and dim_latent.*not .*\."
    with pytest.raises(TypeError, match=rule + type(wrong).__name__):
        fp.as_clip_adapter(wrong)


def test_base_adapter_defaults():
    base = fp.BaseClipAdapter(nn.Identity(), image_size=3)
    assert base.overrides == {"image_size": 3}
    with pytest.raises(NotImplementedError, match="BaseClipAdapter has no tokenizer: pass token ids"):
        base.tokenize(["a cat"])
    for name in ("dim_latent", "dim_text_encodings", "image_size", "image_channels", "max_text_len"):
        with pytest.raises(NotImplementedError):
            getattr(base, name)
    assert Pixels().dim_text_encodings == 4


def test_freeze_and_eval():
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    assert fp.freeze_and_eval(module) is module
    assert not module[1].training and not any(p.requires_grad for p in module.parameters())


def test_embeddings_unpack_and_pickle():
    embed = torch.randn(2, 4)
    for kind in (fp.EmbeddedText, fp.EmbeddedImage):
        first, second = pickle.loads(pickle.dumps(kind(embed, None)))
        assert torch.equal(first, embed) and second is None


# Images


@pytest.mark.parametrize("size", [32, 33, 48, 97])
def test_resize_matches_peer(peer, size):
    images = make_images(size)
    assert math.ceil(32 / size * size) == 32, "the peer makes another size: see the next test"
    assert_same(Pixels().validate_and_resize_image(images), peer.resize_image_to(images, 32))


def test_resize_makes_the_size_where_the_peer_is_one_off(peer):
    images = make_images(293, batch=1)
    assert peer.resize_image_to(images, 224).shape[-1] == 225
    resized = fp.resize_image_to(images, 224)
    assert resized.shape == (1, 3, 224, 224)
    reference = nn.functional.interpolate(images, (224, 224), mode="bicubic", antialias=True)
    assert_same(resized[..., 3:-3, 3:-3], reference[..., 3:-3, 3:-3], tol=1e-4)


def test_resize_without_resize_right_differs_only_at_the_border(monkeypatch):
    pytest.importorskip("resize_right")
    images = make_images(80)
    expected = Pixels().validate_and_resize_image(images)
    monkeypatch.setitem(sys.modules, "resize_right", None)
    resized = Pixels().validate_and_resize_image(images)
    assert_same(resized[..., 3:-3, 3:-3], expected[..., 3:-3, 3:-3], tol=1e-5)
    assert not torch.equal(resized, expected)


def test_small_image_is_refused():
    with pytest.raises(ValueError, match="image is 31 wide; this CLIP needs at least 32"):
        Pixels().validate_and_resize_image(make_images(31))


# Imports


@pytest.mark.slow
def test_modules_import_nothing_heavy():
    code = (
        "import sys, importlib.util as u\n"
        "for name, file in (('c', sys.argv[1]), ('t', sys.argv[2])):\n"
        "    spec = u.spec_from_file_location(name, file); sys.modules[name] = m = u.module_from_spec(spec)\n"
        "    spec.loader.exec_module(m)\n"
        "heavy = {'open_clip', 'x_clip', 'coca_pytorch', 'torchvision', 'clip', 'resize_right', 'ftfy', 'regex'}\n"
        "found = heavy & set(sys.modules); assert not found, found\n"
        "class CLIP: __module__ = 'x_clip.x_clip'\n"
        "import torch\n"
        "class Mine(CLIP, torch.nn.Module): pass\n"
        "assert type(m_clip := sys.modules['c'].as_clip_adapter(Mine())).__name__ == 'XClipAdapter'\n"
        "found = heavy & set(sys.modules); assert not found, found\n"
    )
    subprocess.run([sys.executable, "-c", code, str(CLIP_FILE), str(TOKENIZER_FILE)], check=True)

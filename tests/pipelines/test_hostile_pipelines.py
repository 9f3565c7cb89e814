"""Folders of pipelines whose files hold anything, and calls with nonsense: one error each."""

import json
import math

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from fastprior import PriorPipeline
from helpers.pipeline_cases import make_parts


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    for name, part in make_parts(folder / "made").items():
        part.save_pretrained(folder / "whole" / name)
    return folder / "whole"


@pytest.fixture
def folder(whole, tmp_path):
    """A copy of a pipeline's folder, whose files may be changed: the others are links."""
    for file in whole.rglob("*.*"):
        copy = tmp_path / file.relative_to(whole)
        copy.parent.mkdir(exist_ok=True)
        if file.suffix == ".json":
            copy.write_bytes(file.read_bytes())
        else:
            copy.symlink_to(file)
    return tmp_path


def change(file, **entries):
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


SCHEDULERS = {  # entries of scheduler_config.json, or its text, and what is said of it
    "a list": ("[]", "it holds a JSON list; it must be a dict"), "null": ("null", "it holds a JSON NoneType"),
    "deep": ("[" * 10**5, "nested too deeply"), "no class": ("{}", "it has no _class_name"),
    "nan": ('{"_class_name": "DDPMScheduler", "beta_end": NaN}', "NaN is no JSON number"),
    "a list for a class": (dict(_class_name=["UnCLIPScheduler"]), r"kind=\['UnCLIPScheduler'\]; it must be one of"),
    "another class": (dict(_class_name="PNDMScheduler"), "kind='PNDMScheduler'; it must be one of"),
    "times": (dict(num_train_timesteps=10**9), "num_train_timesteps=1000000000; it must be at most"),
    "a string": (dict(num_train_timesteps="1000"), "num_train_timesteps='1000'; it must be an integer"),
    "an argument's name": (dict(kind="DDPMScheduler"), "kind='DDPMScheduler' is no entry of"),
    "self": (dict(self=1), "self=1 is no entry of"), "a long key": ({"x" * 10**5: 1}, "xxx=1 is no entry of"),
    "a radius": (dict(clip_sample_range="5"), "clip_sample_range='5'; it must be a finite number"),
    "deep value": (dict(prediction_type=[[[[[[]]]]]]), r"prediction_type=\[\[\[.*; for a UnCLIPScheduler it must be"),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_of_any_kind(folder, name):
    changed, why = SCHEDULERS[name]
    file = folder / "scheduler" / "scheduler_config.json"
    if isinstance(changed, str):
        file.write_text(changed)
    else:
        change(file, **changed)
    with pytest.raises(ValueError, match=f"^{file}.*{why}") as caught:
        PriorPipeline.from_pretrained(folder)
    assert len(str(caught.value)) < 1000


TEXT, TOKENS = "text_encoder/config.json", "tokenizer/tokenizer_config.json"
ENCODERS = {  # a part, entries of a JSON file of it, and what is said of them
    "layers": (TEXT, dict(num_hidden_layers=10**9), "num_hidden_layers=1000000000; .* at most 256"),
    "width": (TEXT, dict(hidden_size=2**14), "by its config it has .* weights, and its files have .* bytes"),
    "eps": (TEXT, dict(layer_norm_eps=None), "text_encoder (of .* cannot encode|cannot be read)"),
    "positions": (TEXT, dict(max_position_embeddings=10**12), "it must be at most 1,048,576"),
    "inner": (TEXT, dict(text_config=dict(hidden_size=2**40)), "hidden_size=1099511627776; it must"),
    "heads": (TEXT, dict(num_attention_heads=3), "text_encoder cannot be read from .*text_encoder"),
    "an activation": (TEXT, dict(hidden_act=[1]), "text_encoder cannot be read from"),
    "vocabulary": (TOKENS, dict(eos_token="<new>"), "the tokenizer gives the token 5"),
    "length": (TOKENS, dict(model_max_length=10**30), "model_max_length=10000.*; it must be"),
    "no length": (TOKENS, dict(model_max_length=0), "model_max_length=0; it must be 1 to"),
    "more": (TOKENS, dict(model_max_length=10), "max_position_embeddings, 9"),
    "a token": (TOKENS, dict(pad_token=[1]), "tokenizer cannot be read from"),
}  # fmt: skip


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_of_any_kind(folder, name):
    file, changed, why = ENCODERS[name]
    change(folder / file, **changed)
    if "vocabulary" in name:
        (folder / "tokenizer" / "special_tokens_map.json").unlink(missing_ok=True)
    pipeline = PriorPipeline.from_pretrained(folder)
    with pytest.raises(ValueError, match=why):
        pipeline.encode_text("abc")


def test_encoders_whose_weights_are_not_finite(folder):
    from safetensors.torch import load_file, save_file

    file = folder / "text_encoder" / "model.safetensors"
    state = load_file(file)
    for value, why in (
        (math.nan, "text_encoder holds NaN or infinity in .*"),
        (3e38, "the text encoder of .* gives NaN"),
    ):
        bad = {name: torch.full_like(t, value) if "mlp" in name else t for name, t in state.items()}
        file.unlink()
        save_file(bad, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=why):
            PriorPipeline.from_pretrained(folder).encode_text("abc")


NONSENSE = [
    (dict(guidance_scale=math.nan), "guidance_scale=nan; it must be a finite number"),
    (dict(guidance_scale="4"), "guidance_scale='4'; it must be a finite number"),
    (dict(num_images_per_prompt=10**12), "num_images_per_prompt=1000000000000; it must be at most"),
    (dict(num_images_per_prompt=True), "num_images_per_prompt=True; it must be an integer"),
    (dict(num_inference_steps=-1), "num_inference_steps=-1; .* it must be 2 to 1000"),
    (dict(num_inference_steps=2.5), "num_inference_steps=2.5; .* it must be 2 to 1000"),
    (dict(num_inference_steps="9"), "num_inference_steps='9'; .* it must be 2 to 1000"),
    (dict(eta=math.nan), "eta=nan; it must be a finite number"),
    (dict(image=torch.ones(1, 16), strength=math.nan), "strength=nan; it must be a finite number"),
]


@pytest.mark.parametrize("given, why", NONSENSE, ids=[" ".join(given) for given, _ in NONSENSE])
def test_calls_with_nonsense(whole, given, why):
    pipeline = PriorPipeline.from_pretrained(whole)
    with pytest.raises(ValueError, match=why):
        pipeline("abc", **given)


def test_weights_of_an_interpolation(whole):
    pipeline = PriorPipeline.from_pretrained(whole)
    with pytest.raises(ValueError, match="weights=nan; it must be a finite number"):
        pipeline.interpolate(["a", "b"], [0.5, math.nan])

"""Unmodified diffusers pipelines give the same with our prior as with their own, and prefill once a run."""

import copy
import json

import pytest
import torch

import fastprior
from fastprior.models.prior_transformer import cached_blocks
from fastprior.models.prior_transformer.prompt_memory import remembered
from helpers.priors import relative_error
from helpers.pt_cases import MAKES, make_inputs, make_stock, within_diffusers

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")
from helpers.pipeline_cases import CLIP, DIM, KARLO, LENGTH, make_tokenizer  # noqa: E402

TOLERANCE = 1e-4  # of scale, what a whole fp32 run may differ by
STEPS = 5
PRIOR = dict(num_attention_heads=2, num_layers=2, embedding_dim=DIM, num_embeddings=LENGTH)
SHAP_E = dict(
    PRIOR, num_embeddings=12, additional_embeddings=0, added_emb_type=None, encoder_hid_proj_type=None,
    embedding_proj_norm_type="layer", norm_in_type="layer", embedding_proj_dim=DIM, clip_embed_dim=2 * DIM,
)  # fmt: skip


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A tiny CLIP with random weights, by the names of Kandinsky's components."""
    torch.manual_seed(0)
    tokenizer, vocabulary = make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "files")
    ends = dict(bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1, pad_token_id=vocabulary - 1)
    text = transformers.CLIPTextConfig(**CLIP, **ends, vocab_size=vocabulary, max_position_embeddings=LENGTH)
    vision = transformers.CLIPVisionConfig(**CLIP, image_size=8, patch_size=4)
    size = dict(height=8, width=8)
    return dict(
        text_encoder=transformers.CLIPTextModelWithProjection(text).eval(),
        tokenizer=tokenizer,
        image_encoder=transformers.CLIPVisionModelWithProjection(vision).eval(),
        image_processor=transformers.CLIPImageProcessor(size=size, crop_size=size),
    )


def kandinsky(kind):
    def make(prior, clip):
        return getattr(diffusers, kind)(prior=prior, scheduler=diffusers.UnCLIPScheduler(**KARLO), **clip)

    return make


def stable_unclip(prior, clip):
    torch.manual_seed(0)
    widths, blocks = (8, 16), dict(norm_num_groups=4, layers_per_block=1)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=widths, cross_attention_dim=DIM, attention_head_dim=2,
        class_embed_type="projection", projection_class_embeddings_input_dim=2 * DIM, **blocks,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    normalizer = diffusers.pipelines.stable_diffusion.StableUnCLIPImageNormalizer(embedding_dim=DIM)
    text = {name: clip[name] for name in ("tokenizer", "text_encoder")}
    plain = transformers.CLIPTextModel(clip["text_encoder"].config).eval()
    return diffusers.StableUnCLIPPipeline(
        prior_tokenizer=text["tokenizer"], prior_text_encoder=text["text_encoder"], prior=prior,
        prior_scheduler=diffusers.DDPMScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0,
            beta_schedule="squaredcos_cap_v2",
        ),
        image_normalizer=normalizer, image_noising_scheduler=diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        tokenizer=text["tokenizer"], text_encoder=plain, unet=unet, scheduler=diffusers.DDIMScheduler(),
        vae=diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2),
    )  # fmt: skip


def heun():
    return diffusers.HeunDiscreteScheduler(
        beta_schedule="exp", num_train_timesteps=1024, prediction_type="sample", use_karras_sigmas=True,
        clip_sample=True, clip_sample_range=1.0,
    )  # fmt: skip


def shap_e(prior, clip):
    text = {name: clip[name] for name in ("tokenizer", "text_encoder")}
    return diffusers.ShapEPipeline(prior=prior, scheduler=heun(), shap_e_renderer=None, **text)


def shap_e_image(prior, clip):
    image = {name: clip[name] for name in ("image_encoder", "image_processor")}
    return diffusers.ShapEImg2ImgPipeline(prior=prior, scheduler=heun(), shap_e_renderer=None, **image)


def guided(pipe, **kwargs):
    return pipe("red fox", **kwargs).image_embeds


def interpolated(pipe, **kwargs):
    return pipe.interpolate(["red fox", torch.ones(1, 3, 8, 8), "cat"], [0.3, 0.3, 0.4], **kwargs).image_embeds


def many(pipe, **kwargs):
    return pipe(["red fox", "cat"], negative_prompt=["bad", "low"], num_images_per_prompt=3, **kwargs).image_embeds


def unguided(pipe, **kwargs):
    return guided(pipe, guidance_scale=1.0, **kwargs)


def from_an_embedding(pipe, **kwargs):
    return guided(pipe, image=torch.ones(1, DIM), strength=0.7, **kwargs)


def to_latents(pipe, num_inference_steps, **kwargs):
    steps = dict(prior_num_inference_steps=num_inference_steps, num_inference_steps=1)
    return pipe("red fox", output_type="latent", **steps, **kwargs).images


def to_shape(pipe, **kwargs):
    return pipe("red fox", output_type="latent", **kwargs).images


def image_to_shape(pipe, **kwargs):
    return pipe(torch.ones(1, 3, 8, 8), output_type="latent", **kwargs).images


KANDINSKY, V22, EMB2EMB = "KandinskyPriorPipeline", "KandinskyV22PriorPipeline", "KandinskyV22PriorEmb2EmbPipeline"
PIPELINES = {  # the pipeline, its prior, a call, and how often the call must prefill
    "2.1": (kandinsky(KANDINSKY), PRIOR, guided, 1),
    "2.1 interpolate": (kandinsky(KANDINSKY), PRIOR, interpolated, 3),
    "2.2": (kandinsky(V22), PRIOR, guided, 1),
    "2.2 many": (kandinsky(V22), PRIOR, many, 1),
    "2.2 without guidance": (kandinsky(V22), PRIOR, unguided, 1),
    "2.2 interpolate": (kandinsky(V22), PRIOR, interpolated, 3),
    "2.2 emb2emb": (kandinsky(EMB2EMB), PRIOR, from_an_embedding, 1),
    "StableUnCLIP": (stable_unclip, PRIOR, to_latents, 1),
    "Shap-E": (shap_e, SHAP_E, to_shape, 0),
    "Shap-E of an image": (shap_e_image, SHAP_E, image_to_shape, 0),
}


def make_pipe(name, clip, change=lambda stock: stock):
    make, config, _, _ = PIPELINES[name]
    pipe = make(change(make_stock(**config)), clip)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(name, pipe, seed=0):
    return PIPELINES[name][2](pipe, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def prefills(monkeypatch):
    made, run = [], cached_blocks.prefill

    def prefill(*args):
        made.append(1)
        return run(*args)

    monkeypatch.setattr(cached_blocks, "prefill", prefill)
    return made


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("name", PIPELINES)
def test_same_as_with_diffusers_own(name, make, clip, prefills):
    wanted = call(name, make_pipe(name, clip))
    of_the_seed = relative_error(call(name, make_pipe(name, clip), seed=1), wanted)
    pipe = make_pipe(name, clip, MAKES[make])
    assert relative_error(call(name, pipe), wanted) < min(TOLERANCE, of_the_seed / 10)
    assert len(prefills) == PIPELINES[name][3]
    assert remembered(pipe.prior) is None, "the prefix must go when the run ends"


@pytest.mark.parametrize("make", MAKES)
def test_16_bit_pipeline(make, clip, prefills):
    pipes = [make_pipe("2.2", copy.deepcopy(clip), change) for change in (lambda stock: stock, MAKES[make])]
    wanted, got = (call("2.2", pipe.to(torch.bfloat16)) for pipe in pipes)
    assert got.dtype == wanted.dtype == torch.bfloat16 and len(prefills) == 1
    assert torch.nn.functional.cosine_similarity(got.double(), wanted.double()).min() > 0.999


@pytest.mark.slow
def test_pipeline_with_a_compiled_prior(clip, prefills):
    pipe = make_pipe("2.2", clip, within_diffusers)
    wanted = call("2.2", pipe)
    prefills.clear()
    pipe.prior = torch.compile(pipe.prior, backend="aot_eager")
    assert relative_error(call("2.2", pipe), wanted) < TOLERANCE
    assert prefills == []


def test_pipelines_save_and_load_ours(clip, tmp_path, prefills):
    pipe = make_pipe("2.2", clip, within_diffusers)
    wanted = call("2.2", pipe)
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["prior"] == ["fastprior", "PriorTransformer"]
    loaded = diffusers.KandinskyV22PriorPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.prior) is fastprior.PriorTransformer
    prefills.clear()
    assert relative_error(call("2.2", loaded), wanted) < TOLERANCE and len(prefills) == 1
    stock = diffusers.PriorTransformer.from_pretrained(tmp_path / "prior")
    given = diffusers.KandinskyV22PriorPipeline.from_pretrained(tmp_path, prior=stock)
    given.set_progress_bar_config(disable=True)
    assert given.prior is stock and relative_error(call("2.2", given), wanted) < TOLERANCE


# in place


def test_accelerated_in_place(clip, prefills):
    pipe = make_pipe("2.2", clip)
    prior, weight, wanted = pipe.prior, pipe.prior.proj_in.weight, call("2.2", pipe)
    assert fastprior.accelerate_prior(pipe) is pipe and pipe.prior is prior and prior.proj_in.weight is weight
    assert isinstance(prior, diffusers.PriorTransformer) and type(prior) is fastprior.PriorTransformer
    assert fastprior.accelerate_prior(prior) is prior, "a second time changes nothing"
    assert prefills == [] and relative_error(call("2.2", pipe), wanted) < TOLERANCE and len(prefills) == 1


def test_prior_of_a_combined_pipeline(clip):
    names = dict(prior_prior=make_stock(**PRIOR), prior_scheduler=diffusers.UnCLIPScheduler(**KARLO))
    names |= {f"prior_{name}": part for name, part in clip.items()}
    movq = diffusers.VQModel(block_out_channels=(4,), norm_num_groups=2)
    pipe = diffusers.KandinskyV22CombinedPipeline(unet=None, scheduler=None, movq=movq, **names)
    fastprior.accelerate_prior(pipe)
    assert type(pipe.prior_pipe.prior) is fastprior.PriorTransformer


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_hooks_of_accelerate(offload, when, clip, prefills):
    """Offloading hooks replace forwards: that of the model leaves the prefix, those of its parts need them called."""
    model = make_stock()
    given = make_inputs(model.config)
    with torch.no_grad():
        wanted = model(**given)[0]
        if when == "before":
            fastprior.accelerate_prior(model)
        if offload == "model":
            accelerate.cpu_offload_with_hook(model, "cpu")
        else:
            accelerate.cpu_offload(model, "cpu")
        fastprior.accelerate_prior(model)
        for _ in range(3):
            assert relative_error(model(**given)[0], wanted) < TOLERANCE
    assert len(prefills) == (offload == "model")


class Own(diffusers.PriorTransformer):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize(
    "made, message",
    [
        (lambda: torch.nn.Linear(2, 2), "pipe_or_model is a Linear; it must be or have a diffusers PriorTransformer"),
        (lambda: Own(**PRIOR), "the prior is a Own; it must be a PriorTransformer and no subclass"),
    ],
)
def test_what_cannot_be_accelerated(made, message):
    with pytest.raises(TypeError, match=message):
        fastprior.accelerate_prior(made())

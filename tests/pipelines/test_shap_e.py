"""ShapEPrior gives what diffusers' Shap-E gives, from the same folder and the same generator."""

import copy
import pickle

import pytest
import torch

from fastprior.pipelines.shap_e import ShapEPrior
from helpers.priors import relative_error

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from helpers.pipeline_cases import DIM, make_parts  # noqa: E402

TOLERANCE = 1e-4  # of scale, what a whole fp32 run may differ by
STEPS = 6


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("given", ["texts", "embeddings", "latents"])
def test_shap_e(given, guidance_scale, tmp_path):
    parts = make_parts(tmp_path / "files")
    torch.manual_seed(1)
    prior = diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, embedding_dim=6, num_embeddings=5,
        additional_embeddings=0, encoder_hid_proj_type=None, added_emb_type=None,
        norm_in_type="layer", time_embed_act_fn="gelu", embedding_proj_dim=DIM, clip_embed_dim=12,
    ).eval()  # fmt: skip
    heun = dict(beta_schedule="exp", num_train_timesteps=1024, prediction_type="sample", use_karras_sigmas=True)
    parts = dict(
        prior=prior, text_encoder=parts["text_encoder"], tokenizer=copy.deepcopy(parts["tokenizer"]),
        scheduler=diffusers.HeunDiscreteScheduler(**heun, clip_sample=True, clip_sample_range=1.0),
    )  # fmt: skip
    for name, part in parts.items():
        part.save_pretrained(tmp_path / name)
    ours = ShapEPrior.from_pretrained(tmp_path)
    prompt = ["red fox", "cat"]
    kwargs = dict(num_images_per_prompt=2, num_inference_steps=STEPS, guidance_scale=guidance_scale)
    if given == "latents":
        kwargs["latents"] = torch.randn(4, 30, generator=torch.Generator().manual_seed(0))
    pipeline = diffusers.ShapEPipeline(**parts, shap_e_renderer=None)
    pipeline.set_progress_bar_config(disable=True)
    wanted = pipeline(prompt, generator=torch.Generator().manual_seed(0), output_type="latent", **kwargs).images
    prompt = ours.encode_text(prompt).embeds if given == "embeddings" else prompt
    for pipeline in (ours, *(copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)))):
        assert (
            relative_error(pipeline(prompt, generator=torch.Generator().manual_seed(0), **kwargs), wanted) < TOLERANCE
        )
    with pytest.raises(ValueError, match=r"prompt has shape \(2, 9\); it must be \(prompts, 16\)"):
        ours(torch.zeros(2, 9))

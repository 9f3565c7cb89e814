"""dalle2-pytorch's own training script, on it and on fastprior: the same calls, the same log, the same numbers."""

import json
from contextlib import nullcontext

import pytest
import torch
from accelerate.state import AcceleratorState

from fastprior import dropin
from fastprior.train_configs import TrainDiffusionPriorConfig
from helpers import training_client
from helpers.shard_cases import DIM, write

pytestmark = [pytest.mark.usefixtures("fresh_accelerate"), pytest.mark.slow]


def config(folder, out, epochs):
    text = dict(dim_text=DIM, dim_latent=DIM, num_text_tokens=49408, text_enc_depth=1, text_seq_len=77, text_heads=2)
    image = dict(dim_image=DIM, visual_enc_depth=1, visual_image_size=32, visual_patch_size=16, visual_heads=2)
    return dict(
        prior=dict(
            clip=dict(make="x-clip", base_model_kwargs=dict(**text, text_dim_head=4, **image, visual_dim_head=4)),
            net=dict(dim=DIM, depth=1, heads=2, dim_head=8, max_text_len=77, num_timesteps=10),
            image_embed_dim=DIM, image_size=32, timesteps=10, sample_timesteps=5, cond_drop_prob=0.1, loss_type="l2",
            condition_on_text_encodings=True,
        ),
        data=dict(image_url=str(folder / "img_emb"), meta_url=str(folder / "metadata"), batch_size=16,
                  splits=dict(train=0.6, val=0.2, test=0.2), eval_every_seconds=1),
        train=dict(epochs=epochs, lr=1e-2, wd=0.01, max_grad_norm=0.5, use_ema=True, amp=False, warmup_steps=2,
                   eval_timesteps=[5, 10]),
        tracker=dict(
            data_path=str(out / "tracker"), overwrite_data_path=True, log=dict(log_type="console", resume=False),
            load=dict(load_from="local", only_auto_resume=False, file_path=str(out / "latest.pth"))
            if (out / "latest.pth").exists() else None,
            save=[dict(save_to="local", save_latest_to=str(out / "latest.pth"), save_best_to=str(out / "best.pth"),
                       save_type="checkpoint")],
        ),
    )  # fmt: skip


def run(folder, out, ours, epochs=1, initial=None):
    out.mkdir(exist_ok=True)
    path = out / "config.json"
    path.write_text(json.dumps(config(folder, out, epochs)))
    with dropin.installed() if ours else nullcontext():
        trainer, logged = training_client.train(path, initial)
    return trainer, logged


def numbers(logged):
    """Without what a clock says."""
    return {
        (index, step, name): value
        for index, (values, step) in enumerate(logged)
        for name, value in values.items()
        if "samples-sec" not in name and "minutes" not in name
    }


def test_the_script_runs_as_on_its_own_package(tmp_path, peer):
    folder, found = write(tmp_path / "data", {0: 60, 1: 40}), {}
    torch.manual_seed(3)
    initial = TrainDiffusionPriorConfig(**config(folder, tmp_path, 1)).prior.create().state_dict()
    for name in ("peer", "ours"):
        trainer, logged = run(folder, tmp_path / name, name == "ours", initial=initial)
        found[name] = numbers(logged)
        assert type(trainer).__module__.startswith("fastprior") == (name == "ours")
        assert (tmp_path / name / "best.pth").exists()
        AcceleratorState._reset_state(reset_partial_state=True)
    assert len(found["peer"]) == 1 + 4 * 3 + 1 + 2 * 2 * 2 + 1 + 1
    assert found["ours"] == pytest.approx(found["peer"], rel=1e-3, abs=1e-4)
    # and on from where it was, with the average's decay and all
    trainer, logged = run(folder, tmp_path / "ours", ours=True, epochs=2)
    resumed = {key[1:]: value for key, value in numbers(logged).items()}
    assert resumed[4, "tracking/samples-seen"] == 60 + 16 and int(trainer.step) == 8
    assert resumed[7, "tracking/training-l2"] < 0.9 * found["ours"][1, 0, "tracking/training-l2"]

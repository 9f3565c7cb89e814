"""Configurations of training: those of dalle2-pytorch make the same prior here, and mistakes are named."""

from __future__ import annotations

import inspect
import json

import pytest

import fastprior
from fastprior import train_configs
from fastprior.models.dalle2.transformer import CausalTransformer
from helpers.processes import run_python

CONFIG = {
    "prior": {
        "net": {
            "dim": 16, "depth": 2, "max_text_len": 5, "num_timesteps": 9, "num_time_embeds": 1, "num_image_embeds": 2,
            "num_text_embeds": 1, "dim_head": 8, "heads": 2, "ff_mult": 2, "norm_out": True, "attn_dropout": 0.05,
            "ff_dropout": 0.05, "final_proj": True, "normformer": True, "rotary_emb": True,
        },
        "image_embed_dim": 16, "image_size": 32, "image_channels": 3, "timesteps": 9, "sample_timesteps": 4,
        "cond_drop_prob": 0.1, "loss_type": "l2", "predict_x_start": True, "beta_schedule": "cosine",
        "condition_on_text_encodings": True,
    },
    "data": {
        "batch_size": 8, "num_data_points": 100, "eval_every_seconds": 1600, "image_url": "images", "meta_url": "meta",
        "splits": {"train": 0.8, "val": 0.1, "test": 0.1},
    },
    "train": {
        "epochs": 5, "lr": 1.1e-4, "wd": 6.02e-2, "max_grad_norm": 0.5, "use_ema": True, "ema_beta": 0.9999,
        "ema_update_after_step": 50, "warmup_steps": 50, "amp": False, "save_every_seconds": 3600,
        "eval_timesteps": [4, 9], "random_seed": 84513,
    },
    "tracker": {
        "data_path": ".prior", "overwrite_data_path": True,
        "log": {"log_type": "wandb", "wandb_entity": "me", "wandb_project": "p", "wandb_resume": False},
        "load": {"load_from": None},
        "save": [{"save_to": "local", "save_type": "checkpoint", "save_latest_to": "latest.pth"}],
    },
}  # fmt: skip
X_CLIP = {
    "make": "x-clip", "model": "ViT-L/14",
    "base_model_kwargs": {
        "dim_text": 16, "dim_image": 16, "dim_latent": 16, "num_text_tokens": 20, "text_enc_depth": 1,
        "text_seq_len": 5, "text_heads": 2, "visual_enc_depth": 1, "visual_heads": 2, "visual_image_size": 32,
        "visual_patch_size": 16,
    },
}  # fmt: skip


def write(tmp_path, changes: dict):
    """CONFIG as a file, with dotted keys set to new values, or left out where the value is `...`."""
    config = json.loads(json.dumps(CONFIG))
    for dotted, value in changes.items():
        *sections, key = dotted.split(".")
        section = config
        for name in sections:
            section = section[name]
        if value is ...:
            del section[key]
        else:
            section[key] = value
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    return path


EXTRAS = {"prior.net.self_cond": True, "prior.sampling_final_clamp_l2norm": True, "prior.image_embed_scale": 2.0,
          "prior.net.rotary_emb": False}  # fmt: skip


@pytest.mark.parametrize("changes", [{}, EXTRAS, {"prior.clip": X_CLIP}], ids=["example", "extras", "x-clip"])
def test_config_creates_what_the_peers_does(peer, tmp_path, changes):
    from dalle2_pytorch.train_configs import TrainDiffusionPriorConfig as Peers

    path = write(tmp_path, changes)
    theirs, config = Peers.from_json_path(path), train_configs.TrainDiffusionPriorConfig.from_json_path(path)
    prior, wanted = config.prior.create(), theirs.prior.create()
    shapes = {name: t.shape for name, t in prior.state_dict().items()}
    assert shapes == {name: t.shape for name, t in wanted.state_dict().items()}
    for name in ("sample_timesteps", "image_embed_scale", "sampling_final_clamp_l2norm", "can_classifier_guidance"):
        assert getattr(prior, name) == getattr(wanted, name)
    assert prior.net.self_cond == wanted.net.self_cond
    for section in ("data", "train", "tracker"):  # with what the peer drops besides
        ours, other = (getattr(c, section).model_dump() for c in (config, theirs))
        assert {key: ours[key] for key in other} == other


@pytest.mark.parametrize("changes", [{"prior.net.max_text_len": ...}, {"prior.net.max_text_len": None}])
def test_config_without_max_text_len(tmp_path, changes):
    path = write(tmp_path, {**changes, "prior.image_size": ...})
    assert train_configs.TrainDiffusionPriorConfig.from_json_path(path).prior.create().net.max_text_len == 256


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prior.net.num_timestep": 9}, r"prior\.net: unknown key 'num_timestep', the nearest is 'num_timesteps'"),
        ({"prior.cond_drop_probs": 0.1}, r"prior: unknown key 'cond_drop_probs', the nearest is 'cond_drop_prob'"),
        ({"train.zzz": 1}, r"train: unknown key 'zzz', it must be one of 'epochs', "),
        ({"prior.net.depth": ...}, r"prior\.net\.depth: Field required"),
        ({"prior.net.depth": "deep"}, r"prior\.net\.depth: .*integer.*'deep'"),
        ({"data.splits.test": 0.2}, r"data\.splits: train, val and test sum to 1\.1"),
        ({"prior.clip": {"make": "clap"}}, r"prior\.clip\.make: .*'x-clip'.*'clap'"),
    ],
    ids=["net", "prior", "train", "missing", "type", "splits", "make"],
)  # fmt: skip
def test_config_errors_name_file_and_key(tmp_path, changes, message):
    path = write(tmp_path, changes)
    with pytest.raises(ValueError, match=rf"config\.json: {message}"):
        train_configs.TrainDiffusionPriorConfig.from_json_path(path)


NONSENSE = {
    "prior.net.depth": (0, 10**9, [1], 1.5), "prior.net.dim": (-1, 10**12), "prior.net.num_timesteps": (10**12,),
    "prior.net.ff_mult": (0, 10**12), "prior.net.attn_dropout": (1.5, "x"), "prior.timesteps": (0, 10**12, None),
    "prior.sample_timesteps": (0, -1), "prior.cond_drop_prob": (-0.1, 10**12), "prior.image_embed_scale": (0, -2),
    "prior.beta_schedule": ("cubic", ["cosine"]), "train.epochs": (0, -1, "x"), "train.lr": (-1, "x", None),
    "train.wd": (-1,), "train.ema_beta": (1, -0.1), "train.eval_timesteps": ([0], [10**12], 64),
    "train.random_seed": (-1, 2**40), "data.batch_size": (0, -1, 10**12), "data.workers": (0, 10**12),
    "data.splits": ([1], {"train": -1}),
}  # fmt: skip


@pytest.mark.parametrize("key", NONSENSE)
def test_config_values_that_are_nonsense(tmp_path, key):
    for value in NONSENSE[key]:
        with pytest.raises(
            ValueError, match=rf"^{write(tmp_path, {key: value})}: .*{key.rpartition('.')[2]}"
        ) as caught:
            train_configs.TrainDiffusionPriorConfig.from_json_path(tmp_path / "config.json")
        assert len(str(caught.value)) < 1000


def test_config_with_numbers_that_are_not_finite_or_without_end(tmp_path):
    path = write(tmp_path, {})
    text = path.read_text()
    unknown = {f"key {number}": 1 for number in range(10**4)}
    for content, why in (
        (
            text.replace('"depth": ', '"dot_scale": Infinity, "depth": '),
            "prior.net.dot_scale: Input should be a finite number",
        ),
        (text[:-1] + ', "a": ' + "[" * 10**5, "is not JSON .it is nested too deeply"),
        ("[1]", "holds a JSON list; it must be a dict"),
        (json.dumps(json.loads(text) | unknown), "unknown key 'key 0', "),
        (json.dumps(json.loads(text) | {"x" * 10**6: 1}), "unknown key 'xxx"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=f"{path}:? .*{why}") as caught:
            train_configs.TrainDiffusionPriorConfig.from_json_path(path)
        assert len(str(caught.value)) < 20_000
    config = train_configs.DiffusionPriorTrainConfig
    with pytest.raises(ValueError, match="finite number"):
        config(lr=float("inf"))


def test_config_that_is_not_json(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("{'prior': 1}")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        train_configs.TrainDiffusionPriorConfig.from_json_path(path)


@pytest.mark.parametrize("splits", [(0.7, 0.2, 0.1), (0.9, 0.1, 0.0), (0.9, 1e-7, 0.0999999), (1.0, 0.0, 0.0)], ids=str)
def test_splits(splits):
    config = train_configs.TrainSplitConfig(**dict(zip(("train", "val", "test"), splits)))
    assert (config.train, config.val, config.test) == splits


@pytest.mark.parametrize("config", ["DiffusionPriorConfig", "DiffusionPriorNetworkConfig"])
def test_config_knows_every_constructor_argument(config):
    fields = set(getattr(train_configs, config).model_fields)
    wanted = set(inspect.signature(getattr(fastprior, config.removesuffix("Config"))).parameters)
    if "kwargs" in wanted:
        wanted |= set(inspect.signature(CausalTransformer).parameters)
    assert fields == wanted - {"kwargs"}


@pytest.mark.slow
def test_config_without_pydantic():
    program = (
        "import sys; sys.modules['pydantic'] = None\ntry: import fastprior.train_configs\n"
        "except ImportError as error: print(error)"
    )
    assert 'pip install "fastprior[train]"' in run_python("-c", program)

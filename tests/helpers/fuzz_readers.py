"""Every reader of files that come from elsewhere: small valid files for it, and a call that reads such files.

A call checks what it got, and that nothing changed where it got nothing; it raises `Wrong` otherwise.
"""

import copy
import json
import random
import shutil

import numpy as np
import torch

import fastprior
from helpers import fuzz_data_readers
from helpers.fuzz_reader import Reader, Wrong, check_finite
from helpers.learned import with_table

NET = dict(dim=16, depth=1, dim_head=8, heads=2, num_timesteps=10, max_text_len=3)


def _prior(seed=0, **net):
    torch.manual_seed(seed)
    prior = fastprior.DiffusionPrior(
        fastprior.DiffusionPriorNetwork(**NET | net),
        image_embed_dim=16,
        timesteps=10,
        condition_on_text_encodings=False,
    )
    return prior.eval()


def _check_prior(prior):
    check_finite(prior.state_dict(), "weight")
    if not torch.isfinite(torch.tensor(float(prior.image_embed_scale))):
        raise Wrong("image_embed_scale is not finite")
    given = torch.nn.functional.normalize(torch.ones(1, prior.net.text_embed_dim or prior.net.dim), dim=-1)
    if sum(p.numel() for p in prior.parameters()) < 10**6 and not prior.condition_on_text_encodings:
        prior.sample(text_embed=given, timesteps=2, num_samples_per_batch=1, progress=False)


# weights


def _make_pth(root):
    prior = _prior()
    cases = dict(
        state=prior.state_dict(),
        net=prior.net.state_dict(),
        trained=dict(model=prior.state_dict(), ema_model=prior.state_dict(), version="1.15.6", step=torch.tensor(3),
                     config=dict(a=[1, "x", None]), optimizer=dict(state={}, param_groups=[dict(lr=1e-3, params=[0])])),
        half={key: value.half() if value.is_floating_point() else value for key, value in prior.state_dict().items()},
        lightning={"state_dict": {f"model.{key}": value for key, value in prior.state_dict().items()}, "epoch": 3},
    )  # fmt: skip
    folders = []
    for name, payload in cases.items():
        for kind in "zip", "legacy":
            folder = root / f"{name}-{kind}"
            folder.mkdir()
            torch.save(payload, folder / "prior.pth", _use_new_zipfile_serialization=kind == "zip")
            folders.append(folder)
    return folders


def _read_pth(folder):
    _check_prior(fastprior.load(folder / "prior.pth"))


def _make_hostile(root):
    """The corpus of hostile files, which mutations come from, too."""
    from helpers.hostile_files import all_cases

    folders = []
    for number, (_, make) in enumerate(all_cases()):
        folder = root / str(number)
        folder.mkdir()
        _, options = make(folder)
        paths = [path for path in folder.rglob("*") if not path.is_dir()]
        small = all(path.is_file() and path.stat().st_size < 2**17 for path in paths)
        if paths and small and not options:
            folders.append(folder)
    return folders


def _read_hostile(folder):
    files = list(folder.iterdir())
    _check_prior(fastprior.load(files[0] if len(files) == 1 else folder))


def _make_safetensors(root):
    from safetensors.torch import save_file

    prior, folders = _prior(), []
    for name, metadata in ("ours", None), ("bare", None), ("foreign", {"format": "pt", "by": "another"}):
        folders.append(root / name)
        folders[-1].mkdir()
        if name == "ours":
            fastprior.save(with_table(prior, 3), folders[-1] / "prior.safetensors")
            continue
        state = prior.state_dict() if name == "bare" else prior.net.state_dict()
        save_file({key: value.clone() for key, value in state.items()}, folders[-1] / "prior.safetensors", metadata)
    return folders


def _read_safetensors(folder):
    _check_prior(fastprior.load(folder / "prior.safetensors"))


def _make_sharded(root):
    from safetensors.torch import save_file

    state = {key: value.clone() for key, value in _prior().state_dict().items()}
    parts = dict(zip("12", (dict(list(state.items())[:9]), dict(list(state.items())[9:]))))
    folders = []
    for suffix, write in (
        (".safetensors", lambda part, path: save_file(part, path, {"format": "pt"})),
        (".bin", torch.save),
    ):
        folder = root / suffix[1:]
        folder.mkdir()
        base = "model" if suffix == ".safetensors" else "pytorch_model"
        weight_map = {}
        for number, part in parts.items():
            name = f"{base}-0000{number}-of-00002{suffix}"
            write(part, folder / name)
            weight_map |= dict.fromkeys(part, name)
        index = dict(metadata=dict(total_size=1), weight_map=weight_map)
        (folder / f"{base}{suffix}.index.json").write_text(json.dumps(index))
        (folder / "config.json").write_text(json.dumps(dict(net=NET, prior=dict(image_embed_dim=16, timesteps=10))))
        folders.append(folder)
    return folders


def _read_sharded(folder):
    _check_prior(fastprior.load(folder))


def _make_config(root):
    """A whole file of weights beside a config, in each of the forms that are known."""
    prior = dict(image_embed_dim=16, timesteps=10, condition_on_text_encodings=False)
    data = dict(image_url="images", meta_url="captions", batch_size=4, splits=dict(train=0.8, val=0.1, test=0.1))
    whole = dict(
        prior=dict(prior, net=NET), data=data, train={}, tracker=dict(log={}, save=[dict(save_latest_to="a.pth")])
    )
    folders = []
    for name, config in dict(ours=dict(net=NET, prior=prior), peer=dict(prior, net=NET), training=whole).items():
        folder = root / name
        folder.mkdir()
        torch.save(_prior().state_dict(), folder / "prior.pth")
        (folder / "given.json").write_text(json.dumps(config))
        folders.append(folder)
    return folders


def _read_config(folder):
    _check_prior(fastprior.load(folder / "prior.pth", config=folder / "given.json"))


def _read_beside(folder):
    (folder / "given.json").rename(folder / "config.json")
    _check_prior(fastprior.load(folder / "prior.pth"))


def _make_training(root):
    folders = _make_config(root)[2:]
    config = json.loads((folders[0] / "given.json").read_text())
    config["prior"]["net"] |= dict(conditions=dict(age=dict(kind="scalar"), place=dict(kind="category", size=5)))
    config["data"] |= dict(conditions=dict(age="age", place="place"), shuffle_seed=1)
    config["train"] = dict(epochs=2, lr=1e-3, eval_timesteps=[4, 8], warmup_steps=3)
    config["tracker"] = dict(
        data_path=".x",
        log=dict(log_type="console", verbose=True),
        load=dict(load_from="local", file_path="x.pth"),
        save=[dict(save_to="local", save_latest_to="latest.pth")],
    )
    (root / "more").mkdir()
    (root / "more" / "given.json").write_text(json.dumps(config))
    (folders[0] / "prior.pth").unlink()
    (root / "transformer").mkdir()
    config["prior"]["net"] = dict(make="prior_transformer", num_attention_heads=2, attention_head_dim=8, num_layers=1,
                                  embedding_dim=16, num_embeddings=3)  # fmt: skip
    del config["data"]["conditions"]
    (root / "transformer" / "given.json").write_text(json.dumps(config))
    return [*folders, root / "more", root / "transformer"]


def _read_training(folder):
    from fastprior.train_configs import TrainDiffusionPriorConfig

    TrainDiffusionPriorConfig.from_json_path(folder / "given.json")


# diffusers' folders

_TRANSFORMER = dict(num_attention_heads=2, attention_head_dim=8, num_layers=1, embedding_dim=16, num_embeddings=9)


def _transformer():
    from fastprior.models.prior_transformer.model import PriorTransformer

    torch.manual_seed(0)
    model = PriorTransformer(**_TRANSFORMER).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    return model


def _make_diffusers(root):
    from safetensors.torch import save_file

    model = _transformer()
    model.save_pretrained(root / "safe")
    model.save_pretrained(root / "bin", safe_serialization=False)
    shutil.copytree(root / "safe", root / "sharded")
    state, name = model.state_dict(), "diffusion_pytorch_model"
    (root / "sharded" / f"{name}.safetensors").unlink()
    parts = dict(list(state.items())[:20]), dict(list(state.items())[20:])
    names = [f"{name}-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for file, part in zip(names, parts):
        save_file(part, root / "sharded" / file)
    weight_map = {key: file for file, part in zip(names, parts) for key in part}
    (root / "sharded" / f"{name}.safetensors.index.json").write_text(json.dumps(dict(weight_map=weight_map)))
    return [root / "safe", root / "bin", root / "sharded"]


def _read_diffusers(folder):
    from fastprior.models.prior_transformer.model import PriorTransformer

    model = PriorTransformer.from_pretrained(folder)
    check_finite(model.state_dict(), "weight")


_SCHEDULERS = (
    dict(_class_name="UnCLIPScheduler", num_train_timesteps=20, clip_sample_range=5.0, prediction_type="sample"),
    dict(_class_name="DDPMScheduler", num_train_timesteps=20, beta_start=1e-4, beta_end=0.02, trained_betas=None),
    dict(
        _class_name="HeunDiscreteScheduler", num_train_timesteps=20, use_karras_sigmas=True, timestep_spacing="leading"
    ),
)


def _make_pipeline(root):
    folders = []
    for config in _SCHEDULERS:
        folder = root / config["_class_name"]
        _transformer().save_pretrained(folder / "prior")
        (folder / "prior_scheduler").mkdir()
        (folder / "prior_scheduler" / "scheduler_config.json").write_text(json.dumps(config))
        folders.append(folder)
    return folders


def _read_pipeline(folder):
    from fastprior import PriorPipeline

    pipeline = PriorPipeline.from_pretrained(folder)
    check_finite(pipeline.prior.state_dict(), "weight")
    check_finite(dict(alphas=pipeline.schedule.alphas_cumprod), "schedule")


def _make_encoders(root):
    from helpers.pipeline_cases import make_parts

    parts = make_parts(root / "tokenizer")
    folder = root / "encoders"
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    shutil.rmtree(root / "tokenizer")
    return [folder]


def _read_encoders(folder):
    """The encoders, which transformers reads."""
    from fastprior import PriorPipeline

    pipeline = PriorPipeline.from_pretrained(folder)
    encoded = pipeline._encoders.encode_text(["abc"], pipeline.device, pipeline.dtype)
    check_finite(dict(text=encoded.embeds), "encoding")
    pipeline._encoders.zero_embed(pipeline.device, pipeline.dtype)


def _make_original(root):
    """Karlo's and Kandinsky's names of a prior of one head of 64."""
    width, dim, length, draw = 64, 8, 9, torch.Generator().manual_seed(0)
    block = "transformer.resblocks.0"
    weights = {
        "clip_img_proj": (width, dim),
        "text_emb_proj": (width, dim),
        "text_enc_proj": (width, dim),
        "time_embed.0": (width, width),
        "time_embed.2": (width, width),
        "final_ln": (width,),
        "out_proj": (dim, width),
        f"{block}.attn.c_qkv": (3 * width, width),
        f"{block}.attn.c_proj": (width, width),
        f"{block}.ln_1": (width,),
        f"{block}.ln_2": (width,),
        f"{block}.mlp.c_fc": (4 * width, width),
        f"{block}.mlp.c_proj": (width, 4 * width),
    }
    shapes = {f"{name}.weight": shape for name, shape in weights.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in weights.items()}
    shapes |= {"positional_embedding": (1, length + 4, width), "prd_emb": (1, 1, width)}
    state = {f"model.{name}": torch.randn(shape, generator=draw) * 0.1 for name, shape in shapes.items()}
    (root / "original").mkdir()
    torch.save(state, root / "original" / "prior.ckpt")
    torch.save((torch.zeros(dim), torch.ones(dim)), root / "original" / "stats.th")
    (root / "original" / "given.json").write_text(json.dumps(dict(num_attention_heads=1, attention_head_dim=64)))
    return [root / "original"]


def _read_original(folder):
    from fastprior.checkpoints.prior_transformer import load

    model, _ = load(folder / "prior.ckpt", clip_stats=folder / "stats.th", config=folder / "given.json")
    check_finite(model.state_dict(), "weight")


# CLIP

_CLIP = dict(
    embed_dim=16,
    vision_cfg=dict(image_size=16, layers=1, width=64, patch_size=16),
    text_cfg=dict(context_length=8, vocab_size=64, width=64, heads=1, layers=1),
)


def _make_clip(root):
    """The archive that OpenAI distributes, and a state dict."""
    import open_clip
    from clip.model import CLIP

    config = root / "fuzz-clip.json"
    config.write_text(json.dumps(_CLIP))
    open_clip.add_model_config(config)
    model = CLIP(16, 16, 1, 64, 16, 8, 64, 64, 1, 1).eval()
    model.register_buffer("input_resolution", torch.tensor(16))
    for name in "archive", "state":
        (root / name).mkdir()
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 63]])
    with torch.no_grad():
        torch.jit.trace(model, (torch.ones(1, 3, 16, 16), tokens), check_trace=False).save(root / "archive" / "clip.pt")
    state = {name: value for name, value in model.state_dict().items() if name != "input_resolution"}
    torch.save(state, root / "state" / "clip.pt")
    return [root / "archive", root / "state"]


def _read_clip(folder):
    import open_clip

    if "fuzz-clip" not in open_clip.list_models():
        raise RuntimeError("make the files first: that registers the model")
    adapter = fastprior.OpenClipAdapter("fuzz-clip", folder / "clip.pt", force_quick_gelu=True)
    check_finite(adapter.clip.state_dict(), "weight")


# trainers

_TRAINER: dict = {}


def _trainer():
    """One trainer of this process, which has taken steps."""
    if not _TRAINER:
        from helpers.trainer_cases import make_trainer, run

        trainer = _TRAINER["it"] = make_trainer()
        run(trainer, 2)
        _TRAINER["start"] = copy.deepcopy(trainer.training_state())
    return _TRAINER["it"]


def _make_trainer(root):
    from helpers.trainer_cases import make_trainer, run, small_prior

    for name in "ours", "peer", "plain":
        (root / name).mkdir()
    trainer = make_trainer(small_prior(seed=5))
    run(trainer, 3, start=7)
    trainer.save(root / "ours" / "trainer.pth", note=dict(a=1), samples=[1, 2])
    trainer.export_for_peer(root / "peer" / "trainer.pth")
    torch.save(trainer.training_state(), root / "plain" / "trainer.pth", _use_new_zipfile_serialization=False)
    _trainer()
    return [root / "ours", root / "peer", root / "plain"]


def _held(trainer):
    """All that a trainer holds, and the generators of the process."""
    held = {}
    trainer_state = trainer.training_state()

    def walk(name, value):
        if isinstance(value, dict):
            for key, item in value.items():
                walk(f"{name}.{key}", item)
        elif isinstance(value, (list, tuple)):
            for key, item in enumerate(value):
                walk(f"{name}.{key}", item)
        else:
            held[name] = value.clone() if torch.is_tensor(value) else value

    walk("", trainer_state)
    walk("generators", [torch.get_rng_state(), random.getstate()])
    walk("groups", [{k: v for k, v in g.items() if k != "params"} for g in trainer.optimizer.param_groups])
    walk("last_lr", trainer.scheduler._last_lr)
    return held


def _same(one, other):
    if torch.is_tensor(one) and torch.is_tensor(other):
        return one.dtype == other.dtype and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
    return type(one) is type(other) and (one == other or one != one)


def _read_trainer(folder):
    trainer = _trainer()
    trainer.load(_TRAINER["start"])
    before = _held(trainer)
    try:
        trainer.load(folder / "trainer.pth", overwrite_lr=(folder / "trainer.pth").stat().st_size % 2 == 0)
    except Exception as error:
        after = _held(trainer)
        changed = [
            n
            for n in before.keys() | after.keys()
            if n not in before or n not in after or not _same(before[n], after[n])
        ]
        if changed:
            raise Wrong(
                f"half loaded: {min(changed)} and {len(changed) - 1} others changed before {error!r:.200}"
            ) from error
        raise
    after = _held(trainer)
    check_finite({name: value for name, value in after.items() if torch.is_tensor(value)}, "loaded")
    if int(trainer.step) < 0 or not all(np.isfinite(lr) and lr >= 0 for lr in trainer.scheduler._last_lr):
        raise Wrong(f"step {int(trainer.step)}, learning rates {trainer.scheduler._last_lr}")


READERS = {
    "hostile": Reader(_make_hostile, _read_hostile, valid=False),
    "pth": Reader(_make_pth, _read_pth),
    "safetensors": Reader(_make_safetensors, _read_safetensors),
    "sharded": Reader(_make_sharded, _read_sharded),
    "config": Reader(_make_config, _read_config, ("config",)),
    "config-beside": Reader(_make_config, _read_beside),
    "training": Reader(_make_training, _read_training),
    "diffusers": Reader(_make_diffusers, _read_diffusers),
    "pipeline": Reader(_make_pipeline, _read_pipeline),
    "encoders": Reader(_make_encoders, _read_encoders),
    "original": Reader(_make_original, _read_original),
    "clip": Reader(_make_clip, _read_clip),
    "trainer": Reader(_make_trainer, _read_trainer),
    **fuzz_data_readers.READERS,
}

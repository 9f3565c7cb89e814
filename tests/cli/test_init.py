"""From folders of embeddings to a config, a training and its evaluation: every command prints the next, which works."""

import json
import os
import shlex
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

import fastprior
from fastprior.demos import digits
from fastprior.prior.evaluate import evaluate
from fastprior.train_configs import TrainDiffusionPriorConfig
from helpers import ROOT
from helpers.command_line import error_of, run
from helpers.priors import WordClip, make_prior

pytest.importorskip("accelerate")

from helpers.trainer_cases import NET, make_trainer, small_prior

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def write(folder, name, array, shards=2):
    (folder / name).mkdir(parents=True, exist_ok=True)
    for number, rows in enumerate(np.array_split(array, shards)):
        np.save(folder / name / f"{name}_{number}.npy", rows)


def unit(rows, dim, seed=0, dtype=np.float32):
    found = np.random.default_rng(seed).normal(size=(rows, dim))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(dtype)


def captions(folder, rows, shards=2):
    (folder / "metadata").mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(np.array_split(np.arange(rows), shards)):
        table = pd.DataFrame({"caption": [f"thing {i}" for i in part]})
        table.to_parquet(folder / "metadata" / f"metadata_{number}.parquet")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """As clip-retrieval lays it out, with text encodings beside."""
    folder = tmp_path_factory.mktemp("data")
    write(folder, "img_emb", unit(200, 16, dtype=np.float16))
    write(folder, "text_emb", unit(200, 16, 1, dtype=np.float16))
    write(folder, "encodings", np.random.default_rng(2).normal(size=(200, 5, 24)).astype(np.float16))
    write(folder, "tokens", np.random.default_rng(5).normal(size=(200, 4, 16)).astype(np.float32))
    write(folder, "t5", unit(200, 24, 3))
    write(folder, "raw", 9 * unit(200, 16, 4))
    write(folder, "few", unit(8, 16))
    captions(folder, 200)
    return folder


def init(capsys, run_folder, *argv) -> dict:
    status, out, err = run(capsys, "init", run_folder, *argv)
    assert status == 0, err
    path = run_folder / "config.json"
    assert f"wrote {path}; train with\n" in out and out.endswith(f" train --config_file {path}\n")
    TrainDiffusionPriorConfig.from_json_path(path)
    return json.loads(path.read_text())


def test_what_the_data_says(capsys, data, tmp_path):
    config = init(capsys, tmp_path / "layout", "--images", data)  # its text embeddings are found, and need no CLIP
    prior, section = config["prior"], config["data"]
    assert section["text_url"] == str(data / "text_emb") and "meta_url" not in section and "clip" not in prior
    assert prior["image_embed_dim"] == prior["net"]["dim"] == 16 and not prior["condition_on_text_encodings"]
    assert section["batch_size"] == 16 and section["splits"] == dict(train=0.8, val=0.1, test=0.1)
    assert "image_embed_scale" not in prior and config["tracker"]["data_path"] == str(tmp_path / "layout")

    folders = "--texts", data / "t5", "--encodings", data / "encodings"
    config = init(capsys, tmp_path / "widths", "--images", data / "raw", *folders)
    prior = config["prior"]
    assert (prior["net"]["text_embed_dim"], prior["net"]["text_dim"], prior["net"]["max_text_len"]) == (24, 24, 5)
    assert prior["condition_on_text_encodings"] and prior["image_embed_scale"] == pytest.approx(4 / 9, rel=1e-3)


@pytest.mark.slow
def test_captions_ask_for_the_clip_of_their_width(capsys, data, tmp_path):
    pytest.importorskip("open_clip")
    write(tmp_path, "img_emb", unit(100, 512))
    captions(tmp_path, 100)
    folders = "--images", tmp_path / "img_emb", "--captions", tmp_path / "metadata"
    status, _, err = run(capsys, "init", tmp_path / "run", *folders)
    assert status == 0 and "assumed that ViT-B-32 (openai) made the images" in err
    prior = json.loads((tmp_path / "run" / "config.json").read_text())["prior"]
    clip = dict(make="open_clip", model="ViT-B-32", base_model_kwargs=dict(pretrained="openai"))
    assert prior["clip"] == clip and prior["net"]["max_text_len"] == 77 and prior["condition_on_text_encodings"]

    given = "--clip-model", "ViT-L-14", "--clip-pretrained", "openai"
    assert "embeds in 768; the image embeddings are 512 wide" in error_of(
        capsys, "init", tmp_path / "r", *folders, *given
    )
    folders = "--images", data / "img_emb", "--captions", data / "metadata"
    assert "no usual CLIP embeds in 16: give --clip-model" in error_of(capsys, "init", tmp_path / "r", *folders)


def test_captions_without_the_extra(capsys, tmp_path, monkeypatch):
    write(tmp_path, "img_emb", unit(100, 512))
    captions(tmp_path, 100)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    folders = "--images", tmp_path / "img_emb", "--captions", tmp_path / "metadata"
    assert 'captions need a CLIP: pip install "fastprior[clip]"' in error_of(capsys, "init", tmp_path / "r", *folders)


@pytest.mark.parametrize(
    "options, message",
    [
        ("--images {0}/img_emb", "no text is with it; give --texts or --captions"),
        ("--images {0}/none --texts {0}/text_emb", "none"),
        ("--images {0}/few --texts {0}/few", "few has 8 pairs; a training needs at least 20"),
        ("--images {0}/img_emb --texts {0}/few", "rows"),
        ("--images {0}/img_emb --texts {0}/t5 --captions {0}/metadata", "give either --texts or --captions"),
        ("--images {0}/img_emb --captions {0}/metadata --encodings {0}/encodings", "--encodings goes with --texts"),
        ("--images {0}/img_emb --captions {0}/metadata --clip-model x", "--clip-pretrained go together"),
    ],
)
def test_errors_of_init_are_one_line(capsys, data, tmp_path, options, message):
    assert message in error_of(capsys, "init", tmp_path / "run", *options.format(data).split())
    assert not (tmp_path / "run").exists()


def test_init_replaces_nothing_unasked(capsys, data, tmp_path):
    init(capsys, tmp_path, "--images", data)
    assert "config.json exists; --overwrite replaces it" in error_of(capsys, "init", tmp_path, "--images", data)
    assert init(capsys, tmp_path, "--images", data, "--overwrite")
    (tmp_path / "file").write_text("")
    assert "is a file" in error_of(capsys, "init", tmp_path / "file", "--images", data)


def shell(command: str, folder, **environment) -> subprocess.CompletedProcess:
    """As a user's shell runs it, in which no environment is activated."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PATH": "/usr/bin:/bin",
        **environment,
    }
    done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.slow
def test_each_command_prints_the_next_and_it_works(data, tmp_path):
    out = tmp_path / "my run"
    command = (
        f"{shlex.quote(sys.executable)} -m fastprior.cli init 'my run' --images {data} --encodings {data}/encodings"
    )
    printed = shell(command, tmp_path).stdout
    config = json.loads((out / "config.json").read_text())
    config["train"] |= dict(epochs=1)
    config["data"]["splits"] = dict(train=0.8, val=0.2, test=0.0)
    config["prior"] |= dict(predict_v=True)
    (out / "config.json").write_text(json.dumps(config))
    printed = shell(printed.splitlines()[-1], tmp_path).stdout
    command = printed.splitlines()[-1]
    assert "--skip-pairs 160" in command and "best.pth" in command
    measured = shell(f"{command} --batch-size {config['data']['batch_size']} --out metrics.json", tmp_path)
    assert not measured.stderr and "40 pairs, ema weights" in measured.stdout
    found = json.loads((tmp_path / "metrics.json").read_text())["metrics"]
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    (record,) = [record for record in records if "validation/ema l2-loss" in record]
    assert found == {name: pytest.approx(record[f"validation/ema {name}"], abs=1e-5) for name in found}


@pytest.mark.slow
def test_a_training_on_captions_says_which_clip(capsys, tmp_path, monkeypatch):
    made, clip = [], WordClip()
    for module in ("fastprior.train_configs", "fastprior.clip"):
        monkeypatch.setattr(f"{module}.make_adapter", lambda *a, **k: made.append((*a, *k.values())) or clip)
    write(tmp_path, "img_emb", unit(64, 32))
    captions(tmp_path, 64)
    described = dict(make="open_clip", model="M", base_model_kwargs=dict(pretrained="P"))
    net = dict(dim=32, depth=1, heads=2, dim_head=8, max_text_len=7)
    changes = dict(
        prior=dict(net=net, image_embed_dim=32, condition_on_text_encodings=True, clip=described),
        data=dict(image_url=str(tmp_path / "img_emb"), text_url=None, meta_url=str(tmp_path / "metadata")),
        train=dict(eval_timesteps=[2], eval_cond_scale=1),
    )
    (tmp_path / "config.json").write_text(json.dumps(train_config(tmp_path, tmp_path / "run", changes)))
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, "train", "--config_file", "config.json")
    assert status == 0, err
    argv = shlex.split(out.splitlines()[-1].partition(" evaluate ")[2])
    assert argv[:2] == ["--checkpoint", "l.pth"] and "--captions" in argv and argv[-4:-2] == ["--skip-pairs", "51"]
    status, out, err = run(capsys, "evaluate", *argv)
    assert status == 0 and out.startswith("13 pairs") and "encoded by the CLIP of the training, M" in err
    assert made == [("open_clip", "M", dict(pretrained="P"))] * 2


# what a checkpoint says is what the commands take


@pytest.fixture
def checkpoint(tmp_path):
    trainer = make_trainer(small_prior(predict_v=True, condition_on_text_encodings=True))
    trainer.save(tmp_path / "best.pth")
    return trainer, tmp_path / "best.pth"


FOLDERS = {"--images": "img_emb", "--texts": "text_emb", "--encodings": "tokens"}


def losses(capsys, tmp_path, path, data, *options) -> tuple[dict, str]:
    folders = [part for name, folder in FOLDERS.items() for part in (name, data / folder)]
    options = "--timesteps", 4, "--out", tmp_path / "metrics.json", *options
    status, _, err = run(capsys, "evaluate", "--checkpoint", path, *folders, *options)
    assert status == 0, err
    return json.loads((tmp_path / "metrics.json").read_text())["metrics"], err


def test_a_checkpoint_is_evaluated_as_it_was_trained(capsys, data, tmp_path, checkpoint):
    from fastprior.dataloaders import EmbeddingShards, PairStream

    trainer, path = checkpoint
    stream = PairStream(
        EmbeddingShards.open(data / "img_emb", None, data / "text_emb", data / "tokens"),
        batch_size=128,
        drop_last=False,
    )
    wanted = evaluate(trainer.sampling_prior, stream, timesteps=(4,))
    assert losses(capsys, tmp_path, path, data) == (pytest.approx(wanted, abs=1e-5), "")

    payload = torch.load(path, weights_only=True)
    payload.pop("fastprior")
    torch.save(payload, path)
    config = dict(prior=dict(trainer.prior.config, net=NET), data=dict(text_url="x"))
    (tmp_path / "given.json").write_text(json.dumps(config))
    assert losses(capsys, tmp_path, path, data, "--config", tmp_path / "given.json")[0] == pytest.approx(
        wanted, abs=1e-5
    )
    found, told = losses(capsys, tmp_path, path, data)
    assert found != pytest.approx(wanted, abs=1e-3)
    assert f"fastprior: note: assumed of {path}: predict_v=False\n" in told
    (tmp_path / "given.json").rename(tmp_path / "config.json")
    found, told = losses(capsys, tmp_path, path, data)
    assert found == pytest.approx(wanted, abs=1e-5)
    assert told == f"fastprior: note: assumed of {path}: what {tmp_path / 'config.json'} says\n"


def test_skipped_pairs(capsys, data, tmp_path, checkpoint):
    folders = [part for name, folder in FOLDERS.items() for part in (name, data / folder)]
    argv = "evaluate", "--checkpoint", checkpoint[1], *folders
    status, out, _ = run(capsys, *argv, "--timesteps", 2, "--skip-pairs", 190)
    assert status == 0 and out.startswith("10 pairs")
    assert "it must be less than the 200 pairs that there are" in error_of(capsys, *argv, "--skip-pairs", 200)
    assert "must not be negative" in error_of(capsys, *argv, "--skip-pairs", -1)


@pytest.mark.parametrize(
    "encoder, message",
    [
        (dict(make="open_clip", model="M", base_model_kwargs=dict(pretrained="P")), None),
        (dict(make="openai", model="M"), None),
        (
            dict(make="embeddings"),
            "was trained on text embeddings made before it, of a CLIP not named: give --clip-model",
        ),
        (dict(make="x-clip"), "was trained with a CLIP of make 'x-clip', whose weights it does not hold"),
        (None, "does not say how to encode captions"),
    ],
)
def test_captions_are_encoded_as_in_training(capsys, tmp_path, monkeypatch, encoder, message):
    made, clip = [], WordClip()
    for name in ("OpenClipAdapter", "OpenAIClipAdapter"):
        monkeypatch.setattr(f"fastprior.clip.{name}", lambda *a, **k: made.append((a, k)) or clip)
    prior = make_prior()
    prior.text_encoder = encoder
    fastprior.save(prior, tmp_path / "prior.safetensors")
    argv = "sample", "--checkpoint", tmp_path / "prior.safetensors", "ab", "--steps", 3, "--seed", 0
    argv = *argv, "--out", tmp_path / "o.npy", "--device", "cpu"
    if message:
        assert message in error_of(capsys, *argv)
        return
    status, _, err = run(capsys, *argv)
    assert (status, err) == (0, "fastprior: note: captions are encoded by the CLIP of the training, M\n")
    assert made == [(("M",), encoder.get("base_model_kwargs", {}))]
    prior.clip = clip
    wanted = prior.sample(["ab"], 4, timesteps=3, generator=torch.Generator().manual_seed(0), progress=False)
    np.testing.assert_allclose(np.load(tmp_path / "o.npy"), wanted.numpy(), atol=1e-6)


# errors of users


def train_config(folder, out, changes) -> dict:
    config = dict(
        prior=dict(net=dict(dim=16, depth=1, heads=2, dim_head=8, max_text_len=1), image_embed_dim=16, timesteps=10,
                   condition_on_text_encodings=False),
        data=dict(image_url=str(folder / "img_emb"), text_url=str(folder / "text_emb"), batch_size=16,
                  splits=dict(train=0.8, val=0.1, test=0.1)),
        train={},
        tracker=dict(data_path=str(out), overwrite_data_path=True, log={}, save=dict(save_latest_to="l.pth")),
    )  # fmt: skip
    for name, change in changes.items():
        config[name] |= change
    return config


@pytest.mark.parametrize(
    "changes, message",
    [
        (None, "gone.json does not exist; it must be the JSON file of a training"),
        ("[]", "holds a JSON list; it must be a dict"),
        ("\0", "is not JSON"),
        (dict(train=dict(epoch=1)), "train: unknown key 'epoch', the nearest is 'epochs'"),
        (dict(data=dict(image_url="/nowhere")), "/nowhere"),
        (dict(data=dict(batch_size=500)), "data.batch_size=500; the training split has 160 pairs"),
        (dict(data=dict(text_url=None, meta_url="{0}/metadata")), "needs prior.clip to make its text condition"),
        (dict(prior=dict(clip=dict(make="open_clip", model="no-such"))), "model='no-such'"),
        (dict(prior=dict(clip=dict(base_model_kwargs=dict(pretraind="x")))), "'pretraind'"),
        (dict(prior=dict(image_embed_dim=8)), "image_embed_dim=8"),
    ],
)
def test_errors_of_train_are_one_line(capsys, data, tmp_path, changes, message):
    path = tmp_path / ("gone.json" if changes is None else "config.json")
    if isinstance(changes, str):
        path.write_text(changes)
    elif changes is not None:
        text = json.dumps(train_config(data, tmp_path / "run", changes))
        path.write_text(text.replace("{0}", str(data)))
    assert message in error_of(capsys, "train", "--config_file", path)


@pytest.mark.slow
def test_a_run_that_cannot_go_on_says_why(capsys, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tracker = dict(log=dict(auto_resume=True), load=dict(load_from="local", file_path="l.pth", only_auto_resume=True))
    for depth in (1, 2):
        net = dict(dim=16, depth=depth, heads=2, dim_head=8, max_text_len=1)
        changes = dict(prior=dict(net=net), tracker=tracker, train=dict(eval_timesteps=[2]))
        (tmp_path / "config.json").write_text(json.dumps(train_config(data, tmp_path / "run", changes)))
        status, _, err = run(capsys, "train", "--config_file", "config.json")
    assert status == 2 and "what tracker.load finds does not fit this config: " in err and "layers.1" in err
    assert err.count("\n") == 1 and "take another tracker.data_path" in err


def program(*argv, **environment) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, *map(str, argv)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


WITHOUT = "import runpy, sys; sys.modules[{!r}] = None; sys.argv[1:] = ['--config_file', 'gone.json']; "
WITHOUT += "runpy.run_module('fastprior.train_diffusion_prior', run_name='__main__', alter_sys=True)"
LAUNCH = "-m", "accelerate.commands.accelerate_cli", "launch", "--quiet", "--cpu", "--num_processes", "1"
TORCHRUN = "-m", "torch.distributed.run", "--nproc_per_node", "2"


@pytest.mark.slow
@pytest.mark.parametrize("start", [(), LAUNCH, TORCHRUN], ids=["python", "accelerate", "torchrun"])
def test_a_user_error_is_one_line_however_it_was_started(tmp_path, start):
    done = program(*start, "-m", "fastprior.train_diffusion_prior", "--config_file", "gone.json")
    ours = [line for line in done.stderr.splitlines() if "gone.json" in line]
    line = "fastprior: error: gone.json does not exist; it must be the JSON file of a training"
    assert ours == [line] and done.returncode != 0 and "train_diffusion_prior.py" not in done.stderr
    if start != TORCHRUN:  # which tells a story of its own when a process fails
        assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("package", ["accelerate", "pydantic", "pyarrow"])
def test_a_missing_package_is_one_line_with_the_cure(package):
    done = program("-c", WITHOUT.format(package))
    line = (
        f'fastprior: error: {package}{" 2" * (package == "pydantic")} is not installed: pip install "fastprior[train]"'
    )
    assert (done.returncode, done.stderr.splitlines()) == (2, [line])


@pytest.mark.slow
def test_digits_are_written_with_embeddings_of_their_captions(tmp_path):
    pytest.importorskip("sklearn")
    digits.write_digits(tmp_path, 0)
    pairs = digits.load_pairs(tmp_path)
    for name, wanted in (("text_emb", pairs.text_embed), ("text_encodings", pairs.text_encodings)):
        found = [np.load(tmp_path / name / f"{name}_{shard}.npy") for shard in range(digits.SHARDS)]
        np.testing.assert_array_equal(np.concatenate(found), wanted.numpy())

"""Trackers on services: Weights & Biases, the Hugging Face hub and TensorBoard, which fakes stand in for."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from fastprior.trackers import create_logger, read_metrics
from fastprior.train_configs import TrackerConfig
from fastprior.weight_files.safe import read_file
from helpers.tracker_cases import WANDB, Trainer, auto, checkpoint_bytes, names, tracker


class Wandb(ModuleType):
    """Keeps what it is called with."""

    def __init__(self):
        super().__init__("wandb")
        self.run, self.inits, self.logs, self.saves, self.restored = None, [], [], [], []
        self.Image = lambda image, caption: ("image", caption)

    def init(self, **options):
        self.inits.append(options)
        run_id = options.get("id", "new")
        self.run = SimpleNamespace(
            id=run_id, name="n", path=f"{options['entity']}/{options['project']}/{run_id}",
            log=lambda log, **kwargs: self.logs.append((log, kwargs)),
            save=lambda path, **kwargs: self.saves.append((path, Path(path).read_bytes(), kwargs)),
        )  # fmt: skip
        return self.run

    def restore(self, name, run_path, replace, root):
        self.restored.append((name, run_path, replace))
        if name != "latest.pth":
            return None
        Trainer(11).save(Path(root) / name)
        return open(Path(root) / name)


@pytest.fixture
def wandb(monkeypatch):
    fake = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_SILENT", raising=False)
    return fake


def test_wandb_logs(tmp_path, wandb, capsys):
    run = tracker(tmp_path, wandb_run_name="first", verbose=True, **WANDB)
    (options,) = wandb.inits
    assert {key: options[key] for key in ("entity", "project", "name")} == dict(entity="me", project="p", name="first")
    assert "resume" not in options and options["config"]["log"]["wandb_project"] == "p"
    assert options["config"]["NumProcesses"] == 1
    run.log({"loss": 1.0}, step=2)
    run.log_images([1, 2], captions=["a"], image_section="samples", step=3)
    run.logger.log_error("broken", step=4)
    assert wandb.logs == [
        ({"loss": 1.0}, {"step": 2}),
        ({"samples": [("image", "a"), ("image", None)]}, {"step": 3}),
        ({"error": "broken"}, {"step": 4}),
    ]
    run.log_file(tmp_path / "metrics.jsonl")
    assert wandb.saves[0][::2] == (str(tmp_path / "metrics.jsonl"), {"base_path": str(tmp_path)})
    assert "loss" in capsys.readouterr().out and read_metrics(tmp_path / "metrics.jsonl")[0]["loss"] == 1.0


@pytest.mark.parametrize("name", ["resume", "wandb_resume"])
def test_wandb_resumes(tmp_path, wandb, name):
    tracker(tmp_path, wandb_run_id="abc", **{name: True}, **WANDB)
    assert (wandb.inits[0]["resume"], wandb.inits[0]["id"]) == ("must", "abc")


def test_wandb_resumes_by_itself(tmp_path, wandb):
    auto(tmp_path, wandb_run_id=None, **WANDB).save(Trainer(1), is_best=False, is_latest=True)
    wandb.run = None
    load = dict(load_from="wandb", wandb_file_path="latest.pth", only_auto_resume=True)
    main, other = (auto(tmp_path, load=load, dummy=dummy, **WANDB) for dummy in (False, True))
    assert (wandb.inits[1]["resume"], wandb.inits[1]["id"], len(wandb.inits)) == ("must", "new", 2)
    # also where no run is open, as in all processes but the main one
    assert main.recall()["step"] == other.recall()["step"] == 11
    assert wandb.restored == [("latest.pth", "me/p/new", True)] * 2


def test_wandb_without_a_run_to_load_from(tmp_path, wandb):
    with pytest.raises(ValueError, match="wandb_run_path=None"):
        tracker(tmp_path, load=dict(load_from="wandb", wandb_file_path="latest.pth"))
    load = dict(load_from="wandb", wandb_file_path="lost.pth", wandb_run_path="a/b/c")
    with pytest.raises(FileNotFoundError, match="lost.pth"):
        tracker(tmp_path, load=load).recall()


def test_wandb_saves(tmp_path, wandb):
    saver = dict(save_to="wandb", save_latest_to="deep/latest.pth")
    tracker(tmp_path, [saver], **WANDB).save(Trainer(4), is_best=False, is_latest=True)
    ((path, content, options),) = wandb.saves
    base = Path(options["base_path"])
    assert Path(path).relative_to(base) == Path("deep/latest.pth") and options["policy"] == "now"
    assert content == (tmp_path / "checkpoint.pth").read_bytes()


def test_wandb_saves_to_another_run(tmp_path, wandb):
    saver = dict(save_to="wandb", save_latest_to="latest.pth")
    with pytest.raises(ValueError, match="wandb_run_path=None"):
        tracker(tmp_path, [saver])
    tracker(tmp_path, [dict(saver, wandb_run_path="a/b/c")])
    assert wandb.inits == [dict(entity="a", project="b", id="c", resume="must")]
    with pytest.raises(ValueError, match="the run a/b/c is open"):
        tracker(tmp_path, [dict(saver, wandb_run_path="a/b/other")])


@pytest.fixture
def hub(monkeypatch):
    fake = ModuleType("huggingface_hub")
    fake.uploads, fake.tokens, fake.downloads, fake.missing = [], [], [], False

    class HfApi:
        def __init__(self, token):
            fake.tokens.append(token)

        def whoami(self):
            return {}

        def repo_info(self, repo):
            if fake.missing:
                raise RuntimeError("404")

        def upload_file(self, *, path_or_fileobj, path_in_repo, repo_id):
            fake.uploads.append((Path(path_or_fileobj).read_bytes(), path_in_repo, repo_id))

    def hf_hub_download(repo_id, filename, *, revision, token):
        fake.downloads.append((repo_id, filename, revision, token))
        return fake.file

    fake.HfApi, fake.hf_hub_download = HfApi, hf_hub_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    return fake


def test_the_hub(tmp_path, hub):
    (tmp_path / "token").write_text("hf_secret\n")
    saver = dict(
        save_to="huggingface", huggingface_repo="me/prior", save_latest_to="sub/latest.pth", save_meta_to="meta"
    )
    (tmp_path / "config.json").write_text('{"a": 1}')
    run = tracker(tmp_path / "run", [dict(saver, token_path=str(tmp_path / "token"))])
    run.save_config(tmp_path / "config.json", "prior_config.json")
    run.save(Trainer(4), is_best=True, is_latest=True)
    content = (tmp_path / "run" / "checkpoint.pth").read_bytes()
    assert hub.uploads == [(b'{"a": 1}', "meta/prior_config.json", "me/prior"), (content, "sub/latest.pth", "me/prior")]
    assert hub.tokens == ["hf_secret"]
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file() and b"hf_secret" in path.read_bytes()]

    tracker(tmp_path / "run", [saver])  # by `hf auth login`: no path of a token is looked for
    assert hub.tokens[1] is None
    hub.missing = True
    with pytest.raises(ValueError, match="huggingface_repo='me/prior'; it must exist, and you must be logged in"):
        tracker(tmp_path / "run", [saver])


def test_the_hub_loads(tmp_path, hub):
    hub.file = str(tmp_path / "source.pth")
    checkpoint_bytes(tmp_path)
    load = dict(load_from="huggingface", huggingface_repo="me/prior", file_path="latest.pth", revision="v1")
    assert tracker(tmp_path / "run", load=load).recall()["step"] == 9
    assert hub.downloads == [("me/prior", "latest.pth", "v1", None)] and (tmp_path / "source.pth").exists()


def test_tensorboard(tmp_path, monkeypatch):
    calls = []

    class SummaryWriter:
        def __init__(self, folder):
            calls.append(("folder", folder))

        def __getattr__(self, name):
            return lambda *args: calls.append((name, *args))

    monkeypatch.setitem(sys.modules, "tensorboard", ModuleType("tensorboard"))
    fake = ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    run = tracker(tmp_path, log_type="tensorboard")
    run.log({"loss": torch.tensor(1.5), "word": "x"}, step=2)
    run.log_images(["picture"], captions=["a corgi"], step=3)
    run.logger.log_error("broken", step=4)
    assert calls == [
        ("folder", str(tmp_path / "tensorboard")),
        ("add_scalar", "loss", 1.5, 2),
        ("add_image", "images/0 a corgi", "picture", 3),
        ("add_text", "error", "broken", 4),
    ]


@pytest.mark.parametrize(
    ("package", "extra", "sections"),
    [
        ("wandb", "wandb", WANDB),
        ("wandb", "wandb", dict(savers=[dict(save_to="wandb", save_latest_to="x.pth")])),
        ("tensorboard", "tensorboard", dict(log_type="tensorboard")),
        (
            "huggingface_hub",
            "hub",
            dict(savers=[dict(save_to="huggingface", huggingface_repo="a/b", save_best_to="x")]),
        ),
    ],
)
def test_what_is_not_installed_is_named(tmp_path, monkeypatch, package, extra, sections):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf'needs {package}: pip install "fastprior\[{extra}\]"'):
        tracker(tmp_path, **sections)


def test_wandb_gets_no_secrets(tmp_path, wandb):
    logger = create_logger("wandb", tmp_path, wandb_entity="me", wandb_project="p")
    logger.init({"nested": [{"api_key": "x"}], "lr": 0.1}, {})
    assert wandb.inits[0]["config"] == {"nested": [{"api_key": "<hidden>"}], "lr": 0.1}


def test_the_peers_example(tmp_path, wandb, monkeypatch):
    """The tracker of its example config, with its own keys."""
    monkeypatch.chdir(tmp_path)
    config = TrackerConfig(
        data_path=".prior", overwrite_data_path=True,
        log=dict(log_type="wandb", wandb_entity="me", wandb_project="debugging", wandb_resume=False, verbose=True),
        save=[dict(
            save_to="local", save_type="checkpoint", save_latest_to=".prior/latest_checkpoint.pth",
            save_best_to=".prior/best_checkpoint.pth",
        )],
    )  # fmt: skip
    run = config.create(config, {"Distributed": False})
    run.save(trainer=Trainer(1), is_best=True, is_latest=True, epoch=1, samples_seen=2, best_validation_loss=0.1)
    assert {"best_checkpoint.pth", "latest_checkpoint.pth"} <= set(names(".prior"))
    assert read_file(Path(".prior/latest_checkpoint.pth"))[0]["samples_seen"] == 2

"""Trackers: what is logged, saved and recalled, and what becomes of it when something fails."""

import http.server
import json
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import fsspec
import numpy as np
import pytest
import torch
from pydantic import ValidationError

import fastprior
from fastprior.checkpoints import dalle2 as checkpoint
from fastprior.trackers import LocalSaver, Tracker, create_loader, create_logger, create_saver, read_metrics
from fastprior.trackers import tracker as tracker_module
from fastprior.trackers.loggers import ConsoleLogger, TensorboardLogger, WandbLogger, without_secrets
from fastprior.train_configs import TrackerConfig
from fastprior.trainer import DiffusionPriorTrainer
from helpers.priors import make_prior


class Trainer:
    """Writes its path directly, as dalle2-pytorch's does."""

    use_ema = True

    def __init__(self, step: int = 0):
        self.step = torch.tensor([step])
        self.accelerator = SimpleNamespace(unwrap_model=lambda model: model)
        self.diffusion_prior = make_prior()
        self.ema_diffusion_prior = SimpleNamespace(ema_model=make_prior(seed=1))

    def save(self, path, overwrite=True, **kwargs):
        torch.save(dict(step=int(self.step), **kwargs), path)


def tracker(path, savers=None, *, overwrite=True, dummy=False, load=None, **log) -> Tracker:
    """A tracker begun from the sections of a config."""
    savers = savers or [dict(save_latest_to=str(path / "saved" / "latest.pth"))]
    config = dict(data_path=str(path), overwrite_data_path=overwrite, log=log, load=load, save=savers)
    return TrackerConfig(**config).create(TrackerConfig(**config), {"NumProcesses": 1}, dummy_mode=dummy)


def step_of(path) -> int:
    return torch.load(path, weights_only=True)["step"]


def names(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


# logging


def test_every_log_is_a_line_of_json(tmp_path, capsys, monkeypatch):
    run = tracker(tmp_path / "run")
    monkeypatch.setattr(tracker_module, "time", SimpleNamespace(time=lambda: 12.5))
    run.log({"loss": torch.tensor([0.5]), "lr": np.float32(0.25), "bad": float("nan"), "none": None}, step=3)
    run.log({"pair": torch.tensor([1.0, math.inf]), "word": "x"}, step=torch.tensor([4]))
    run.log({"epoch": 1})
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [record.pop("time") for record in records] == [12.5] * 3
    assert records == [
        {"loss": 0.5, "lr": 0.25, "bad": None, "none": None, "step": 3},
        {"pair": [1.0, None], "word": "x", "step": 4},
        {"epoch": 1, "step": None},
    ]
    assert "step 3: {'loss'" in capsys.readouterr().out


def test_lines_survive_a_kill(tmp_path):
    path = tmp_path / "metrics.jsonl"
    child = os.fork()
    if child == 0:
        try:
            run = tracker(tmp_path)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            for step in range(10**9):
                run.log({"loss": 1 / (step + 1)}, step=step)
        finally:
            os._exit(1)
    while not (path.exists() and path.stat().st_size > 20_000):
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == list(range(len(steps))) and len(steps) > 100


def test_a_torn_line_is_left_alone_by_those_that_follow(tmp_path):
    tracker(tmp_path).log({"loss": 1.0}, step=1)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"loss": 0.')
    resumed = tracker(tmp_path, load=dict(load_from="local", file_path=str(path)))
    resumed.log({"loss": 2.0}, step=2)
    assert [record["step"] for record in read_metrics(path)] == [1, 2]


def test_another_run_in_the_same_folder_begins_new_metrics(tmp_path):
    for step in range(2):
        tracker(tmp_path).log({"loss": 1.0}, step=step)
    old, new = sorted(path for path in tmp_path.iterdir() if path.suffix == ".jsonl")
    assert [record["step"] for record in read_metrics(new)] == [1] and new.name == "metrics.jsonl"
    assert [record["step"] for record in read_metrics(old)] == [0] and old.name.startswith("metrics-")


def test_other_processes_write_nothing_and_recall(tmp_path):
    main = tracker(tmp_path / "run", overwrite=False)
    main.save(Trainer(7), is_best=False, is_latest=True)
    before = names(tmp_path)
    load = dict(load_from="local", file_path=str(tmp_path / "run" / "saved" / "latest.pth"))
    other = tracker(tmp_path / "run", overwrite=False, dummy=True, load=load)
    other.log({"loss": 1.0}, step=1)
    other.log_images([1])
    other.log_file("nowhere")
    other.save_config("nowhere")
    other.save(Trainer(), is_best=True, is_latest=True)
    assert names(tmp_path) == before and other.recall()["step"] == 7


def test_a_folder_that_exists_is_not_taken_by_accident(tmp_path):
    with pytest.raises(FileExistsError, match="overwrite_data_path=True"):
        Tracker(tmp_path)


def test_overwriting_makes_the_folder_too(tmp_path):
    """dalle2-pytorch does not, and the first save fails."""
    assert Tracker(tmp_path / "new", overwrite_data_path=True).data_path.is_dir()


@pytest.mark.parametrize("part", ["logger", "savers"])
def test_init_needs_its_parts(tmp_path, part):
    run = Tracker(tmp_path / "run")
    if part == "savers":
        run.add_logger(ConsoleLogger(tmp_path))
    with pytest.raises(ValueError, match=part):
        run.init({}, {})


# saving


def test_best_and_latest(tmp_path):
    saved = tmp_path / "out"
    run = tracker(tmp_path, [dict(save_latest_to=f"{saved}/latest.pth", save_best_to=f"{saved}/best.pth")])
    run.save(Trainer(1), is_best=True, is_latest=True, epoch=0, best_validation_loss=0.5)
    run.save(Trainer(2), is_best=False, is_latest=True)
    run.save(Trainer(3), is_best=False, is_latest=False)
    # the files of one save may be one file with several names: later ones must not reach into it
    assert (step_of(saved / "latest.pth"), step_of(saved / "best.pth")) == (2, 1)
    assert torch.load(saved / "best.pth")["best_validation_loss"] == 0.5
    assert names(saved) == ["best.pth", "latest.pth"]


@pytest.mark.parametrize(
    ("options", "kept"),
    [(dict(save_all=True), [1, 2, 3, 4]), (dict(save_every=2), [2, 4]), (dict(save_latest=False), None)],
    ids=str,
)
def test_keeping_checkpoints(tmp_path, options, kept):
    saved = tmp_path / "out"
    saver = dict(save_latest_to=f"{saved}/latest.pth", save_best_to=f"{saved}/best.pth", **options)
    run = tracker(tmp_path, [saver])
    for step in range(1, 5):
        run.save(Trainer(step), is_best=False, is_latest=True)
    if kept is None:
        assert not saved.exists()
    else:
        assert names(saved) == ["latest.pth", *(f"latest_step{step}.pth" for step in kept)]
        assert [step_of(saved / f"latest_step{step}.pth") for step in kept] == kept


def test_placeholders(tmp_path):
    run = tracker(tmp_path, [dict(save_latest_to=str(tmp_path / "out" / "{epoch}-{step}.pth"))])
    run.save(Trainer(5), is_best=False, is_latest=True, epoch=2)
    assert names(tmp_path / "out") == ["2-5.pth"]
    with pytest.raises(ValueError, match=r"save_latest_to=.*; 'epoch' has no value, of step"):
        run.save(Trainer(5), is_best=False, is_latest=True)


def test_one_saver_that_fails_does_not_stop_the_others(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    savers = [dict(save_latest_to=f"{tmp_path}/{folder}/latest.pth") for folder in ("file", "good")]
    run = tracker(tmp_path, savers)
    run.save(Trainer(1), is_best=False, is_latest=True)
    assert step_of(tmp_path / "good" / "latest.pth") == step_of(tmp_path / "checkpoint.pth") == 1
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert "LocalSaver could not save" in record["error"] and record["step"] == 1
    assert "LocalSaver could not save" in capsys.readouterr().out


def test_a_trainer_that_fails_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    run = tracker(tmp_path)
    run.save(Trainer(1), is_best=False, is_latest=True)

    def save(self, path, **kwargs):
        Path(path).write_bytes(b"half")
        raise OSError("full")

    monkeypatch.setattr(Trainer, "save", save)
    before = names(tmp_path)
    with pytest.raises(OSError, match="full"):
        run.save(Trainer(2), is_best=False, is_latest=True)
    assert names(tmp_path) == before and step_of(tmp_path / "saved" / "latest.pth") == 1


def test_copies_where_links_are_impossible(tmp_path, monkeypatch):
    def link(*args):
        raise OSError("another file system")

    monkeypatch.setattr(os, "link", link)
    tracker(tmp_path).save(Trainer(1), is_best=False, is_latest=True)
    assert step_of(tmp_path / "saved" / "latest.pth") == 1


@pytest.mark.parametrize("use_ema", [True, False])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_models(tmp_path, use_ema, suffix):
    """The weights that sample, in files that `fastprior.load` reads without a guess."""
    trainer = Trainer(3)
    trainer.use_ema = use_ema
    run = tracker(tmp_path, [dict(save_type="model", save_best_to=f"{tmp_path}/best{suffix}")])
    run.add_save_metadata("dataset", "digits")
    run.save(trainer, is_best=True, is_latest=True, epoch=1)
    assert not (tmp_path / "checkpoint.pth").exists()  # nobody asked for one
    prior = fastprior.load(tmp_path / f"best{suffix}", config=None if suffix == ".safetensors" else CONFIG)
    wanted = trainer.ema_diffusion_prior.ema_model if use_ema else trainer.diffusion_prior
    assert all(torch.equal(value, prior.state_dict()[key]) for key, value in wanted.state_dict().items())
    if suffix == ".pth":
        payload = torch.load(tmp_path / "best.pth", weights_only=True)  # no pickled Version, unlike dalle2-pytorch
        assert payload["dataset"] == "digits" and payload["version"] == "1.15.6"
    else:
        assert prior.load_report.metadata["dataset"] == "digits" and prior.load_report.metadata["epoch"] == 1


CONFIG = {"net": {"heads": 4, "dim_head": 16}, "prior": {"timesteps": 20, "cond_drop_prob": 0.2}}


def test_the_decoders_trainer(tmp_path):
    """dalle2-pytorch's DecoderTrainer keeps its averaged unets aside."""
    decoder = torch.nn.Module()
    decoder.unets = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    decoder.clip = torch.nn.Linear(1, 1)
    decoder.other = torch.nn.Linear(1, 1)
    average = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    trainer = SimpleNamespace(
        decoder=decoder, use_ema=True, unets=average, accelerator=SimpleNamespace(unwrap_model=lambda model: model)
    )
    run = tracker(tmp_path, [dict(save_type="model", save_latest_to=f"{tmp_path}/model.pth")])
    run.save(trainer, is_best=False, is_latest=True)
    model = torch.load(tmp_path / "model.pth", weights_only=True)["model"]
    assert set(model) == {"unets.0.weight", "unets.0.bias", "other.weight", "other.bias"}
    assert torch.equal(model["unets.0.weight"], average[0].weight)


# recalling


def train(trainer, steps=2):
    for _ in range(steps):
        text, image = (torch.nn.functional.normalize(torch.randn(4, 32), dim=-1) for _ in range(2))
        trainer(text_embed=text, image_embed=image, text_encodings=torch.randn(4, 3, 32))
        trainer.update()


def test_a_trainer_goes_on_from_what_was_saved(tmp_path):
    trainer = DiffusionPriorTrainer(make_prior(), lr=1e-3)
    train(trainer)
    run = tracker(tmp_path)
    run.add_save_metadata("optimizer", "a name that the checkpoint has itself")
    run.add_save_metadata("dataset", "digits")
    run.save(trainer, is_best=False, is_latest=True, epoch=1, samples_seen=8, best_validation_loss=0.25)
    resumed = tracker(tmp_path, load=dict(load_from="local", file_path=f"{tmp_path}/saved/latest.pth"))
    state = resumed.recall()
    assert (state["epoch"], state["samples_seen"], state["best_validation_loss"]) == (1, 8, 0.25)
    assert state["dataset"] == "digits"
    other = DiffusionPriorTrainer(make_prior(seed=5), lr=1e-3)
    other.load(state)
    torch.manual_seed(0)
    train(trainer)
    torch.manual_seed(0)
    train(other)
    assert int(other.step) == 4
    ours, theirs = trainer.prior.state_dict(), other.prior.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_peers_checkpoints_are_recalled(peer, tmp_path):
    """They hold a pickled Version and a warm-up object, which dalle2-pytorch's own loaders no longer read."""
    from dalle2_pytorch.trainer import DiffusionPriorTrainer as Theirs

    trainer = Theirs(make_prior(module=peer), lr=1e-3, warmup_steps=5)
    trainer.save(str(tmp_path / "peer.pth"), epoch=3)
    run = tracker(tmp_path / "run", load=dict(load_from="local", file_path=str(tmp_path / "peer.pth")))
    state = run.recall()
    assert state["epoch"] == 3
    DiffusionPriorTrainer(make_prior(seed=2), lr=1e-3).load(state)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    run = tracker(tmp_path / "run", load=dict(load_from="local", file_path=str(tmp_path / "evil.pth")))
    with pytest.raises(ValueError, match="refused"):
        run.recall()
    assert not (tmp_path / "ran").exists()


def test_a_missing_checkpoint_is_noticed_at_the_start(tmp_path):
    with pytest.raises(FileNotFoundError, match="file_path='nowhere.pth'"):
        tracker(tmp_path, load=dict(load_from="local", file_path="nowhere.pth"))


def test_nothing_to_recall(tmp_path):
    run = tracker(tmp_path, load=dict(load_from=None))
    assert not run.can_recall
    with pytest.raises(ValueError, match="nothing to recall"):
        run.recall()


@pytest.fixture
def server():
    """Serves `content` at any path; `declared` is the length that it says it has."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.server.content is None:
                self.send_error(404)
                return
            self.send_response(200)
            if self.server.declared is not None:
                self.send_header("Content-Length", str(self.server.declared))
            self.end_headers()
            self.wfile.write(self.server.content)

        def log_message(self, *args): ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.content = running.declared = None
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def checkpoint_bytes(tmp_path) -> bytes:
    Trainer(9).save(tmp_path / "source.pth")
    return (tmp_path / "source.pth").read_bytes()


@pytest.mark.parametrize("declared", [True, False])
def test_urls(tmp_path, server, declared):
    server.content = checkpoint_bytes(tmp_path)
    server.declared = len(server.content) if declared else None
    url = f"http://127.0.0.1:{server.server_port}/checkpoint.pth"
    run = tracker(tmp_path / "run", load=dict(load_from="url", url=url))
    assert run.recall()["step"] == 9
    assert names(tmp_path / "run") == []  # the download is not kept


def test_a_download_that_ends_early(tmp_path, server):
    server.content = checkpoint_bytes(tmp_path)
    server.declared = len(server.content) + 1
    url = f"http://127.0.0.1:{server.server_port}/checkpoint.pth"
    with pytest.raises(OSError, match=r"ended after \d+ of \d+ bytes"):
        tracker(tmp_path / "run", load=dict(load_from="url", url=url)).recall()
    server.content = None
    with pytest.raises(OSError, match="404"):
        tracker(tmp_path / "run", load=dict(load_from="url", url=url)).recall()
    assert names(tmp_path / "run") == []


def test_other_urls_go_through_fsspec(tmp_path):
    fsspec.filesystem("memory").pipe_file("/checkpoint.pth", checkpoint_bytes(tmp_path))
    run = tracker(tmp_path / "run", load=dict(load_from="url", url="memory://checkpoint.pth"))
    assert run.recall()["step"] == 9


# resuming by itself


def auto(path, **changes) -> Tracker:
    load = dict(load_from="local", file_path=str(path / "saved" / "latest.pth"), only_auto_resume=True)
    return tracker(path, **{"auto_resume": True, "load": load, **changes})


def test_auto_resume(tmp_path, capsys):
    first = auto(tmp_path)
    assert not first.can_recall and "this is the first" in capsys.readouterr().out
    first.log({"loss": 1.0}, step=1)
    first.save(Trainer(1), is_best=False, is_latest=True)
    second = auto(tmp_path)
    assert second.can_recall and second.recall()["step"] == 1
    second.log({"loss": 1.0}, step=2)
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_auto_resume_before_the_first_checkpoint_starts_over(tmp_path):
    auto(tmp_path).log({"loss": 1.0}, step=1)
    assert not auto(tmp_path).can_recall
    # nor where the checkpoint went away
    auto(tmp_path).save(Trainer(1), is_best=False, is_latest=True)
    (tmp_path / "saved" / "latest.pth").unlink()
    assert not auto(tmp_path).can_recall


def test_all_processes_of_a_first_run_agree_that_it_is_the_first(tmp_path):
    """Nothing is written that a process which looks later would take for an earlier run."""
    main, other = auto(tmp_path), auto(tmp_path, dummy=True)
    assert (main.can_recall, other.can_recall) == (False, False)
    main.save(Trainer(1), is_best=False, is_latest=True)
    main, other = auto(tmp_path), auto(tmp_path, dummy=True)
    assert (main.can_recall, other.can_recall) == (True, True)


def test_without_auto_resume_the_last_run_is_forgotten_by_the_main_process(tmp_path):
    auto(tmp_path).save(Trainer(1), is_best=False, is_latest=True)
    assert not auto(tmp_path, auto_resume=False, dummy=True).can_recall
    assert (tmp_path / "auto_resume.json").exists()
    auto(tmp_path, auto_resume=False)
    assert not (tmp_path / "auto_resume.json").exists()


def test_auto_resume_with_another_logger(tmp_path):
    auto(tmp_path).save(Trainer(1), is_best=False, is_latest=True)
    options = dict(log_type="wandb", wandb_entity="me", wandb_project="p")
    with pytest.raises(ValueError, match="logged by ConsoleLogger and would be resumed by WandbLogger"):
        auto(tmp_path, **options)


# services


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


WANDB = dict(log_type="wandb", wandb_entity="me", wandb_project="p")


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


# configs


def test_save_config_keeps_secrets_to_itself(tmp_path):
    config = {"net": {"num_text_tokens": 20}, "save": [{"hub_token": "hf_x", "token_path": "p"}], "password": "y",
              "url": "https://user:word@host/file?sig=1&X-Amz-Signature=abc&part=2"}  # fmt: skip
    (tmp_path / "c.json").write_text(json.dumps(config))
    run = tracker(tmp_path / "run", [dict(save_latest_to="x.pth", save_meta_to=str(tmp_path / "meta"))])
    run.save_config(tmp_path / "c.json", "prior_config.json")
    for folder in ("run", "meta"):
        assert json.loads((tmp_path / folder / "prior_config.json").read_text()) == {
            "net": {"num_text_tokens": 20}, "save": [{"hub_token": "<hidden>", "token_path": "p"}],
            "password": "<hidden>", "url": "https://<hidden>@host/file?sig=1&X-Amz-Signature=<hidden>&part=2",
        }  # fmt: skip
    kept = tmp_path / "run" / "prior_config.json"
    kept.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="holds secrets"):
        run.save_config(kept, "prior_config.json")
    assert json.loads(kept.read_text()) == config


def test_save_config_copies_what_has_no_secrets(tmp_path):
    text = '{\n  "lr": 1e-4,\n  "lr": 1.10e-4}\n'
    run = tracker(tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(text)
    run.save_config(tmp_path / "run" / "config.json")  # as a run does that resumes with the copy of its config
    assert (tmp_path / "run" / "config.json").read_text() == text
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match=r"bad\.json is not valid JSON"):
        run.save_config(tmp_path / "bad.json")


def test_wandb_gets_no_secrets(tmp_path, wandb):
    logger = create_logger("wandb", tmp_path, wandb_entity="me", wandb_project="p")
    logger.init({"nested": [{"api_key": "x"}], "lr": 0.1}, {})
    assert wandb.inits[0]["config"] == {"nested": [{"api_key": "<hidden>"}], "lr": 0.1}


def test_without_secrets_leaves_the_original():
    config = {"token": "x", "list": [{"token": None}]}
    assert without_secrets(config) == {"token": "<hidden>", "list": [{"token": None}]}
    assert config["token"] == "x"


SAVE = dict(save_to="local", save_latest_to="latest.pth")
SECTIONS = dict(log=dict(log_type="console"), load=dict(load_from=None), save=[SAVE])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"log": {"log_type": "wnadb"}}, "log_type='wnadb'; the nearest is 'wandb'"),
        ({"log": {**WANDB, "wandb_proyect": "p"}}, "unknown key 'wandb_proyect' with log_type='wandb', the nearest is"),
        ({"log": {"log_type": "wandb", "wandb_entity": "me"}}, "log_type='wandb' needs 'wandb_project'"),
        ({"log": {**WANDB, "wandb_entity": 3}}, "wandb_entity=3; it must be of type str"),
        ({"log": {**WANDB, "resume": True}}, "wandb_run_id=None; it must name the run"),
        ({"log": {"log_type": "console", "colour": 1}}, "unknown key 'colour' with log_type='console'"),
        ({"load": {"load_from": "file"}}, "load_from='file'; it must be one of 'local', 'url'"),
        ({"load": {"load_from": "url", "ulr": "x"}}, "unknown key 'ulr' with load_from='url', the nearest is 'url'"),
        ({"load": {"load_from": "url", "url": "x.pth"}}, "url='x.pth'; it must have a scheme"),
        ({"load": {"load_from": "local"}}, "load_from='local' needs 'file_path'"),
        ({"save": {**SAVE, "save_lastest_to": "x"}}, "unknown key 'save_lastest_to' with save_to='local', the nearest"),
        ({"save": {**SAVE, "save_type": "modle"}}, "save_type='modle'; it must be 'checkpoint' or 'model'"),
        ({"save": {"save_to": "local"}}, "nothing would be saved"),
        ({"save": {**SAVE, "save_latest": False}}, "nothing would be saved"),
        ({"save": {**SAVE, "save_latest_to": True}}, "save_latest_to=True; it must be a path, or false"),
        ({"save": {**SAVE, "save_latest_to": "x.safetensors"}}, ".safetensors is for save_type 'model'"),
        ({"save": {**SAVE, "save_every": 0}}, "save_every=0; it must be at least 1"),
        ({"save": {"save_best_to": "x", "save_all": True}}, "it must be given"),
        ({"save": {**SAVE, "save_to": "huggingface"}}, "save_to='huggingface' needs 'huggingface_repo'"),
        ({"save": {**SAVE, "save_to": "wandb", "wandb_run_path": "x"}}, "it must be entity/project/id"),
        ({"save": []}, "at least 1"),
    ],
)
def test_configs_that_are_wrong(changes, message):
    (section,) = changes
    with pytest.raises(ValidationError) as error:
        TrackerConfig(**{**SECTIONS, **changes})
    assert message in str(error.value)
    assert [e["loc"][0] for e in error.value.errors()] == [section]


def test_options_of_another_type_are_warned_of():
    log = {**WANDB, "log_type": "console", "wandb_resume": False}
    with pytest.warns(UserWarning, match="'wandb_.*' means nothing with log_type='console'") as caught:
        config = TrackerConfig(**{**SECTIONS, "log": log})
    assert [str(warning.message).split("'")[1] for warning in caught].count("wandb_entity") == 1
    with pytest.warns(UserWarning, match="means nothing"):
        assert type(config.log.create(".")) is ConsoleLogger


def test_parts_by_name(tmp_path):
    assert type(create_logger("tensorboard", tmp_path)) is TensorboardLogger
    assert type(create_logger("wandb", tmp_path, wandb_entity="a", wandb_project="b")) is WandbLogger
    assert type(create_saver("local", tmp_path, save_best_to="x")) is LocalSaver
    assert create_loader("local", tmp_path, file_path="x").data_path == tmp_path


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
    assert checkpoint.read_file(Path(".prior/latest_checkpoint.pth"))[0]["samples_seen"] == 2


@pytest.mark.parametrize("name", ["checkpoint.pth", "auto_resume.json", "config.json"])
def test_what_a_kill_left_half_written_is_gone_at_the_next_start(tmp_path, name):
    leftover, other = tmp_path / f".{name}.0123abcd.tmp", tmp_path / ".of-someone-else.0123abcd.tmp"
    for path in leftover, other:
        path.write_text("half")
    saver = create_saver("local", tmp_path, save_best_to="best.pth")
    saver.init(None)
    assert not leftover.exists() and other.exists()

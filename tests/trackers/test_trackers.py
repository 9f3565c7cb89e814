"""Trackers: what is logged and saved, the configs of their parts, and what becomes of it when something fails."""

import errno
import io
import json
import math
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

import fastprior
from fastprior.trackers import LocalSaver, Tracker, create_loader, create_logger, create_saver, read_metrics
from fastprior.trackers import tracker as tracker_module
from fastprior.trackers.loggers import ConsoleLogger, TensorboardLogger, WandbLogger, without_secrets
from fastprior.train_configs import TrackerConfig
from helpers.tracker_cases import WANDB, Trainer, names, step_of, tracker

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
    assert "3     0.5000     0.2500" in capsys.readouterr().out


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


@pytest.mark.parametrize("name", ["checkpoint.pth", "auto_resume.json", "config.json"])
def test_what_a_kill_left_half_written_is_gone_at_the_next_start(tmp_path, name):
    leftover, other = tmp_path / f".{name}.0123abcd.tmp", tmp_path / ".of-someone-else.0123abcd.tmp"
    for path in leftover, other:
        path.write_text("half")
    saver = create_saver("local", tmp_path, save_best_to="best.pth")
    saver.init(None)
    assert not leftover.exists() and other.exists()


def test_metrics_wait_for_room(tmp_path, monkeypatch):
    """A disk that takes a part of a line, then nothing, then all: every line is whole in the end, and said once."""
    run, room, plain = tracker(tmp_path), [10**6], io.FileIO.write

    class File(io.FileIO):
        def write(self, data):
            taken = bytes(data)[: room[0]]
            if not taken:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            room[0] -= len(taken)
            return plain(self, taken)

    monkeypatch.setattr(Path, "open", lambda self, mode, buffering: File(self, mode))
    run.log({"loss": 1.0}, step=1)
    room[0] = 15
    with pytest.warns(UserWarning, match="metrics.jsonl takes no more .*No space left on device.*; the run goes on"):
        run.log({"loss": 2.0}, step=2)
    run.log({"loss": 3.0}, step=3)
    monkeypatch.undo()
    path = tmp_path / "metrics.jsonl"
    assert [record["step"] for record in read_metrics(path)] == [1] and not path.read_bytes().endswith(b"\n")
    run.log({"loss": 4.0}, step=4)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]


@pytest.mark.parametrize("call", ["log", "log_images", "log_file"])
def test_a_logger_whose_disk_is_full_ends_nothing(tmp_path, monkeypatch, call):
    run, calls = tracker(tmp_path), []

    def fail(*args, **kwargs):
        calls.append(args)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(run.logger, call, fail)
    with pytest.warns(UserWarning, match="ConsoleLogger takes no more .*No space left") as caught:
        for _ in range(2):
            getattr(run, call)({"loss": 1.0} if call == "log" else tmp_path)
    assert len(calls) == 2 and len(caught) == 1


def test_what_savers_fail_at_is_returned(tmp_path):
    (tmp_path / "file").write_text("")
    run = tracker(tmp_path, [dict(save_latest_to=f"{tmp_path}/{folder}/latest.pth") for folder in ("file", "good")])
    (failure,) = run.save(Trainer(1), is_best=False, is_latest=True)
    assert failure.startswith("LocalSaver could not save") and "file/latest.pth" in failure
    assert tracker(tmp_path / "2").save(Trainer(1), is_best=False, is_latest=True) == []


def test_a_first_checkpoint_that_fails_resumes_nothing_and_names_itself(tmp_path, monkeypatch):
    run = tracker(tmp_path, auto_resume=True)
    existed = []

    def save(self, path, **kwargs):
        existed.append(list(tmp_path.glob(".auto_resume.json.*/auto_resume.json")))  # its bytes are there before
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Trainer, "save", save)
    with pytest.raises(OSError, match=r"checkpoint\.pth could not be written: No space left on device$"):
        run.save(Trainer(1), is_best=False, is_latest=True)
    assert len(existed[0]) == 1 and not any(tmp_path.glob("*resume*")) and not any(tmp_path.glob(".*"))

"""Checkpoints that a tracker recalls: whose they are, where they come from, and runs that resume by themselves."""

import http.server
import os
import threading

import fsspec
import pytest
import torch

from fastprior.trackers import create_loader, read_metrics
from fastprior.trainer import DiffusionPriorTrainer
from helpers.priors import make_prior
from helpers.tracker_cases import Trainer, auto, checkpoint_bytes, names, tracker

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


def test_the_folder_of_a_download_that_was_killed_goes_with_the_next(tmp_path):
    Trainer(7).save(tmp_path / "x.pth")
    loader = create_loader("url", tmp_path / "run", url=f"file://{tmp_path}/x.pth")
    child = os.fork()
    if child == 0:
        loader.fetch = lambda folder: os._exit(0)
        loader.recall()
    os.waitpid(child, 0)
    assert len(list((tmp_path / "run").iterdir())) == 1
    assert loader.recall()["step"] == 7 and not any((tmp_path / "run").iterdir())


def test_a_local_file_is_loaded_where_nothing_can_be_written(tmp_path):
    Trainer(7).save(tmp_path / "x.pth")
    loader = create_loader("local", tmp_path / "run", file_path=str(tmp_path / "x.pth"))
    assert loader.recall()["step"] == 7 and not (tmp_path / "run").exists()

"""A trainer that only saves, trackers made as a config makes them, and what they wrote."""

from pathlib import Path
from types import SimpleNamespace

import torch

from fastprior.trackers import Tracker
from fastprior.train_configs import TrackerConfig
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


def auto(path, **changes) -> Tracker:
    """A tracker that resumes by itself what the last one left."""
    load = dict(load_from="local", file_path=str(path / "saved" / "latest.pth"), only_auto_resume=True)
    return tracker(path, **{"auto_resume": True, "load": load, **changes})


def step_of(path) -> int:
    return torch.load(path, weights_only=True)["step"]


def names(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


def checkpoint_bytes(tmp_path) -> bytes:
    Trainer(9).save(tmp_path / "source.pth")
    return (tmp_path / "source.pth").read_bytes()


WANDB = dict(log_type="wandb", wandb_entity="me", wandb_project="p")

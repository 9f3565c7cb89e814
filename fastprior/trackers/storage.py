"""Where the checkpoints of a run go to, and come from: local files, URLs, Weights & Biases, the Hugging Face hub."""

from __future__ import annotations

import os
import shutil
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fastprior.trackers.loggers import BaseLogger, Part, create_part, import_for, import_wandb
from fastprior.utils import atomic, remove_leftovers, temporary_folder
from fastprior.weight_files.safe import read_file

TIMEOUT_S = 60  # of one read from a server


def _token(path: str | None) -> str | None:
    """The token in a file; None, for that of the environment or of `hf auth login`, without one."""
    return None if path is None else Path(path).read_text(encoding="utf-8").strip()


# loaders


@dataclass(eq=False, kw_only=True)
class BaseLoader(Part):
    """Gets a checkpoint; with `only_auto_resume`, only in a run that goes on by itself after it was interrupted."""

    only_auto_resume: bool = False

    def init(self, logger: BaseLogger) -> None:
        """Fail here rather than in `recall`, where that can be known."""

    def available(self) -> bool:
        """False where there is certainly nothing to load."""
        return True

    def fetch(self, folder: Path) -> Path:
        """The checkpoint as a local file, in `folder` where it must be downloaded."""
        raise NotImplementedError

    def recall(self) -> dict:
        """What `DiffusionPriorTrainer.load` takes, on the CPU. Pickles are read as `fastprior.load` reads them."""
        self.data_path.mkdir(parents=True, exist_ok=True)
        with temporary_folder(self.data_path / "loaded") as folder:
            return dict(read_file(self.fetch(folder))[0])


@dataclass(eq=False, kw_only=True)
class LocalLoader(BaseLoader):
    file_path: str

    def init(self, logger: BaseLogger) -> None:
        if not self.only_auto_resume and not self.available():
            raise FileNotFoundError(f"file_path={self.file_path!r}; there is no such checkpoint to load")

    def available(self) -> bool:
        return Path(self.file_path).exists()

    def recall(self) -> dict:
        return dict(read_file(Path(self.file_path))[0])


@dataclass(eq=False, kw_only=True)
class UrlLoader(BaseLoader):
    """Downloads from http(s), or from what else fsspec knows: s3, gs, hdfs, ..."""

    url: str

    def __post_init__(self):
        super().__post_init__()
        if "://" not in self.url:
            raise ValueError(f"url={self.url!r}; it must have a scheme, such as https://")

    def fetch(self, folder: Path) -> Path:
        target = folder / "loaded_checkpoint.pth"
        with target.open("wb") as file:
            if self.url.startswith(("http://", "https://", "file://")):
                with urllib.request.urlopen(self.url, timeout=TIMEOUT_S) as source:
                    shutil.copyfileobj(source, file, 2**20)
                    wanted = source.headers.get("Content-Length")
                if wanted is not None and file.tell() != int(wanted):
                    raise OSError(f"url={self.url!r} ended after {file.tell()} of {wanted} bytes")
            else:
                fsspec = import_for(f"url={self.url!r}", "fsspec", "train")
                with fsspec.open(self.url, "rb") as source:
                    shutil.copyfileobj(source, file, 2**20)
        return target


@dataclass(eq=False, kw_only=True)
class WandbLoader(BaseLoader):
    """Loads a file of a run, by default of the run that is logged to."""

    wandb_file_path: str
    wandb_run_path: str | None = None

    def init(self, logger: BaseLogger) -> None:
        self.wandb = import_wandb("load_from 'wandb'")
        self.wandb_run_path = self.wandb_run_path or getattr(logger, "run_path", None)
        if self.wandb_run_path is None:
            raise ValueError("wandb_run_path=None; it must be given where no run of wandb goes on")

    def fetch(self, folder: Path) -> Path:
        file = self.wandb.restore(self.wandb_file_path, run_path=self.wandb_run_path, replace=True, root=str(folder))
        if file is None:
            raise FileNotFoundError(f"wandb_file_path={self.wandb_file_path!r}; {self.wandb_run_path} has no such file")
        file.close()
        return Path(file.name)


@dataclass(eq=False, kw_only=True)
class HuggingfaceLoader(BaseLoader):
    """Loads a file of a model repository on the Hugging Face hub; `token_path` is a file that holds a token."""

    huggingface_repo: str
    file_path: str
    revision: str | None = None
    token_path: str | None = None

    def fetch(self, folder: Path) -> Path:
        hub = import_for("load_from 'huggingface'", "huggingface_hub", "hub")
        options = dict(revision=self.revision, token=_token(self.token_path))
        return Path(hub.hf_hub_download(self.huggingface_repo, self.file_path, **options))


# savers


@dataclass(eq=False, kw_only=True)
class BaseSaver(Part):
    """Puts checkpoints somewhere.

    Attributes:
        save_latest_to, save_best_to: paths of the latest and of the best checkpoint, with placeholders such as {step},
            {epoch} and {samples_seen}; nothing is saved where they are not given, or false.
        save_meta_to: folder for the config.
        save_type: "checkpoint" (all that `DiffusionPriorTrainer.load` needs) or "model" (the weights to sample with; a
            path that ends in .safetensors gets a file of `fastprior.save`).
        save_latest, save_best: false turns these off.
        save_all, save_every: keep every, or each `save_every`-th, latest checkpoint, with its step in its name.
    """

    save_latest_to: str | bool | None = None
    save_best_to: str | bool | None = None
    save_meta_to: str | None = None
    save_type: str = "checkpoint"
    save_latest: bool = True
    save_best: bool = True
    save_all: bool = False
    save_every: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.save_type not in ("checkpoint", "model"):
            raise ValueError(f"save_type={self.save_type!r}; it must be 'checkpoint' or 'model'")
        for name in ("save_latest_to", "save_best_to"):
            path = getattr(self, name)
            if path is True or path == "":
                raise ValueError(f"{name}={path!r}; it must be a path, or false")
            if path and path.endswith(".safetensors") and self.save_type == "checkpoint":
                raise ValueError(f"{name}={path!r}; .safetensors is for save_type 'model'")
        self.saving_latest = bool(self.save_latest_to) and self.save_latest
        self.saving_best = bool(self.save_best_to) and self.save_best
        self.saving_meta = self.save_meta_to is not None
        if not (self.saving_latest or self.saving_best or self.saving_meta):
            raise ValueError("nothing would be saved; give at least one of save_latest_to, save_best_to, save_meta_to")
        if self.save_every is not None and self.save_every < 1:
            raise ValueError(f"save_every={self.save_every}; it must be at least 1")
        if (self.save_all or self.save_every) and not self.saving_latest:
            raise ValueError("save_all and save_every keep what goes to save_latest_to; it must be given")
        self.saved = 0

    def targets(self, is_best: bool, is_latest: bool, values: dict) -> Iterator[str]:
        """The paths to save to this time. Raises ValueError for a placeholder that has no value."""
        if is_latest and self.saving_latest:
            latest = _fill("save_latest_to", self.save_latest_to, values)
            yield latest
            self.saved += 1
            if self.save_all or (self.save_every and self.saved % self.save_every == 0):
                yield str(Path(latest).with_stem(f"{Path(latest).stem}_step{values['step']}"))
        if is_best and self.saving_best:
            yield _fill("save_best_to", self.save_best_to, values)

    def init(self, logger: BaseLogger) -> None:
        """Fail here rather than in `save_file`, where that can be known."""

    def save_file(self, local_path, save_path: str, **kwargs) -> None:
        raise NotImplementedError


def _fill(name: str, path: str, values: dict) -> str:
    try:
        return path.format(**values)
    except (KeyError, IndexError) as error:
        raise ValueError(f"{name}={path!r}; {error} has no value, of {', '.join(values)}") from None


@dataclass(eq=False)
class LocalSaver(BaseSaver):
    """Saves to local files, atomically; relative paths begin in the working directory."""

    def init(self, logger: BaseLogger) -> None:
        names = "checkpoint.pth", "model.pth", "model.safetensors", "auto_resume.json", "config.json"
        targets = filter(None, (self.save_latest_to, self.save_best_to))
        for path in (*(self.data_path / name for name in names), *targets):
            remove_leftovers(path)

    def save_file(self, local_path, save_path: str, **kwargs) -> None:
        Path(save_path).parent.mkdir(parents=True, exist_ok=True)
        with atomic(save_path) as temporary:
            temporary.unlink()
            try:  # files are replaced and never written over, so that one may have several names
                os.link(local_path, temporary)
            except OSError:
                shutil.copyfile(local_path, temporary)


@dataclass(eq=False, kw_only=True)
class WandbSaver(BaseSaver):
    """Saves to the run that is logged to, or to that of `wandb_run_path` (entity/project/id)."""

    wandb_run_path: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.wandb_run_path is not None and self.wandb_run_path.count("/") != 2:
            raise ValueError(f"wandb_run_path={self.wandb_run_path!r}; it must be entity/project/id")

    def init(self, logger: BaseLogger) -> None:
        wandb = import_wandb("save_to 'wandb'")
        self.run = wandb.run
        if self.run is None and self.wandb_run_path is None:
            raise ValueError("wandb_run_path=None; it must be given where the logger is not wandb's")
        if self.run is None:
            entity, project, run_id = self.wandb_run_path.split("/")
            self.run = wandb.init(entity=entity, project=project, id=run_id, resume="must")
        elif self.wandb_run_path not in (None, self.run.path):
            raise ValueError(f"wandb_run_path={self.wandb_run_path!r}; the run {self.run.path} is open in this process")

    def save_file(self, local_path, save_path: str, **kwargs) -> None:
        # wandb keeps the folders below base_path, and uploads later: the file must stay
        kept = self.data_path / "wandb_files" / save_path
        kept.parent.mkdir(parents=True, exist_ok=True)
        with atomic(kept) as temporary:
            shutil.copyfile(local_path, temporary)
        self.run.save(str(kept), base_path=str(self.data_path / "wandb_files"), policy="now")


@dataclass(eq=False, kw_only=True)
class HuggingfaceSaver(BaseSaver):
    """Saves to a model repository on the Hugging Face hub that exists; `token_path` is a file that holds a token."""

    huggingface_repo: str
    token_path: str | None = None

    def init(self, logger: BaseLogger) -> None:
        hub = import_for("save_to 'huggingface'", "huggingface_hub", "hub")
        self.api = hub.HfApi(token=_token(self.token_path))
        try:
            self.api.whoami()
            self.api.repo_info(self.huggingface_repo)
        except Exception as error:  # of the network, of authentication or of a missing repository
            rule = "it must exist, and you must be logged in (`hf auth login`, or token_path)"
            raise ValueError(f"huggingface_repo={self.huggingface_repo!r}; {rule}: {error}") from error

    def save_file(self, local_path, save_path: str, **kwargs) -> None:
        self.api.upload_file(
            path_or_fileobj=str(local_path), path_in_repo=str(save_path), repo_id=self.huggingface_repo
        )


# by name


LOADERS = {"local": LocalLoader, "url": UrlLoader, "wandb": WandbLoader, "huggingface": HuggingfaceLoader}
SAVERS = {"local": LocalSaver, "wandb": WandbSaver, "huggingface": HuggingfaceSaver}


def create_loader(loader_type: str, data_path, **options) -> BaseLoader:
    """A loader: "local", "url", "wandb" or "huggingface". Raises ValueError naming an option that does not fit."""
    return create_part("load_from", LOADERS, loader_type, data_path, options)


def create_saver(saver_type: str, data_path, **options) -> BaseSaver:
    """A saver: "local", "wandb" or "huggingface". Raises ValueError naming an option that does not fit."""
    return create_part("save_to", SAVERS, saver_type, data_path, options)

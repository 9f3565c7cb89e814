"""What a run logs to: the console, Weights & Biases, TensorBoard."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from itertools import chain, repeat
from pathlib import Path
from typing import Any, get_type_hints

from tqdm.auto import tqdm

from fastprior.trackers.table import Table
from fastprior.utils import import_or_print_error, nearest

HIDDEN = "<hidden>"
_SECRET_KEY = re.compile(r"(?:^|_)(?:token|secret|password|passwd|api_?key|access_?key|credentials?)$", re.IGNORECASE)
_SECRET_IN_URL = re.compile(
    r"(?<=://)[^/@\s]+(?=@)|(?<=[?&])([\w.-]*(?:token|signature|secret|key|password)[\w.-]*=)[^&\s]+", re.IGNORECASE
)


def without_secrets(config: Any) -> Any:
    """A copy of a config (dicts, lists and plain values) in which tokens, passwords and keys are hidden."""
    if isinstance(config, Mapping):
        secret = {key for key, value in config.items() if _SECRET_KEY.search(str(key)) and isinstance(value, str)}
        return {key: HIDDEN if key in secret else without_secrets(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [without_secrets(value) for value in config]
    if isinstance(config, str):
        return _SECRET_IN_URL.sub(lambda match: f"{match[1] or ''}{HIDDEN}", config)
    return config


def to_json(value: Any) -> Any:
    """A JSON value: tensors and arrays of one element become numbers, and what is not finite becomes None."""
    if hasattr(value, "item") and getattr(value, "size", None) is not None:
        value = value.item() if math.prod(value.shape) == 1 else value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


def import_for(option: str, package: str, extra: str):
    """Import a package that an option needs. Raises ImportError naming the extra that installs it."""
    return import_or_print_error(package, f'{option} needs {package}: pip install "fastprior[{extra}]"')


def import_wandb(option: str):
    os.environ.setdefault("WANDB_SILENT", "true")
    return import_for(option, "wandb", "wandb")


@dataclass(eq=False)
class Part:
    """A logger, saver or loader: its fields are its options."""

    data_path: str | os.PathLike

    def __post_init__(self):
        hints = get_type_hints(type(self))
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, hints[field.name]):
                raise ValueError(f"{field.name}={value!r}; it must be of type {field.type}")
        self.data_path = Path(self.data_path)


def create_part(key: str, parts: Mapping[str, type[Part]], name: str, data_path, options: Mapping[str, Any]):
    """The part of a name; `key` is that of the config which chose it. Raises ValueError naming what does not fit."""
    if name not in parts:
        raise ValueError(f"{key}={name!r}; {nearest(name, parts)}")
    known = {field.name: field for field in fields(parts[name]) if field.name != "data_path"}
    anywhere = {field.name for part in parts.values() for field in fields(part)}
    for option in options:
        if option not in known and option not in anywhere:
            raise ValueError(f"unknown key {option!r} with {key}={name!r}, {nearest(option, known)}")
        if option not in known:
            warnings.warn(f"{option!r} means nothing with {key}={name!r}, and is ignored")
    required = [option for option, field in known.items() if field.default is MISSING]
    if missing := [option for option in required if options.get(option) is None]:
        raise ValueError(f"{key}={name!r} needs {' and '.join(map(repr, missing))}")
    return parts[name](data_path, **{option: value for option, value in options.items() if option in known})


@dataclass(eq=False, kw_only=True)
class BaseLogger(Part):
    """Takes what a run logs.

    Attributes:
        resume: go on in the run that the other options name.
        auto_resume: go on in the run that last saved a checkpoint with this `data_path`, if there is one.
        verbose: print as well.
    """

    resume: bool = False
    auto_resume: bool = False
    verbose: bool = False

    def __post_init__(self):
        super().__post_init__()
        self._table = Table()

    def init(self, full_config, extra_config: dict) -> None:
        """Begin: `full_config` is the config of the run, a pydantic model or a dict."""

    def log(self, log: dict, step: int | None = None, **kwargs) -> None:
        if self.verbose:
            tqdm.write("\n".join(self._table.lines(log, step)))  # above a bar, if there is one

    def log_images(self, images, captions: Iterable[str] = (), image_section="images", step=None, **kwargs) -> None:
        """Images (channels, height, width) in 0..1."""

    def log_file(self, file_path, base_path=None, **kwargs) -> None: ...

    def log_error(self, error_string: str, step: int | None = None, **kwargs) -> None:
        print(error_string)

    def get_resume_data(self) -> dict:
        """JSON values that `set_resume_data` takes, to go on in this run later."""
        return {}

    def set_resume_data(self, data: dict) -> None:
        self.resume = True


@dataclass(eq=False)
class ConsoleLogger(BaseLogger):
    """Prints, whether `verbose` or not."""

    def __post_init__(self):
        super().__post_init__()
        self.verbose = True


@dataclass(eq=False, kw_only=True)
class WandbLogger(BaseLogger):
    """Logs to a run of Weights & Biases; `wandb_resume` is an old name of `resume`."""

    wandb_entity: str
    wandb_project: str
    wandb_run_id: str | None = None
    wandb_run_name: str | None = None
    wandb_resume: bool = False

    def __post_init__(self):
        super().__post_init__()
        self.resume = self.resume or self.wandb_resume
        if self.resume and self.wandb_run_id is None:
            raise ValueError("wandb_run_id=None; it must name the run that resume=True goes on in")

    @property
    def run_path(self) -> str | None:
        """Entity, project and id of the run, where it has one."""
        return self.wandb_run_id and f"{self.wandb_entity}/{self.wandb_project}/{self.wandb_run_id}"

    def init(self, full_config, extra_config: dict) -> None:
        self.wandb = import_wandb("log_type 'wandb'")
        config = full_config.model_dump() if hasattr(full_config, "model_dump") else dict(full_config)
        options = dict(entity=self.wandb_entity, project=self.wandb_project, name=self.wandb_run_name)
        if self.resume:
            options.update(resume="must", id=self.wandb_run_id)
        self.run = self.wandb.init(config={**without_secrets(config), **extra_config}, **options)
        self.wandb_run_id = self.run.id

    def log(self, log: dict, step: int | None = None, **kwargs) -> None:
        super().log(log, step)
        self.run.log(log, step=step, **kwargs)

    def log_images(self, images, captions=(), image_section="images", step=None, **kwargs) -> None:
        logged = [
            self.wandb.Image(image, caption=caption) for image, caption in zip(images, chain(captions, repeat(None)))
        ]
        self.run.log({image_section: logged}, step=step, **kwargs)

    def log_file(self, file_path, base_path=None, **kwargs) -> None:
        self.run.save(str(file_path), base_path=str(base_path or Path(file_path).parent))

    def log_error(self, error_string: str, step: int | None = None, **kwargs) -> None:
        super().log_error(error_string)
        self.run.log({"error": error_string}, step=step)

    def get_resume_data(self) -> dict:
        return {"entity": self.wandb_entity, "project": self.wandb_project, "run_id": self.wandb_run_id}

    def set_resume_data(self, data: dict) -> None:
        self.wandb_entity, self.wandb_project, self.wandb_run_id = data["entity"], data["project"], data["run_id"]
        super().set_resume_data(data)


@dataclass(eq=False, kw_only=True)
class TensorboardLogger(BaseLogger):
    """Writes TensorBoard events to `tensorboard_path`, by default the folder `tensorboard` in `data_path`."""

    tensorboard_path: str | None = None

    def init(self, full_config, extra_config: dict) -> None:
        import_for("log_type 'tensorboard'", "tensorboard", "tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(self.tensorboard_path or str(self.data_path / "tensorboard"))

    def log(self, log: dict, step: int | None = None, **kwargs) -> None:
        super().log(log, step)
        for name, value in log.items():
            if isinstance(value := to_json(value), (bool, int, float)):
                self.writer.add_scalar(name, value, step)

    def log_images(self, images, captions=(), image_section="images", step=None, **kwargs) -> None:
        for index, (image, caption) in enumerate(zip(images, chain(captions, repeat("")))):
            self.writer.add_image(f"{image_section}/{index} {caption}".rstrip(), image, step)

    def log_error(self, error_string: str, step: int | None = None, **kwargs) -> None:
        super().log_error(error_string)
        self.writer.add_text("error", error_string, step)


LOGGERS = {"console": ConsoleLogger, "wandb": WandbLogger, "tensorboard": TensorboardLogger}


def create_logger(logger_type: str, data_path, **options) -> BaseLogger:
    """A logger: "console", "wandb" or "tensorboard". Raises ValueError naming an option that does not fit."""
    return create_part("log_type", LOGGERS, logger_type, data_path, options)

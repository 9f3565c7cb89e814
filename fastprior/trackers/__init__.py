"""Logging, saving and loading of a training: `Tracker` and its parts, under DALLE2-pytorch's names."""

from fastprior.trackers.loggers import BaseLogger, ConsoleLogger, TensorboardLogger, WandbLogger, create_logger
from fastprior.trackers.storage import (
    BaseLoader,
    BaseSaver,
    HuggingfaceLoader,
    HuggingfaceSaver,
    LocalLoader,
    LocalSaver,
    UrlLoader,
    WandbLoader,
    WandbSaver,
    create_loader,
    create_saver,
)
from fastprior.trackers.tracker import Tracker, read_metrics

__all__ = [
    "BaseLoader",
    "BaseLogger",
    "BaseSaver",
    "ConsoleLogger",
    "HuggingfaceLoader",
    "HuggingfaceSaver",
    "LocalLoader",
    "LocalSaver",
    "TensorboardLogger",
    "Tracker",
    "UrlLoader",
    "WandbLoader",
    "WandbLogger",
    "WandbSaver",
    "create_loader",
    "create_logger",
    "create_saver",
    "read_metrics",
]

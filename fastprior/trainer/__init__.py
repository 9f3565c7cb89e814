"""Training of a prior: `DiffusionPriorTrainer`, with DALLE2-pytorch's calls and checkpoints."""

try:
    import accelerate  # noqa: F401
except ImportError as error:
    raise ImportError('accelerate is not installed: pip install "fastprior[train]"') from error

from fastprior.batches import prior_sample_in_chunks, split_args_and_kwargs
from fastprior.trainer.ema import EMA
from fastprior.trainer.trainer import DiffusionPriorTrainer, TrainingDiverged

__all__ = ["EMA", "DiffusionPriorTrainer", "TrainingDiverged", "prior_sample_in_chunks", "split_args_and_kwargs"]

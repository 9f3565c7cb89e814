"""Fast, exact diffusion priors: CLIP text embeddings to CLIP image embeddings."""

from fastprior.clip import BaseClipAdapter, CoCaAdapter, OpenAIClipAdapter, OpenClipAdapter, XClipAdapter
from fastprior.network import DiffusionPriorNetwork
from fastprior.prior import DiffusionPrior
from fastprior.sampler import SamplingPlan
from fastprior.schedule import NoiseScheduler
from fastprior.version import __version__

__all__ = [
    "DiffusionPrior",
    "DiffusionPriorNetwork",
    "NoiseScheduler",
    "SamplingPlan",
    "BaseClipAdapter",
    "CoCaAdapter",
    "OpenAIClipAdapter",
    "OpenClipAdapter",
    "XClipAdapter",
    "__version__",
]

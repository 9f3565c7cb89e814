"""Fast, exact diffusion priors: CLIP text embeddings to CLIP image embeddings."""

import importlib
import importlib.util
from typing import TYPE_CHECKING

from fastprior.peer import PACKAGE_NAMES, peer_attribute, stand_in
from fastprior.version import __version__

if TYPE_CHECKING:
    from fastprior.checkpoints import convert, load, save
    from fastprior.clip import BaseClipAdapter, CoCaAdapter, OpenAIClipAdapter, OpenClipAdapter, XClipAdapter
    from fastprior.diffusion.schedule import NoiseScheduler
    from fastprior.models.dalle2.network import DiffusionPriorNetwork
    from fastprior.models.weight_lock import weights_locked
    from fastprior.pipelines.pipeline_quality import pipeline_quality
    from fastprior.pipelines.prior_pipeline import PriorPipeline
    from fastprior.pipelines.shap_e import ShapEPrior
    from fastprior.prior.diffusion_prior import DiffusionPrior
    from fastprior.prior.plan import SamplingPlan
    from fastprior.prior.sampling_quality import sampling_quality
    from fastprior.prior.tuning import tune
    from fastprior.serving import PriorSampler, StepEngine

__all__ = [
    "DiffusionPrior", "DiffusionPriorNetwork", "NoiseScheduler", "SamplingPlan",
    "BaseClipAdapter", "CoCaAdapter", "OpenAIClipAdapter", "OpenClipAdapter", "XClipAdapter",
    "PriorPipeline", "PriorSampler", "ShapEPrior", "StepEngine", "convert", "load", "pipeline_quality",
    "sampling_quality", "save", "tune", "weights_locked", "__version__",
]  # fmt: skip

_MODULES = {  # that names come from, imported when the first of them is asked for: torch alone takes seconds
    "checkpoints": ("convert", "load", "save"),
    "clip": ("BaseClipAdapter", "CoCaAdapter", "OpenAIClipAdapter", "OpenClipAdapter", "XClipAdapter"),
    "diffusion.schedule": ("NoiseScheduler",),
    "models.dalle2.network": ("DiffusionPriorNetwork",),
    "models.weight_lock": ("weights_locked",),
    # `ModelMixin` is how diffusers knows that its pipelines can save and load our prior
    "models.prior_transformer.in_diffusers": ("ModelMixin", "PriorTransformer", "accelerate_prior"),
    "pipelines.pipeline_quality": ("pipeline_quality",),
    "pipelines.prior_pipeline": ("PriorPipeline",),
    "pipelines.shap_e": ("ShapEPrior",),
    "prior.diffusion_prior": ("DiffusionPrior",),
    "prior.plan": ("SamplingPlan",),
    "prior.sampling_quality": ("sampling_quality",),
    "prior.tuning": ("tune",),
    "serving": ("PriorSampler", "StepEngine"),
    "trainer": ("DiffusionPriorTrainer",),
}
_LATER = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name):
    if name in _LATER:
        try:
            value = getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
        except ImportError as error:  # of an extra: clients may name what they never use
            return stand_in(name, str(error))
        globals()[name] = value
        return value
    if name in PACKAGE_NAMES:  # Decoder, Unet, …: the installed peer's, or a stand-in that raises ImportError on use
        return peer_attribute(PACKAGE_NAMES[name], name)
    if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *_LATER, *PACKAGE_NAMES})

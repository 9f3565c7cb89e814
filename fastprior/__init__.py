"""Fast, exact diffusion priors: CLIP text embeddings to CLIP image embeddings."""

import importlib

from fastprior.clip import BaseClipAdapter, CoCaAdapter, OpenAIClipAdapter, OpenClipAdapter, XClipAdapter
from fastprior.diffusion.schedule import NoiseScheduler
from fastprior.models.dalle2.network import DiffusionPriorNetwork
from fastprior.peer import PACKAGE_NAMES, peer_attribute, stand_in
from fastprior.prior.diffusion_prior import DiffusionPrior
from fastprior.prior.plan import SamplingPlan
from fastprior.version import __version__

__all__ = [
    "DiffusionPrior", "DiffusionPriorNetwork", "NoiseScheduler", "SamplingPlan",
    "BaseClipAdapter", "CoCaAdapter", "OpenAIClipAdapter", "OpenClipAdapter", "XClipAdapter",
    "PriorPipeline", "PriorSampler", "ShapEPrior", "convert", "load", "save", "__version__",
]  # fmt: skip

_LATER = {  # imported when first asked for, so that `import fastprior` stays light
    "DiffusionPriorTrainer": "trainer",
    # by which diffusers knows that its pipelines can save and load our prior
    "ModelMixin": "models.prior_transformer.in_diffusers",
    "PriorPipeline": "pipelines.prior_pipeline",
    "PriorSampler": "serving",
    "PriorTransformer": "models.prior_transformer.in_diffusers",
    "ShapEPrior": "pipelines.shap_e",
    "accelerate_prior": "models.prior_transformer.in_diffusers",
    "convert": "checkpoints",
    "load": "checkpoints",
    "save": "checkpoints",
}


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
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

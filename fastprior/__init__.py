"""Fast, exact diffusion priors: CLIP text embeddings to CLIP image embeddings."""

import importlib

from fastprior.clip import BaseClipAdapter, CoCaAdapter, OpenAIClipAdapter, OpenClipAdapter, XClipAdapter
from fastprior.diffusion.schedule import NoiseScheduler
from fastprior.models.dalle2.network import DiffusionPriorNetwork
from fastprior.prior.diffusion_prior import DiffusionPrior
from fastprior.prior.plan import SamplingPlan
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
    "PriorPipeline",
    "PriorSampler",
    "ShapEPrior",
    "convert",
    "load",
    "save",
    "__version__",
]

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
# part of dalle2-pytorch, and not replaced here: the installed one's, or a stand-in that raises ImportError on use
_PEER = ("CLIP", "DALLE2", "Decoder", "DecoderTrainer", "Unet", "VQGanVAE")


def __getattr__(name):
    if name in _LATER:
        try:
            value = getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
        except ImportError as error:  # of an extra: clients may name what they never use
            from fastprior import peer

            return peer.stand_in(name, str(error))
        globals()[name] = value
        return value
    if name in _PEER:
        from fastprior import peer

        return peer.peer_attribute(peer.PACKAGE_NAMES[name], name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

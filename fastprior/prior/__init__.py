"""The diffusion prior: its plan, its loop, and what users call."""

from fastprior.prior.diffusion_prior import DiffusionPrior

__all__ = ["DiffusionPrior"]

"""Sampling at low latency."""

from fastprior.serving.prior_sampler import PriorSampler

__all__ = ["PriorSampler"]

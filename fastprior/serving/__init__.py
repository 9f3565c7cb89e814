"""Sampling at low latency."""

from fastprior.serving.prior_sampler import PriorSampler
from fastprior.serving.step_engine import StepEngine

__all__ = ["PriorSampler", "StepEngine"]

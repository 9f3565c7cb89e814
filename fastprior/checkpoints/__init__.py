"""Files to priors, and priors to files."""

from fastprior.checkpoints.conversion import convert
from fastprior.checkpoints.dalle2 import load, save, save_peer

__all__ = ["convert", "load", "save", "save_peer"]

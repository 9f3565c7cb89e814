"""Clients of dalle2-pytorch on fastprior, unmodified: see `installation`."""

from fastprior.dropin.installation import install, installed, is_installed, main, uninstall

__all__ = ["install", "installed", "is_installed", "main", "uninstall"]

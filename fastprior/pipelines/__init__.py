"""Pipelines from the folders of diffusers, without it."""

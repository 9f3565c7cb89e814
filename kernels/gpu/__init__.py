"""Triton kernels, their launchers, and how they are compiled where there is no GPU."""

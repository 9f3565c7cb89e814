"""Checkpoints of one format to another."""

from __future__ import annotations

import os
from pathlib import Path

from fastprior.checkpoints.contents import LoadReport
from fastprior.checkpoints.dalle2 import load, save, save_peer


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    overwrite: bool = False,
    clip_stats: str | os.PathLike | None = None,
    **load_kwargs,
) -> LoadReport:
    """Load a file and save it as what target's suffix says: .safetensors by `save`, .pt or .pth by `save_peer`.

    Any other target is the folder of a PriorTransformer (Kandinsky, Karlo), see `checkpoints.prior_transformer`.

    Args:
        overwrite: replace an existing target; FileExistsError otherwise.
        clip_stats: for a PriorTransformer, the file with the mean and standard deviation of image embeddings.
        **load_kwargs: see `load`.
    """
    if Path(target).suffix not in (".safetensors", ".pt", ".pth"):
        from fastprior.checkpoints import prior_transformer as convert_prior

        return convert_prior.convert(source, target, overwrite=overwrite, clip_stats=clip_stats, **load_kwargs)
    if clip_stats is not None:
        raise ValueError(
            f"clip_stats={os.fspath(clip_stats)!r}; it goes with the folder of a PriorTransformer as target"
        )
    if Path(target).exists() and not overwrite:
        raise FileExistsError(f"{target} exists; overwrite=True replaces it")
    prior = load(source, **load_kwargs)
    if Path(target).suffix == ".safetensors":
        save(prior, target, metadata=prior.load_report.metadata)
    else:
        save_peer(prior, target)
    return prior.load_report

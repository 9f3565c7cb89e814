"""Checkpoints of one format to another."""

from __future__ import annotations

import os
from pathlib import Path

from fastprior.checkpoints import dalle2, prior_transformer
from fastprior.checkpoints.contents import LoadReport

SUFFIXES = ".safetensors", ".pt", ".pth"
OTHER_SUFFIXES = ".bin", ".ckpt", ".gguf", ".json", ".npy", ".npz", ".onnx", ".pickle", ".pkl", ".pt2", ".th", ".zip"


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    overwrite: bool = False,
    clip_stats: str | os.PathLike | None = None,
    version: str | None = None,
    **load_kwargs,
) -> LoadReport:
    """Load a file and save it as what target's suffix says: .safetensors by `save`, .pt or .pth by `save_peer`.

    Any other target is the folder of a PriorTransformer (Kandinsky, Karlo), which its `from_pretrained` reads, here and
    in diffusers.

    Args:
        overwrite: replace an existing target, or the files of a folder; FileExistsError otherwise.
        clip_stats: for a PriorTransformer, the file with the mean and standard deviation of image embeddings.
        version: the release of dalle2-pytorch that trained the weights; not for a PriorTransformer.
        **load_kwargs: `config` and `weights`, for a file or a folder as target: see `load` and
            `checkpoints.prior_transformer.load`; the other arguments of `load` for a file.
    """
    path = Path(target)
    is_folder = path.suffix not in SUFFIXES
    if is_folder and version is not None:
        raise ValueError(f"version={version!r}; it is for priors of dalle2-pytorch")
    if not is_folder and clip_stats is not None:
        raise ValueError(
            f"clip_stats={os.fspath(clip_stats)!r}; it goes with the folder of a PriorTransformer as target"
        )
    if is_folder and path.is_file():
        raise FileExistsError(f"{path} is a file; it must be a folder")
    if path.suffix in OTHER_SUFFIXES and not path.is_dir():
        raise ValueError(f"target={str(path)!r}; it must end in .safetensors, .pt or .pth, or be the name of a folder")
    if path.exists() and not overwrite and not (is_folder and not any(path.iterdir())):
        raise FileExistsError(f"{path} exists; overwrite=True replaces it")
    if is_folder:
        prior, report = prior_transformer.load(source, clip_stats=clip_stats, **load_kwargs)
        prior.save_pretrained(path)
        return report
    prior = dalle2.load(source, version=version, **load_kwargs)
    if path.suffix == ".safetensors":
        dalle2.save(prior, path, metadata=prior.load_report.metadata)
    else:
        dalle2.save_peer(prior, path)
        if prior.learned_tables:
            prior.load_report.notes.append("its learned tables were left out: dalle2-pytorch has none")
    return prior.load_report

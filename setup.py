"""Packaging. The Triton kernels live in the top-level folder `kernels/` and are installed as `fastprior.kernels`.

A top-level importable package named `kernels` would shadow the one of that name on PyPI, so the folder has no
`__init__.py`; the package's own is `fastprior/kernels/__init__.py`, which finds the modules in a checkout.
"""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
version = {}
exec((ROOT / "fastprior" / "version.py").read_text(), version)

CLIP = ["open-clip-torch>=2.24"]
DATA = ["embedding-reader>=1.5", "pandas>=2", "pyarrow>=14", "fsspec"]
PLOT = ["matplotlib>=3.7"]
QUICKSTART = [*DATA, *PLOT, "accelerate>=1.0", "scikit-learn>=1.3"]
TRAIN = [*DATA, *PLOT, "accelerate>=1.0", "pydantic>=2"]
# the peers that parity is tested against; dalle2-pytorch 1.15.6 imports pkg_resources, so it needs an older setuptools;
# from 70.1 on it builds wheels by itself
INTEROP = ["dalle2-pytorch==1.15.6", "setuptools>=70.1,<81"]
DIFFUSERS = ["diffusers>=0.42", "transformers>=4.40", "pillow"]
SERVE = ["fastapi>=0.110", "uvicorn>=0.29", "prometheus-client>=0.20", "orjson>=3.9"]
ONNX = ["onnx>=1.18", "onnxscript>=0.5.4"]
TEST = [
    *CLIP,
    *QUICKSTART,
    *TRAIN,
    *INTEROP,
    *DIFFUSERS,
    *ONNX,
    *SERVE,
    "httpx>=0.27",
    "openai>=1.40",
    "schemathesis>=4",
    "onnxruntime>=1.22",
    "peft>=0.17",
    "pytest>=8.2",
    "pytest-benchmark>=4",
    "pytest-xdist>=3.6",
    "hypothesis>=6",
    "ruff>=0.6",
]

setup(
    name="fastprior",
    version=version["__version__"],
    description="Fast, exact diffusion priors: CLIP text embeddings to CLIP image embeddings",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=[*find_packages(include=["fastprior", "fastprior.*"]), "fastprior.kernels.cpu", "fastprior.kernels.gpu"],
    package_dir={"fastprior": "fastprior", "fastprior.kernels": "kernels"},
    package_data={
        "fastprior": ["kernels/__init__.py", "server/page.html"],
        "fastprior.kernels.cpu": ["c/*.c", "c/*.h"],
    },
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "einops>=0.7",
        "numpy",
        "safetensors>=0.4",
        "tqdm>=4.60",
    ],
    extras_require={
        "clip": CLIP,
        "train": TRAIN,
        "quickstart": QUICKSTART,
        "wandb": ["wandb"],
        "tensorboard": ["tensorboard"],
        "onnx": ONNX,
        "serve": SERVE,
        "hub": ["huggingface_hub>=0.20"],
        "ray": ["ray[serve]>=2.40"],
        "deepspeed": ["deepspeed>=0.19"],
        "diffusers": DIFFUSERS,
        "interop": INTEROP,
        "test": TEST,
        "bench": [*INTEROP, *DIFFUSERS, "pytest>=8.2", "pytest-benchmark>=4"],
        "xformers": ["xformers"],
    },
    entry_points={"console_scripts": ["fastprior=fastprior.cli.command_line:main"]},
)

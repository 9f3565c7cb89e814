#!/usr/bin/env bash
# Prepare benchmarks/gpu_proof.sh for a machine that has a GPU and no package index: benchmarks/gpu_prepare.sh
#
# Run where there is an index; needs no GPU. Makes, in the folder .gpu/ of this checkout, which git ignores:
#
#   wheels/        dalle2-pytorch, diffusers, and what they import besides PyTorch, torchvision, accelerate, transformers,
#                  einops and other common packages: for Python 3.12 and x86-64
#   triton.tar.xz  all kernels that the proof launches, compiled for CAPABILITY (90, for 9.0) under the keys of real
#                  launches, and the C that launches them
#
# Kernels are found by the same Triton, for the same version of Python, and the same lines of kernels/ only. Triton's
# library differs between versions of Python, so this runs in an environment of PYTHON (python3.12) with TORCH (2.11.0)
# and TRITON (3.6.0): VENV=FOLDER takes one that is there, or says where to make it. All is kept in
# ~/.cache/fastprior/gpu-prepare, so that what was stopped goes on. Then copy the checkout with .gpu/ to that machine:
#
#   OUT=/tmp/out benchmarks/gpu_proof.sh 1 2    # 6 minutes
#   OUT=/tmp/out benchmarks/gpu_proof.sh 3      # 5 minutes, after a look at the first
set -euo pipefail
cd "$(dirname "$0")/.."
kept=${XDG_CACHE_HOME:-$HOME/.cache}/fastprior/gpu-prepare
VENV=${VENV:-$kept/venv}
target=.gpu
packages=(
    dalle2-pytorch==1.15.6 diffusers==0.42.1
    coca-pytorch einx ema-pytorch frozendict ftfy importlib-metadata kornia kornia-rs loguru pytorch-warmup
    resize-right rotary-embedding-torch torch-einops-utils vector-quantize-pytorch wcwidth x-clip
)

if [ ! -x "$VENV/bin/python" ]; then
    "${PYTHON:-python3.12}" -m venv "$VENV"
fi
if ! "$VENV/bin/python" -c 'import torch, triton, pytest, pytest_benchmark, einops, safetensors, tqdm' 2>/dev/null; then
    "$VENV/bin/pip" install -q "torch==${TORCH:-2.11.0}" "triton==${TRITON:-3.6.0}" \
        numpy einops safetensors tqdm pytest pytest-benchmark
fi
version=$("$VENV/bin/python" -c 'import platform; print(".".join(platform.python_version_tuple()[:2]))')
[ "$version" = 3.12 ] || echo "$VENV has Python $version: a machine with another finds none of these kernels"

mkdir -p "$target/wheels"
platforms=()
for name in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do
    platforms+=(--platform "${name}_x86_64")
done
"$VENV/bin/pip" download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]}" \
    -d "$target/wheels" "${packages[@]}" || { echo "the wheels are not complete" >&2; exit 1; }
echo "$target/wheels: $(ls "$target/wheels" | wc -l) wheels, $(du -sh "$target/wheels" | cut -f 1)"

export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
"$VENV/bin/python" benchmarks/proof/prepare.py "$kept/triton" "$target/triton.tar.xz" "${CAPABILITY:-90}"
echo "$target: $(du -sh "$target" | cut -f 1); on a machine with a GPU benchmarks/gpu_proof.sh takes it from there"

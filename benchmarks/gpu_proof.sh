#!/usr/bin/env bash
# Everything that claims a GPU, run on one, in three stages: benchmarks/gpu_proof.sh [STAGE]...
#
#   1  results: every kernel and every path of the models against the reference, each in a process of its own (2 minutes)
#   2  speed: whole runs in bf16 beside their goals, and beside the peers, eager and compiled (4 minutes)
#   3  why: profiles, the grid barrier, other configurations of linears, hardware counters, training (5 minutes)
#
# All by default; --plan lists the items and their times. These are planned for an H200 and 16 cores, and were not measured
# yet; PATIENCE=5 gives five times as many seconds. Needs PyTorch, Triton, pytest and pytest-benchmark, and no network;
# where dalle2-pytorch, diffusers, compute-sanitizer or ncu is not there, what needs it is skipped, and said so. Changes no
# setting of the card.
#
# Logs, archives and records go to the folder OUT, by default a new one under gpu-proof/. A stage's log is written as it
# runs, its archive when it ends, also when it is stopped. records.jsonl holds lines as benchmarks/records/ does.
#
# Kernels that benchmarks/gpu_prepare.sh compiled elsewhere are taken from .gpu/; without them they are compiled first,
# which takes minutes. DEVICE=cpu tries the same without a GPU, in minutes: tiny models, kernels in Triton's interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -u benchmarks/proof/run.py "$@"

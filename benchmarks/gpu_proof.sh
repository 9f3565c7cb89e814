#!/usr/bin/env bash
# Tests on the GPU, then every benchmark with its records: benchmarks/gpu_proof.sh [tests|benchmarks]...
# Needs an NVIDIA GPU and the packages of the `test` extra. Records go to benchmarks/records/<card>.jsonl.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
card=$("$python" -c 'import re, torch; print(re.sub(r"\W+", "-", torch.cuda.get_device_name()).strip("-").lower())') || exit
status=0
for section in ${*:-tests benchmarks}; do
    case $section in
        tests) "$python" -m pytest tests/test_device.py tests/test_parity.py tests/test_sampler.py ;;
        benchmarks) "$python" -m pytest benchmarks --benchmark-only --device cuda --record "benchmarks/records/$card.jsonl" ;;
        *) echo "unknown section: $section (tests, benchmarks)" >&2; false ;;
    esac || status=1 # a failure in one section does not lose the others
done
exit $status

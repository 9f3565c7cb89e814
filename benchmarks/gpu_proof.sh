#!/usr/bin/env bash
# Everything that claims a GPU, run on one: benchmarks/gpu_proof.sh [SECTION]...
#
#   environment  the card, driver and versions; its copy and read bandwidth and its bf16 peak, measured
#   kernels      every kernel against its reference, on the device, in fp32, fp16 and bf16
#   sanitizer    a few of these under compute-sanitizer (memcheck, racecheck), where it is installed
#   models       priors on the device against the CPU and against themselves, every path
#   kernel-benchmarks, sampling-benchmarks, compiled-peer-benchmarks, prior-stage-benchmarks, training-benchmarks
#                with baselines and goals
#   profile      time and launches of each kernel in a step of each model
#   roofline     a picture of all records
#   sweep        other launch configurations of every kernel beside the chosen ones; only where named, and with more
#                SECTION_SECONDS, for it takes most of an hour
#
# All but the last by default. Needs the packages of the `test` extra and no network. Records go to
# benchmarks/records/<card>.jsonl as they are made, logs to a temporary folder. A section that fails, or is stopped after
# SECTION_SECONDS (600), does not stop the others; a summary with every goal that was missed comes last.
#
# DEVICE=cpu tries the same without a GPU, in minutes: kernels in Triton's interpreter, a few tests of each file,
# benchmarks with --quick (see conftest.py), no profile unless named, records beside the logs.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
limit=(timeout --signal=INT --kill-after=10 "${SECTION_SECONDS:-600}")
logs=$(mktemp -d)
few="strides or layouts or deterministic or equal_bits or reused"
default=(environment kernels sanitizer models kernel-benchmarks sampling-benchmarks compiled-peer-benchmarks
    prior-stage-benchmarks training-benchmarks)
if [ "$device" = cuda ]; then
    card=$("$python" -c 'import re, torch; print(re.sub(r"\W+", "-", torch.cuda.get_device_name()).strip("-").lower())') || exit
    records=benchmarks/records/$card.jsonl picture=benchmarks/records/roofline-$card.png
    quick=() of_kernels=() of_models=()
    default+=(profile)
else
    export TRITON_INTERPRET=1
    records=$logs/records.jsonl picture=$logs/roofline.png
    quick=(--quick) of_kernels=(-k "$few") of_models=(-k "launches or 16_bits or replaced")
fi
default+=(roofline)
test=("${limit[@]}" "$python" -m pytest -q)
bench=("${test[@]}" -s --benchmark-only --device "$device" --record "$records" "${quick[@]}")

section() {
    case $1 in
        environment) "${bench[@]}" benchmarks/test_environment.py ;;
        kernels) "${test[@]}" "${of_kernels[@]}" tests/test_kernel_*.py ;;
        sanitizer)
            command -v compute-sanitizer || { echo "compute-sanitizer is not installed: skipped"; return 0; }
            [ "$device" = cuda ] || { echo "compute-sanitizer needs a GPU: skipped"; return 0; }
            for tool in memcheck racecheck; do
                "${limit[@]}" compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
                    "$python" -m pytest -q -x -k "$few" tests/test_kernel_*.py || return
            done ;;
        models)
            if [ "$device" = cuda ]; then
                "${test[@]}" tests/test_device.py tests/test_models_on_kernels.py tests/test_parity.py tests/test_sampler.py
            else
                "${test[@]}" "${of_models[@]}" tests/test_device.py tests/test_models_on_kernels.py
            fi ;;
        kernel-benchmarks) "${bench[@]}" benchmarks/test_kernels.py benchmarks/test_barrier.py ;;
        sampling-benchmarks) "${bench[@]}" -k "not compiled_peer" benchmarks/test_sampling.py ;;
        compiled-peer-benchmarks) "${bench[@]}" -k compiled_peer benchmarks/test_sampling.py benchmarks/test_prior_transformer.py ;;
        prior-stage-benchmarks) "${bench[@]}" -k "not compiled_peer" benchmarks/test_prior_transformer.py ;;
        training-benchmarks) "${bench[@]}" benchmarks/test_training.py ;;
        profile) "${limit[@]}" "$python" benchmarks/profile_step.py --device "$device" --out "$logs" "${quick[@]}" ;;
        roofline) "${limit[@]}" "$python" benchmarks/roofline.py "$records" "$picture" ;;
        sweep) "${limit[@]}" "$python" benchmarks/sweep.py --device "$device" --record "$records" ;;
        *) echo "unknown section: $1"; return 2 ;;
    esac
}

before=$(cat "$records" 2>/dev/null | wc -l)
results=()
[ $# -gt 0 ] || set -- "${default[@]}"
for name in "$@"; do
    echo "== $name"
    start=$SECONDS
    section "$name" >"$logs/$name.log" 2>&1
    status=$?
    tail -n 12 "$logs/$name.log"
    case $status in
        0) verdict=passed ;;
        124 | 137) verdict="FAILED (stopped after its time)" ;;
        *) verdict="FAILED ($status)" ;;
    esac
    results+=("$name: $verdict in $((SECONDS - start)) s, log $logs/$name.log")
done
if [ -f "$records" ]; then
    tail -n +$((before + 1)) "$records" >"$logs/measured.jsonl"
    "$python" benchmarks/report.py --summary "$logs/measured.jsonl"
fi
printf '%s\n' "== summary" "${results[@]}"
! printf '%s\n' "${results[@]}" | grep -q FAILED

#!/usr/bin/env bash
# Everything that claims a GPU, run on one: benchmarks/gpu_proof.sh [SECTION]...
#
#   environment  the card, driver and versions; its copy and read bandwidth and its bf16 peak, measured
#   kernels      every kernel against its reference, on the device, in fp32, fp16 and bf16
#   sanitizer    a few of these under compute-sanitizer (memcheck, racecheck), where it is installed
#   models       priors on the device against the CPU and against themselves, every path
#   kernel-benchmarks, sampling-benchmarks, prior-stage-benchmarks, training-benchmarks   with baselines and goals
#
# All by default. Needs the packages of the `test` extra and no network. Records go to benchmarks/records/<card>.jsonl,
# logs beside them in a temporary folder; a failure in one section does not stop the others, and a summary comes last.
# SECTION_SECONDS (600) bounds each. Without a GPU, DEVICE=cpu tries the same commands in Triton's interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
if [ "$device" = cuda ]; then
    card=$("$python" -c 'import re, torch; print(re.sub(r"\W+", "-", torch.cuda.get_device_name()).strip("-").lower())') || exit
    record=(--record "benchmarks/records/$card.jsonl")
else
    export TRITON_INTERPRET=1
    record=()
fi
logs=$(mktemp -d)
test=("$python" -m pytest -q)
bench=("$python" -m pytest -q -s --benchmark-only --device "$device" "${record[@]}")

section() {
    case $1 in
        environment) "${bench[@]}" benchmarks/test_environment.py ;;
        kernels) "${test[@]}" tests/test_kernel_*.py ;;
        sanitizer)
            command -v compute-sanitizer || { echo "compute-sanitizer is not installed: skipped"; return 0; }
            for tool in memcheck racecheck; do
                compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
                    "${test[@]}" -x -k "strides or layouts or deterministic or equal_bits or reused" tests/test_kernel_*.py || return
            done ;;
        models) "${test[@]}" tests/test_device.py tests/test_models_on_kernels.py tests/test_parity.py tests/test_sampler.py ;;
        kernel-benchmarks) "${bench[@]}" benchmarks/test_kernels.py benchmarks/test_barrier.py ;;
        sampling-benchmarks) "${bench[@]}" benchmarks/test_sampling.py ;;
        prior-stage-benchmarks) "${bench[@]}" benchmarks/test_prior_transformer.py ;;
        training-benchmarks) "${bench[@]}" benchmarks/test_training.py ;;
        *) echo "unknown section: $1"; return 2 ;;
    esac
}

results=()
for name in ${*:-environment kernels sanitizer models kernel-benchmarks sampling-benchmarks prior-stage-benchmarks training-benchmarks}; do
    echo "== $name"
    start=$SECONDS
    export -f section
    ( section "$name" ) >"$logs/$name.log" 2>&1 &
    pid=$!
    ( sleep "${SECTION_SECONDS:-600}" && echo "stopped after its time" >>"$logs/$name.log" && pkill -P "$pid" ) 2>/dev/null &
    guard=$!
    wait "$pid"
    status=$?
    pkill -P "$guard" 2>/dev/null
    kill "$guard" 2>/dev/null
    tail -n 12 "$logs/$name.log"
    results+=("$name: $([ "$status" = 0 ] && echo passed || echo "FAILED ($status)") in $((SECONDS - start)) s, log $logs/$name.log")
done
[ "$device" = cuda ] && "$python" benchmarks/report.py --summary "benchmarks/records/$card.jsonl"
printf '%s\n' "== summary" "${results[@]}"
! printf '%s\n' "${results[@]}" | grep -q FAILED

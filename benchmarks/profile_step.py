"""Where the time of a step goes: `python benchmarks/profile_step.py --device cuda --out FOLDER` writes a table a model.

One step at batch 1 in bf16 under torch.profiler. The first part has operations by the shapes of their inputs, with the
bytes that these have, of steps launched one by one. The second has the kernels of the same step replayed as a CUDA
graph, every node of it, and what lies between them. On the CPU the kernels run in Triton's interpreter, in fp16, and
what is listed as kernels are operations.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import priors
import torch
from timing import op_seconds
from torch.profiler import ProfilerActivity, profile

from fastprior.engine import graphs
from fastprior.kernels import ops

STEPS = 10  # that are profiled; figures are of one


def table(model: str, device: torch.device) -> str:
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float16
    with ops.using("triton"):
        step, _, weights, _ = priors.step_of(model, dtype, device, compile=False)
        found = _profiled(step, device)
        replayed, whole = found, math.nan
        if on_gpu:
            replay, _, _ = graphs.capture(step, device, None)
            replayed = _profiled(replay, device)
            whole = min(op_seconds(lambda _: step(), [None], device)) * 1e6
    where = "device" if on_gpu else "cpu"
    rows = found.key_averages(group_by_input_shape=True)
    operations = [r for r in rows if r.key.startswith("fastprior::") or r.key in ("aten::mm", "aten::addmm")]
    operations = [(_label(r), r.count, getattr(r, f"{where}_time_total"), _bytes(r, dtype)) for r in operations]
    kernels = [r for r in replayed.key_averages() if (str(r.device_type).endswith("CUDA") or not on_gpu)]
    kernels = [(r.key, r.count, getattr(r, f"self_{where}_time_total")) for r in kernels]
    total = sum(time for _, _, time in kernels) / STEPS
    launches = sum(count for _, count, _ in kernels) / STEPS
    read = weights * dtype.itemsize
    lines = [
        f"{model}, batch 1, {dtype}: a step of {launches:g} launches, {total:.1f} us in kernels, {read / 1e6:.1f} MB "
        f"of weights: {read / max(total, 1e-9) / 1e3:.0f} GB/s"
        + (f"; replayed in {whole:.1f} us, {whole - total:.1f} of them between kernels" if on_gpu else ""),
        "",
        f"{'operation, by shapes of inputs':60} {'calls':>6} {'us each':>9} {'MB each':>9} {'GB/s':>7}",
    ]
    for key, count, time, size in sorted(operations, key=lambda row: -row[2]):
        each = max(time / count, 1e-9)
        lines.append(f"{key:60} {count / STEPS:6g} {each:9.2f} {size / 1e6:9.3f} {size / each / 1e3:7.0f}")
    lines += ["", f"{'kernel':100} {'calls':>6} {'us each':>9} {'share':>6}"]
    for key, count, time in sorted(kernels, key=lambda row: -row[2]):
        share = time / STEPS / max(total, 1e-9)
        lines.append(f"{key[:100]:100} {count / STEPS:6g} {time / count:9.2f} {share:6.1%}")
    return "\n".join(lines)


def _profiled(run: Callable[[], object], device: torch.device) -> profile:
    """`STEPS` runs, after some that are not counted."""
    on_gpu = device.type == "cuda"
    for _ in range(3):
        run()
    with profile(
        activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA][: 1 + on_gpu],
        record_shapes=True,
        acc_events=True,  # of the one cycle that there is: torch 2.11 warns otherwise that it keeps no more
    ) as found:
        for _ in range(STEPS):
            run()
        if on_gpu:
            torch.cuda.synchronize(device)
    return found


def _label(row) -> str:
    """Of the operation and its two largest inputs."""
    largest = sorted(filter(None, row.input_shapes), key=math.prod)[-2:]
    return " ".join([row.key, *(str(list(shape)) for shape in largest)])


def _bytes(row, dtype: torch.dtype) -> int:
    """Of all inputs, in this dtype, which those that matter have."""
    return sum(math.prod(shape) for shape in row.input_shapes if shape) * dtype.itemsize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--model", nargs="+", default=list(priors.GOALS), choices=list(priors.GOALS))
    parser.add_argument("--quick", action="store_true", help="tiny models")
    options = parser.parse_args()
    if options.quick:
        priors.shrink()
    options.out.mkdir(parents=True, exist_ok=True)
    for model in options.model:
        path = options.out / f"profile-{model}.txt"
        text = table(model, torch.device(options.device))
        path.write_text(text + "\n")
        print(f"! {text.splitlines()[0]}\n\n{text}", flush=True)


if __name__ == "__main__":
    main()

"""Where the time of a step goes: `python benchmarks/profile_step.py --device cuda --out FOLDER` writes a table a model.

One step at batch 1 in bf16 under torch.profiler. The first part has operations, or the launches of a run, by the shapes
of their inputs, with the bytes that these have, of steps launched one by one. The second has the kernels of the same
step replayed as a CUDA graph, every node of it, and what lies between them. On the CPU the kernels run in Triton's
interpreter, in fp16, and what is listed as kernels are operations.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import priors
import torch
from timing import op_seconds
from torch.profiler import ProfilerActivity, profile, record_function

from fastprior.engine import graphs
from fastprior.kernels import ops
from fastprior.kernels.gpu import launch

CALLS = 10  # that are profiled, of one step or several; figures are of one step


def table(model: str, device: torch.device) -> str:
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float16
    with ops.using("triton"):
        step, several, weights, _ = priors.step_of(model, dtype, device, compile=False)
        sizes: dict[str, int] = {}
        with launch.instead(lambda *launched: _launch_named(sizes, dtype, *launched)):
            found = _profiled(step, device)
        replayed, whole, steps = found, math.nan, CALLS * several
        if on_gpu:
            replay, _, _ = graphs.capture(step, device, None)
            replayed = _profiled(replay, device)
            whole = min(op_seconds(lambda _: step(), [None], device)) * 1e6 / several
    where = "device" if on_gpu else "cpu"
    rows = [r for r in found.key_averages(group_by_input_shape=True) if not str(r.device_type).endswith("CUDA")]
    custom = [r for r in rows if r.key.startswith("fastprior::") or r.key in ("aten::mm", "aten::addmm")]
    operations = [(_label(r.key, r.input_shapes), r, _bytes(r.input_shapes, dtype)) for r in custom]
    # launches within these are theirs
    operations = operations or [(r.key, r, sizes[r.key]) for r in rows if r.key in sizes]
    operations = [(key, r.count, getattr(r, f"{where}_time_total"), size) for key, r, size in operations]
    kernels = [r for r in replayed.key_averages() if (str(r.device_type).endswith("CUDA") or not on_gpu)]
    kernels = [(r.key, r.count, getattr(r, f"self_{where}_time_total")) for r in kernels]
    total = sum(time for _, _, time in kernels) / steps
    launches = sum(count for _, count, _ in kernels) / steps
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
        lines.append(f"{key:60} {count / steps:6g} {each:9.2f} {size / 1e6:9.3f} {size / each / 1e3:7.0f}")
    lines += ["", f"{'kernel':100} {'calls':>6} {'us each':>9} {'share':>6}"]
    for key, count, time in sorted(kernels, key=lambda row: -row[2]):
        share = time / steps / max(total, 1e-9)
        lines.append(f"{key[:100]:100} {count / steps:6g} {time / count:9.2f} {share:6.1%}")
    return "\n".join(lines)


def _profiled(run: Callable[[], object], device: torch.device) -> profile:
    """`CALLS` runs, after some that are not counted."""
    on_gpu = device.type == "cuda"
    for _ in range(3):
        run()
    with profile(
        activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA][: 1 + on_gpu],
        record_shapes=True,
        acc_events=True,  # of the one cycle that there is: torch 2.11 warns otherwise that it keeps no more
    ) as found:
        for _ in range(CALLS):
            run()
        if on_gpu:
            torch.cuda.synchronize(device)
    return found


def _launch_named(sizes: dict[str, int], dtype: torch.dtype, kernel, grid, args: tuple, options: dict, constants: dict):
    """Launch a kernel as it would be, under a label whose bytes are noted."""
    shapes = [arg.shape for arg in args if torch.is_tensor(arg)]
    label = _label(kernel.fn.__name__, shapes)
    sizes[label] = _bytes(shapes, dtype)
    names = {"launch_pdl": "dependent", "launch_cooperative_grid": "cooperative", "maxnreg": "registers"}
    options = {names.get(name, name): value for name, value in options.items()}
    with record_function(label), launch.instead(None):
        launch.launch(kernel, grid, *args, **options, **constants)


def _label(name: str, shapes: Sequence[Sequence[int]]) -> str:
    """Of the operation and its two largest inputs."""
    largest = sorted(filter(None, shapes), key=math.prod)[-2:]
    return " ".join([name, *(str(list(shape)) for shape in largest)])


def _bytes(shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> int:
    """Of all inputs, in this dtype, which those that matter have."""
    return sum(math.prod(shape) for shape in shapes if shape) * dtype.itemsize


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

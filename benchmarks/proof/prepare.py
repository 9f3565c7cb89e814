"""Compile every kernel that the proof launches, without a GPU, and pack them: called by `benchmarks/gpu_prepare.sh`.

Runs the items of the proof themselves, so that the list of kernels is that of the proof. What a stopped run compiled is
kept, and found by the next.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT)]
import kernel_cache  # noqa: E402
import stages  # noqa: E402


def main(folder: str, archive: str, capability: str = "90") -> int:
    cache, begun, all_seconds, failed = Path(folder), time.time(), [], []
    known = stages.stages()
    environment = dict(os.environ) | dict(
        TRITON_CACHE_DIR=str(cache), PYTHONUNBUFFERED="1", PROOF_WORK=str(cache), PROOF_OUT=str(cache)
    )
    cache.mkdir(parents=True, exist_ok=True)
    for item in stages.filling(known, [*known]):
        start = time.monotonic()
        own = item.environment | {kernel_cache.FILL: f"{capability} {stages.CORES}"}
        command = [word.replace("{work}", str(cache)).replace("{out}", str(cache)) for word in item.command]
        done = subprocess.run(command, cwd=ROOT, env=environment | own, capture_output=True, text=True)
        line = next((line for line in done.stdout.splitlines() if line.startswith("@filled ")), None)
        if line is None or done.returncode:
            failed.append(item.name)
            print(f"{item.name}: FAILED ({done.returncode})\n{(done.stdout + done.stderr)[-3000:]}", flush=True)
        if line is None:
            continue
        found = json.loads(line.removeprefix("@filled "))
        seconds = [seconds for _, seconds in found["compiled"]]
        all_seconds += seconds
        print(
            f"{item.name}: {found['kernels']} kernels, {len(seconds)} compiled in {sum(seconds):.0f} s of a core, "
            f"{found['hits']} were there, {time.monotonic() - start:.0f} s in all",
            flush=True,
        )
        failed += found["failed"]
        for problem in found["failed"]:
            print(f"  FAILED: {problem}", flush=True)
    manifest = kernel_cache.pack(cache, Path(archive), begun, capability=capability)
    size = Path(archive).stat().st_size / 2**20
    print(f"{archive}: {manifest['kernels']} kernels, {manifest['launchers']} launchers, {size:.1f} MiB", end="")
    print(f"; for Python {platform.python_version()}, Triton {manifest['identity']['triton'].split()[0]}")
    if all_seconds:
        longest = max(all_seconds)
        print(
            f"compiled now: {len(all_seconds)}, {statistics.mean(all_seconds):.2f} s each, {longest:.1f} s the longest"
        )
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""Run one item of the proof: `item.py pytest ARGUMENT...` or `item.py FILE.py ARGUMENT...`.

Says at the end which kernels were found in Triton's cache. With `kernel_cache.FILL` in the environment the same item
runs on the CPU, and compiles what it would launch.
"""

import os
import runpy
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent)]
if "PROOF_FILL" in os.environ:  # before torch is there
    os.environ |= dict(CUDA_VISIBLE_DEVICES="", FASTPRIOR_KERNELS="triton", TRITON_STORE_BINARY_ONLY="1")
    os.environ.pop("TRITON_INTERPRET", None)

import kernel_cache  # noqa: E402


def main(what: str, *arguments: str) -> int:
    with kernel_cache.filled() if kernel_cache.filling() else kernel_cache.counted():
        if what == "pytest":
            import pytest

            return int(pytest.main(["-p", "no:cacheprovider", *arguments]))
        sys.argv = [what, *arguments]
        sys.path[0:0] = [str(Path(what).resolve().parent)]
        try:
            runpy.run_path(what, run_name="__main__")
        except SystemExit as end:
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
            return end.code if isinstance(end.code, int) else int(end.code is not None)
        return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

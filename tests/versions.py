"""Prints what the tests run on: python, the packages they touch, the compiler and the processor's instructions."""

import importlib.metadata
import platform
import shutil
import subprocess

PACKAGES = """
    torch triton numpy einops safetensors accelerate deepspeed dalle2-pytorch diffusers transformers peft
    open-clip-torch onnx onnxscript onnxruntime pytest pytest-xdist hypothesis
""".split()
INSTRUCTIONS = "avx2 avx512f avx512_vnni avx512_bf16 amx_bf16 amx_int8 asimd sve".split()


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def compiler() -> str:
    if not shutil.which("cc"):
        return "none"
    return subprocess.run(["cc", "--version"], capture_output=True, text=True).stdout.partition("\n")[0]


def instructions() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            words = set(file.read().split())
    except OSError:
        return "unknown"
    return " ".join(name for name in INSTRUCTIONS if name in words) or "none of them known here"


if __name__ == "__main__":
    print(f"{'python':16} {platform.python_version()} on {platform.machine()}")
    for package in PACKAGES:
        print(f"{package:16} {version(package)}")
    print(f"{'cc':16} {compiler()}")
    print(f"{'processor':16} {instructions()}")

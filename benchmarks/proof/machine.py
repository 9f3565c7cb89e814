"""What the proof runs on: versions, and what the driver says of the card; changes nothing."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ASKED = "name,driver_version,vbios_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"


def main() -> None:
    subprocess.run([sys.executable, str(ROOT / "tests" / "versions.py")], check=True)
    if shutil.which("nvidia-smi"):
        done = subprocess.run(["nvidia-smi", f"--query-gpu={ASKED}", "--format=csv"], capture_output=True, text=True)
        print(done.stdout.strip())
    import torch

    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        print(f"! {found.name}, capability {found.major}.{found.minor}, {found.multi_processor_count} multiprocessors")


if __name__ == "__main__":
    main()

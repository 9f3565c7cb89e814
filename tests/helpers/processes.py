"""Real processes for tests, forked from a server that has imported torch and the training script once."""

import importlib.util
import multiprocessing
import os
import subprocess
import sys
import traceback
from pathlib import Path

import torch

from helpers import ROOT

PROOF = ROOT / "benchmarks" / "proof"  # its modules are found in `compiling`
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["fastprior.train_diffusion_prior", "torch._dynamo", "pytest"])  # all that takes long

MODES = {"one": dict(world=1), "ddp": dict(world=2), "fsdp": dict(world=2, fsdp=True)}
if importlib.util.find_spec("deepspeed"):
    MODES["zero"] = dict(world=2, zero=2)
SEVERAL = [mode for mode in MODES if mode != "one"]


def _run(function, arguments, environment, errors):
    os.environ.update(environment, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    try:
        function(*arguments)
    except BaseException:
        Path(errors).write_text(traceback.format_exc())
        raise
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def start(function, *arguments, errors, environment=None):
    """A process that calls a function of a module; where it fails, `errors` says why."""
    process = CONTEXT.Process(target=_run, args=(function, arguments, environment or {}, errors))
    process.start()
    return process


def start_ranks(world, function, arguments, folder, fsdp=False, zero=None):
    """As many processes as will find each other through accelerate."""
    shared = {}
    if world > 1:
        # the store is here, as torchrun has it in its agent: no port is chosen before something listens there
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        shared = dict(WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port))
        shared["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    if fsdp:
        shared |= dict(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    if zero:
        shared |= dict(ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_ZERO_STAGE=str(zero), DS_ACCELERATOR="cpu")
    own = [{} if world == 1 else dict(RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(world)]
    processes = [
        start(function, *arguments, errors=folder / f"errors-{rank}.txt", environment=shared | own[rank])
        for rank in range(world)
    ]
    if world > 1:
        processes[0].store = store  # while there are processes
    return processes


def run_ranks(world, function, arguments, folder, fsdp=False, zero=None, timeout=120):
    """Run a function on `world` processes to its end."""
    processes = start_ranks(world, function, arguments, folder, fsdp, zero)
    for process in processes:
        process.join(timeout)
    hung = [process for process in processes if process.is_alive()]
    for process in hung:
        process.kill()
    failed = "\n".join(path.read_text() for path in sorted(folder.glob("errors-*.txt")))
    assert not hung and all(process.exitcode == 0 for process in processes), failed or "a process hangs"


def compiling(*command: str, **environment: str) -> subprocess.CompletedProcess:
    """Python, where kernels are compiled: not in Triton's interpreter."""
    own = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PROOF_FILL")}
    own["PYTHONPATH"] = os.pathsep.join([str(PROOF), *filter(None, [own.get("PYTHONPATH")])])
    command = sys.executable, *command
    return subprocess.run(command, capture_output=True, text=True, env=own | environment)


def run_python(*args, cwd=None) -> str:
    """What a fresh interpreter prints; it must end well."""
    done = subprocess.run([sys.executable, *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout

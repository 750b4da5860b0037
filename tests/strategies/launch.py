"""Run a function of a test module in several processes that train together."""

import os
import socket
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
_DONE = "all checks passed"

_SCRIPT = """
import importlib, os, sys, warnings
warnings.filterwarnings("ignore")
import torch
torch.set_num_threads(1)
module, function, *arguments = sys.argv[1:]
getattr(importlib.import_module(module), function)(*arguments)
print({done!r}, flush=True)
import torch.distributed as dist
if dist.is_initialized():
    dist.barrier()
    dist.destroy_process_group()
sys.stdout.flush()
# An interpreter that has run collectives aborts at exit now and then.
os._exit(0)
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def launch(module: str, function: str, *arguments: object, processes: int = 2, timeout: float = 240) -> list[str]:
    """Call ``function(*arguments)`` in every process, as a launcher such as torchrun would; text arguments only."""
    port = free_port()
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", _SCRIPT.format(done=_DONE), module, function, *map(str, arguments)],
            env={
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "NODE_RANK": "0",
                "WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                "PYTHONHASHSEED": "0",
                "PYTHONPATH": str(_ROOT),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        said = [worker.communicate(timeout=timeout)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for rank, text in enumerate(said):
        assert _DONE in text, f"process {rank}:\n{text[-6000:]}"
    return said

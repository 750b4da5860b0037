"""Start worker processes and read what they say."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

_FOLDER = Path(__file__).resolve().parent


def start(script: str, world_size: int, *arguments: str) -> list[subprocess.Popen[str]]:
    """Processes that run a script of this folder, as ``torchrun`` would start them."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    return [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(_FOLDER / script), *arguments],
            env={
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                "PYTHONHASHSEED": "0",
                "PYTHONPATH": str(_FOLDER.parents[2]),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]


def outputs(workers: list[subprocess.Popen[str]], timeout: float = 180) -> list[str]:
    """What they print until all have ended."""
    try:
        return [worker.communicate(timeout=timeout)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()


def check(script: str, world_size: int, *arguments: str) -> None:
    """Run to the end; every process must say that all checks passed."""
    for rank, text in enumerate(outputs(start(script, world_size, *arguments))):
        assert "all checks passed" in text, f"rank {rank}:\n{text[-4000:]}"

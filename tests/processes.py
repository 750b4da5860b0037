"""Several processes of one test, which talk to each other by gloo."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def run_processes(count: int, module: str, *arguments: str, timeout: float = 240) -> list[str]:
    """Run a module in several processes as torchrun would, and return what each of them said.

    Raises:
        AssertionError: If one of them fails or takes too long.
    """
    workers = start_processes(count, module, *arguments)
    try:
        said = [worker.communicate(timeout=timeout)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    failed = [(rank, worker.returncode) for rank, worker in enumerate(workers) if worker.returncode]
    if failed:
        rank, code = failed[0]
        raise AssertionError(f"rank {rank} of {count} ended with {code}:\n{said[rank][-4000:]}")
    return said


def start_processes(count: int, module: str, *arguments: str) -> list[subprocess.Popen[str]]:
    """Start a module in several processes, for tests in which some of them die."""
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", module, *arguments],
            cwd=_ROOT,
            env={
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(count),
                "LOCAL_WORLD_SIZE": str(count),
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
        for rank in range(count)
    ]

"""Codecs in TorchRec's collectives, with two processes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

_WORKER = Path(__file__).with_name("exchange_worker.py")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_two_processes() -> None:
    """The workers compare with plain PyTorch, and name the check that fails."""
    port = _free_port()
    workers = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(_WORKER)],
            env={
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                "PYTHONHASHSEED": "0",
                "PYTHONPATH": str(Path(__file__).resolve().parents[4]),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [worker.communicate(timeout=240)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for rank, text in enumerate(said):
        assert "all checks passed" in text, f"rank {rank}:\n{text[-4000:]}"

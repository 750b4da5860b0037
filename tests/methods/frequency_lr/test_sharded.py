"""COUNTER_SGD under TorchRec's shardings, with two processes, against NumPy on the whole batch."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

_WORKER = Path(__file__).with_name("sharded_worker.py")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.mark.parametrize("half_life", ["none", "5"])
def test_two_processes(half_life: str, tmp_path: Path) -> None:
    """Training, a checkpoint, other places for the shards, and on: the workers compare with NumPy at both ends."""
    port = _free_port()
    workers = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(_WORKER), half_life, str(tmp_path)],
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
                "PYTHONPATH": str(Path(__file__).resolve().parents[3]),
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

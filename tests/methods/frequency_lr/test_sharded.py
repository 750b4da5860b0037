"""COUNTER_SGD under TorchRec's shardings, with two processes, against NumPy on the whole batch."""

from pathlib import Path

import pytest

from tests.processes import run_processes


@pytest.mark.parametrize("half_life", ["none", "5"])
def test_two_processes(half_life: str, tmp_path: Path) -> None:
    """Training, a checkpoint, other places for the shards, and on: the workers compare with NumPy at both ends."""
    said = run_processes(2, "tests.methods.frequency_lr.sharded_worker", half_life, str(tmp_path))
    for rank, text in enumerate(said):
        assert "all checks passed" in text, f"rank {rank}:\n{text[-4000:]}"

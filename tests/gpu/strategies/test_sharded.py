"""Compressed tables that are sharded over GPUs, against the same runs over processes on the CPU.

Sums are added up in another order on a GPU, so now and then a row at the edge of the budget is cut otherwise.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.processes import free_port
from tests.strategies.pruned import ROWS

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[3]
TWO = pytest.param(2, marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"))


def run(processes: int, *arguments: str) -> None:
    """As torchrun would; new interpreters, since a forked one cannot use CUDA."""
    shared = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONHASHSEED": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }
    workers = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.gpu.strategies.worker", *arguments],
            cwd=ROOT,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        said = [worker.communicate(timeout=300)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert all(worker.returncode == 0 for worker in workers), "\n".join(text[-3000:] for text in said)


def result(out: Path, processes: int) -> tuple[dict[str, Tensor], list[Tensor], list[Tensor]]:
    """Dense parameters, whole tables, and the codes of their rows."""
    saved = [torch.load(f"{out}.{rank}.pt") for rank in range(processes)]
    rows = [torch.zeros(count, 16) for count in ROWS]
    codes = [torch.zeros(count, dtype=torch.uint8) for count in ROWS]
    for t, row, column, part, part_codes in (part for _, parts in saved for part in parts):
        rows[t][row : row + len(part), column : column + part.shape[1]] = part
        if column == 0:
            codes[t][row : row + len(part)] = part_codes
    return saved[0][0], rows, codes


def assert_alike(one: Path, other: Path, processes: int) -> None:
    (dense, rows, codes), (dense2, rows2, codes2) = result(one, processes), result(other, processes)
    for name, value in dense.items():
        torch.testing.assert_close(value, dense2[name], rtol=1e-3, atol=1e-3)
    for t in range(len(ROWS)):
        same = codes[t] == codes2[t]
        assert same.float().mean() > 0.98, (t, same.float().mean())
        torch.testing.assert_close(rows[t][same], rows2[t][same], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("optimizer", ["sgd", "rowwise_adagrad"])
@pytest.mark.parametrize("processes", [1, TWO])
def test_training_equals_the_cpu(processes: int, optimizer: str, tmp_path: Path) -> None:
    for device in ("cpu", "gpu"):
        run(processes, device, optimizer, "2", "early", "-", str(tmp_path / device))
    assert_alike(tmp_path / "cpu", tmp_path / "gpu", processes)


@pytest.mark.parametrize("processes", [1, TWO])
@pytest.mark.parametrize("saved_on", ["cpu", "gpu"])
def test_checkpoints_pass_between_devices(saved_on: str, processes: int, tmp_path: Path) -> None:
    run(processes, saved_on, "rowwise_adagrad", "1", "early", "-", str(tmp_path / "half"))
    for device in ("cpu", "gpu"):
        run(processes, device, "rowwise_adagrad", "2", "early", str(tmp_path / "half.ckpt"), str(tmp_path / device))
    assert_alike(tmp_path / "cpu", tmp_path / "gpu", processes)


@pytest.mark.parametrize("processes", [1, TWO])
def test_tables_that_are_built_late_are_exported(processes: int, tmp_path: Path) -> None:
    """Never allocated in full; the checkpoint of the GPU becomes one file, and that one an export."""
    run(processes, "gpu", "sgd", "2", "late", "-", str(tmp_path / "late"))
    for command in (
        ["consolidate", str(tmp_path / "late.ckpt"), str(tmp_path / "whole.ckpt")],
        ["export", "--ckpt", str(tmp_path / "whole.ckpt"), "--out", str(tmp_path / "served")],
    ):
        start = f"import sys; from lightning_embcomp import cli; sys.argv = {['embcomp', *command]!r}; cli.main()"
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", start], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr[-3000:]
    assert any((tmp_path / "served").iterdir())

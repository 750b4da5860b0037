"""Several ranks over gloo, with TorchRec's sharded tables, and other numbers of ranks afterwards."""

import os
from pathlib import Path

import torch

from lightning_embcomp.checkpoints import CheckpointReader, read_common, save_checkpoint, world_size_of
from tests.checkpoints.tables import filled, plain_slices, whole_slices
from tests.processes import start_processes


def launch(stage: str, folder: Path, world: int, survivors: int | None = None) -> None:
    workers = start_processes(world, "tests.checkpoints.worker", stage, str(folder))
    try:
        said = [worker.communicate(timeout=240)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for rank, text in enumerate(said[:survivors]):
        assert "all checks passed" in text, f"rank {rank}:\n{text[-4000:]}"


def read_whole(path: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(path)
    tensors = {key: torch.full(reader.shape(key), 77).to(reader.dtype(key)) for key in reader.keys()}
    reader.read_into(tensors)
    return tensors


def check_whole(tensors: dict[str, torch.Tensor]) -> None:
    for key, full in whole_slices().items():
        assert tensors[key].dtype == full.dtype and torch.equal(tensors[key], full)
    tables = [key for key in tensors if "/" in key]
    assert len(tables) == 6
    for key in tables:
        assert torch.equal(tensors[key], filled(key, tuple(tensors[key].shape)))


def test_other_numbers_of_ranks(tmp_path: Path) -> None:
    """Two ranks, then one, four, and two again; and failing ranks in the first stage."""
    launch("first", tmp_path, 2)
    tensors = read_whole(tmp_path / "two")
    assert torch.equal(tensors.pop("dense"), torch.zeros(3))  # of a replicated tensor, rank 0's copy
    check_whole(tensors)
    save_checkpoint(tmp_path / "one", tensors={**tensors, **plain_slices(0, 1)}, common={}, per_rank={})
    assert world_size_of(tmp_path / "one") == 1
    launch("second", tmp_path, 4)
    check_whole(read_whole(tmp_path / "four"))
    launch("third", tmp_path, 2)


def test_killed_rank(tmp_path: Path) -> None:
    launch("killed", tmp_path, 3, survivors=2)
    assert read_common(tmp_path / "ckpt") == {"epoch": 1}
    assert torch.equal(read_whole(tmp_path / "ckpt")["a"], torch.ones(4))
    save_checkpoint(tmp_path / "ckpt", tensors={}, common={"epoch": 3}, per_rank={})
    assert read_common(tmp_path / "ckpt") == {"epoch": 3}
    assert sorted(os.listdir(tmp_path)) == ["ckpt", "gave_up_0", "gave_up_1"]

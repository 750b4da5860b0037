"""Sharded collections against unsharded ones, in training and through checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torchrec.distributed.types import ParameterSharding

from lightning_embcomp.engine.layout import ClassMap, LogicalTable, Shard
from lightning_embcomp.engine.sharded.lookup import gather_batch, gather_sizes
from lightning_embcomp.engine.sharded.parts import UnsupportedShardingError, check_plan
from tests.processes import run_processes

KINDS = ["table_wise", "row_wise", "column_wise", "data_parallel", "mixed"]


@pytest.mark.parametrize(("processes", "kinds"), [(2, KINDS), (4, ["row_wise", "mixed"])])
def test_training_equals_unsharded(processes: int, kinds: list[str]) -> None:
    """Pooled rows, rows after training, and utilities; of rows that store nothing to all of their columns."""
    run_processes(processes, "tests.engine.sharded.worker", *kinds)


def test_training_on_a_gpu() -> None:
    """Every tensor of a process on its device, no exchange of host memory, and no waits in a step."""
    run_processes(2, "tests.engine.sharded.gpu_worker", *KINDS)


@pytest.mark.parametrize(("saved_on", "loaded_on"), [("gpu", "cpu"), ("cpu", "gpu")])
def test_checkpoints_between_devices(saved_on: str, loaded_on: str, tmp_path: Path) -> None:
    """Bit for bit, since the pretended GPU computes as the CPU does."""
    for action, device in (("save", saved_on), ("load", loaded_on)):
        said = run_processes(2, "tests.engine.sharded.storage_worker", action, "mixed", "mixed", str(tmp_path), device)
    assert all("bit for bit" in text for text in said)


@pytest.mark.parametrize(
    ("saved", "processes", "loads"),
    [
        ("mixed", 2, [(2, "mixed,table_wise"), (4, "row_wise,column_wise"), (1, "data_parallel")]),
        ("row_wise", 2, [(2, "row_wise,data_parallel"), (4, "table_wise")]),
        ("row_wise", 4, [(2, "row_wise"), (1, "row_wise")]),
        ("table_wise", 1, [(2, "row_wise")]),
    ],
)
def test_checkpoints(saved: str, processes: int, loads: list[tuple[int, str]], tmp_path: Path) -> None:
    """Saved in one way, loaded in others, compared with an unsharded run, and trained on."""
    run_processes(processes, "tests.engine.sharded.storage_worker", "save", saved, saved, str(tmp_path))
    for count, kinds in loads:
        said = run_processes(count, "tests.engine.sharded.storage_worker", "load", kinds, saved, str(tmp_path))
        if count == processes and saved in kinds.split(","):
            assert all("bit for bit" in text for text in said)


def part(first_column: int, columns: int, dim: int = 16, chunks: int = 4) -> LogicalTable:
    """Columns of a table that is cut into chunks of 4."""
    shard = Shard(rows=10, dim=dim, first_column=first_column)
    return LogicalTable(name="t", rows=10, dim=columns, chunks=columns * chunks // dim, shard=shard)


def test_codes_of_column_parts() -> None:
    """A part has codes for everything the whole table may store from its first column on."""
    first, last = part(0, 8), part(8, 8)
    assert (first.codes, last.codes) == (5, 3)
    assert [first.columns_of(code) for code in range(5)] == [(), ((0, 4),), ((0, 8),), ((0, 8),), ((0, 8),)]
    assert [last.columns_of(code) for code in range(3)] == [(), ((0, 4),), ((0, 8),)]
    assert [first.share(code) for code in range(5)] == [(0, 16), (4, 16), (8, 16), (12, 16), (16, 16)]
    assert [last.share(code) for code in range(3)] == [(0, 16), (12, 16), (16, 16)]


def test_classes_know_what_other_parts_store() -> None:
    """Rows of one width learn at different rates where the whole table stores more of some."""
    classes = ClassMap.of([part(0, 8)])
    assert sorted(classes.share(c) for c in range(4)) == [0.25, 0.5, 0.75, 1.0]
    assert [classes.width(c) for c in classes.class_of_code[0][1:]] == [4, 8, 8, 8]


def test_layout_of_subsets_cannot_be_cut() -> None:
    """Codes of arbitrary chunk subsets have no order that a part could follow."""
    with pytest.raises(ValueError, match="sharded by columns, which layout 'chunks' cannot follow"):
        LogicalTable(name="t", rows=10, dim=8, chunks=2, layout="chunks", shard=Shard(rows=10, dim=16, first_column=8))


def test_plans_that_cut_chunks_are_refused() -> None:
    """The message says which columns, and what to set."""
    table = LogicalTable(name="user", rows=10, dim=16, chunks=2)
    plan = ParameterSharding(sharding_type="column_wise", compute_kernel="fused", ranks=[0, 1])
    plan.sharding_spec = type("Spec", (), {"shards": [_metadata(0, 4), _metadata(4, 12)]})()
    with pytest.raises(UnsupportedShardingError, match="'user' is planned with columns 0 to 4.*chunks of 8 columns"):
        check_plan([table], {"user": plan})
    plan = ParameterSharding(sharding_type="grid_shard", compute_kernel="fused", ranks=[0, 1])
    with pytest.raises(UnsupportedShardingError, match="'user' is planned grid_shard"):
        check_plan([table], {"user": plan})


def _metadata(first: int, width: int) -> object:
    return type("Metadata", (), {"shard_offsets": [0, first], "shard_sizes": [10, width]})()


class Pair:
    """Two processes: this one, and one whose tensors are known."""

    rank, size = 0, 2

    def __init__(self, *others: torch.Tensor) -> None:
        self.others = list(others)

    def gather_uneven(self, tensor: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
        assert sizes == [len(tensor), len(self.others[0])]
        return [tensor, self.others.pop(0)]

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack([tensor, self.others.pop(0)])


def test_bags_of_all_processes() -> None:
    """Two features: bags of both processes, feature by feature."""
    mine = torch.tensor([1, 2, 3, 4]), torch.tensor([0, 1, 3, 3, 4])  # [1] [2 3] | [] [4]
    sizes = gather_sizes(Pair(torch.tensor([1, 2, 1])), 2, mine[1])  # type: ignore[arg-type]
    assert sizes == [[2, 3, 1], [1, 2, 1]]
    other = Pair(torch.tensor([2, 1]), torch.tensor([5, 6, 7]))  # [5 6] | [7]
    values, offsets, weights = gather_batch(other, sizes, *mine, None)  # type: ignore[arg-type]
    assert values.tolist() == [1, 2, 3, 5, 6, 4, 7]
    assert offsets.tolist() == [0, 1, 3, 5, 5, 6, 7]
    assert weights is None

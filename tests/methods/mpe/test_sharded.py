"""Mixed precision of sharded tables against unsharded ones, in several processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.processes import run_processes

WORKER = "tests.methods.mpe.sharded_worker"


@pytest.mark.parametrize(
    "kinds",
    [["table_wise", "row_wise", "data_parallel"], ["mixed", "one_rank", "column_wise", "column_wise_pruned"]],
    ids=" ".join,
)
def test_sharded_equals_unsharded(kinds: list[str], tmp_path: Path) -> None:
    """Search, choice, dropped rows and training at the chosen widths: the same settings, decisions and tables."""
    run_processes(2, WORKER, "equal", str(tmp_path), *kinds)


def test_what_else_is_shared(tmp_path: Path) -> None:
    """Counts of parts of the data, new initial values, and what is refused."""
    run_processes(2, WORKER, "others", str(tmp_path))


def test_checkpoints_resume_on_other_shards(tmp_path: Path) -> None:
    """Saved in either phase; read by more processes, and by processes that hold no row."""
    run_processes(2, WORKER, "save", str(tmp_path), "mixed")
    run_processes(2, WORKER, "load", str(tmp_path), "row_wise", "one_rank", "data_parallel")
    run_processes(3, WORKER, "load", str(tmp_path), "row_wise")

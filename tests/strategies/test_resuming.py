"""Checkpoints of the strategy: any number of processes, other sharding types, files of unsharded runs."""

from pathlib import Path

import pytest

from tests.strategies.launch import launch

_MODULE = "tests.strategies.resuming"


@pytest.mark.parametrize(
    ("kind", "saved", "loaded"),
    [
        ("fused", (2, "mixed"), [(2, "mixed"), (4, "rows"), (1, "tables")]),
        ("dense", (2, "three"), [(2, "rows"), (1, "tables")]),
        ("fused", (1, "tables"), [(2, "mixed")]),
    ],
)
def test_a_run_goes_on(kind: str, saved: tuple[int, str], loaded: list[tuple[int, str]], tmp_path: Path) -> None:
    launch(_MODULE, "save", tmp_path, kind, saved[1], processes=saved[0])
    for processes, places in loaded:
        same = "same" if processes == saved[0] else "other"
        launch(_MODULE, "load", tmp_path, kind, places, same, processes=processes)


def test_files_and_refusals(tmp_path: Path) -> None:
    launch(_MODULE, "plain_files", tmp_path)


def test_from_columns_to_rows(tmp_path: Path) -> None:
    launch(_MODULE, "columns_to_rows", tmp_path)

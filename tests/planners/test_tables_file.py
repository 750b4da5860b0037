from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torchrec.optim import RowWiseAdagrad

from lightning_embcomp.planners.options import Machine, PlanInputError, by_glob
from lightning_embcomp.planners.tables_file import read_tables

_EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "plans" / "dlrm_v2.yaml"


def written(folder: Path, text: str) -> Path:
    file = folder / "tables.yaml"
    file.write_text(text)
    return file


def test_a_list_is_read(tmp_path: Path) -> None:
    listed = read_tables(
        written(
            tmp_path,
            "dim: 16\noptimizer: sgd\ndtype: float16\ntables:\n- {name: a, rows: 10}\n- {name: b, rows: 5, dim: 8,"
            " pooling: 2.5}\n",
        )
    )
    weights = list(listed.module.parameters())
    assert [tuple(weight.shape) for weight in weights] == [(10, 16), (5, 8)]
    assert all(weight.is_meta and weight.dtype == torch.float16 for weight in weights)
    assert all(weight._optimizer_classes == [torch.optim.SGD] for weight in weights)
    assert listed.pooling == {"a": 1.0, "b": 2.5}


def test_the_tables_of_mlperf() -> None:
    listed = read_tables(_EXAMPLE)
    weights = list(listed.module.parameters())
    assert (len(weights), sum(weight.shape[0] for weight in weights)) == (26, 204_184_588)
    assert {weight.shape[1] for weight in weights} == {128}
    assert sum(listed.pooling.values()) == 214  # ids per sample
    assert all(weight._optimizer_classes == [RowWiseAdagrad] for weight in weights)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tables: []", "write a list of tables under 'tables:'"),
        ("- 3", r"table 1 is 3; write \{name"),
        ("- {name: a, rows: 3}", r"table 1 \(a\): dim must be a whole number above 0, not None"),
        ("- {name: a, rows: 3.5, dim: 4}", r"rows must be a whole number above 0, not 3.5"),
        ("- {name: a, rows: 3, dim: 4, pooling: -1}", "pooling must be a number above 0, not -1"),
        ("- {name: a, rows: 3, dim: 4}\n- {name: a, rows: 3, dim: 4}", "table 2 needs a name of its own, not 'a'"),
        ("- {name: a, row: 3}", "table 1: there is no 'row'; known are name, rows"),
        ("tables: [{name: a, rows: 3, dim: 4}]\noptimizer: adam", "optimizer must be one of rowwise_adagrad"),
        ("tables: [", "this is not YAML"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(PlanInputError, match=message):
        read_tables(written(tmp_path, text))


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(PlanInputError, match="none.yaml: it cannot be read"):
        read_tables(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ranks": 0, "hbm": 1}, "at least 1"),
        ({"ranks": 3, "local_ranks": 2, "hbm": 1}, "3 ranks do not fill machines of 2"),
        ({"ranks": 2}, "--hbm 80GB"),
    ],
)
def test_impossible_machines_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(PlanInputError, match=message):
        Machine(**settings)


@pytest.mark.parametrize("entry", ["t", "=x", "t="])
def test_entries_need_both_sides(entry: str) -> None:
    with pytest.raises(PlanInputError, match="--pooling takes GLOB=VALUE"):
        by_glob([entry], "--pooling")

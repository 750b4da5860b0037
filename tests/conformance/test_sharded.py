"""Every callback, sharded by TorchRec: the same as one process on the whole batches, also through checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_embcomp import TorchRecStrategy
from tests.processes import run_processes

from .bench import Bench
from .matrix import MATRIX, SHARDED

WORKER = "tests.conformance.sharded_worker"
SHARDINGS = ("table_wise", "row_wise", "column_wise", "data_parallel")
# Row-wise Adagrad has an accumulator per part where columns are cut, so that nothing can be equal.
RUNS = {
    "plain": [
        "sgd:table_wise",
        "sgd:row_wise",
        "sgd:column_wise",
        "rowwise_adagrad:table_wise",
        "rowwise_adagrad:row_wise",
    ],
    "fiited": [
        *(f"sgd:{kind}" for kind in (*SHARDINGS, "mixed")),
        *(f"rowwise_adagrad:{kind}" for kind in ("table_wise", "row_wise", "data_parallel")),
    ],
    "mpe": ["sgd:table_wise", "sgd:row_wise", "rowwise_adagrad:row_wise", "sgd:data_parallel"],
    "frequency_lr": [f"sgd:{kind}" for kind in (*SHARDINGS, "mixed")],
    "GradientThresholding": ["sgd:table_wise", "rowwise_adagrad:row_wise"],
    "EmbeddingTrafficMonitor": ["sgd:table_wise", "sgd:column_wise"],
    "ReshardOnImbalance": ["sgd:table_wise"],
}
SHORT = {"fiited": "DimensionPruning", "mpe": "MixedPrecisionSearch", "frequency_lr": "FrequencyAwareLR"}


def results(said: list[str]) -> list[dict[str, Any]]:
    return [json.loads(text.split("RESULT ", 1)[1]) for text in said]


def assert_close(said: list[str], limit: float = 1e-5) -> None:
    for of_rank in results(said):
        for spec, worst in of_rank.items():
            assert worst["stored"] == 0 and max(worst["rows"], worst["dense"]) <= limit, (spec, worst)


def references(log: str, folder: Path, runs: list[str]) -> None:
    run_processes(1, WORKER, "reference", log, str(folder), *sorted({spec.rpartition(":")[0] for spec in runs}))


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_equal_one(name: str, tmp_path: Path) -> None:
    runs = [f"{name}:{run}" for run in RUNS[name]]
    references("synthetic", tmp_path, runs)
    assert_close(run_processes(2, WORKER, "compare", "synthetic", str(tmp_path), *runs))


def test_every_callback_is_compared_or_refused() -> None:
    compared = {SHORT.get(name, name) for name in RUNS} - {"plain"}
    refused = {name for name, case in MATRIX.items() if SHARDED in case.refuses}
    assert compared | refused == MATRIX.keys() and not compared & refused


@pytest.mark.parametrize("name", [name for name, case in MATRIX.items() if SHARDED in case.refuses])
def test_refused(name: str, tmp_path: Path) -> None:
    bench, refusal = Bench(MATRIX[name], tmp_path), MATRIX[name].refuses[SHARDED]
    runner = bench.trainer(bench.callback(), strategy=TorchRecStrategy, devices=1)
    with pytest.raises(refusal.error, match=refusal.says):
        runner.callbacks[0].setup(runner, bench.model(built=True), "fit")  # type: ignore[attr-defined]


def test_four_processes_equal_one(tmp_path: Path) -> None:
    runs = ["fiited:sgd:mixed", "fiited:rowwise_adagrad:row_wise", "mpe:sgd:row_wise", "frequency_lr:sgd:row_wise"]
    references("synthetic", tmp_path, runs)
    assert_close(run_processes(4, WORKER, "compare", "synthetic", str(tmp_path), *runs))


@pytest.mark.parametrize("name", ["fiited", "mpe", "frequency_lr"])
def test_checkpoints_resume_anywhere(name: str, tmp_path: Path) -> None:
    """Saved by two processes after one epoch; the second epoch on two, bit for bit, and on other numbers."""
    spec = f"{name}:sgd"
    references("synthetic", tmp_path, [f"{spec}:row_wise"])
    assert_close(run_processes(2, WORKER, "save", "synthetic", str(tmp_path), f"{spec}:row_wise"))
    assert_close(
        run_processes(
            2,
            WORKER,
            "resume",
            "synthetic",
            str(tmp_path),
            f"{spec}:row_wise:row_wise:bits",
            f"{spec}:table_wise:row_wise",
        )
    )
    for processes in (1, 4) if name == "fiited" else (1,):
        assert_close(
            run_processes(processes, WORKER, "resume", "synthetic", str(tmp_path), f"{spec}:row_wise:row_wise")
        )


@pytest.mark.parametrize("name", ["plain", "fiited"])
def test_real_clicks(name: str, real_data: Path, tmp_path: Path) -> None:
    log = str(real_data / "criteo_kaggle_80k" / "train_first80k.hashed.txt.xz")
    runs = [f"{name}:sgd:row_wise", f"{name}:rowwise_adagrad:table_wise"]
    references(log, tmp_path, runs)
    assert_close(run_processes(2, WORKER, "compare", log, str(tmp_path), *runs))

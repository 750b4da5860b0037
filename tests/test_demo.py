"""The demonstration, on few rows."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from lightning_embcomp import demo

KEYS = {"auc", "ne", "embedding_bytes", "seconds_per_step"}


def run(tmp_path: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    out = tmp_path / "out"
    assert demo.main(["--out", str(out), "--epochs", "1", *arguments]) == 0
    return json.loads((out / "result.json").read_text()), (out / "report.html").read_text()


def check(result: dict[str, Any], rows: int) -> None:
    assert set(result) == {"plain", "compressed", "ratio"}
    assert set(result["plain"]) == set(result["compressed"]) == KEYS
    # float32 weights of 16 columns, and row-wise Adagrad's one number per row.
    assert result["plain"]["embedding_bytes"] == rows * (16 + 1) * 4
    assert result["ratio"] == result["plain"]["embedding_bytes"] / result["compressed"]["embedding_bytes"]
    for one in (result["plain"], result["compressed"]):
        assert 0.4 < one["auc"] < 1 and 0.5 < one["ne"] < 1.5 and one["seconds_per_step"] > 0


def test_synthetic_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result, html = run(tmp_path, "--rows", "6000", "--target", "0.8")
    rows = sum(demo._TABLE_SIZES)
    check(result, rows)
    # A fifth of the weights, state for some rows, and per row 1 byte of router and 2 of statistics: never nominal.
    assert rows * (0.2 * 64 + 3) < result["compressed"]["embedding_bytes"] < rows * (0.2 * 64 + 3 + 4) + 10_000
    said = capsys.readouterr().out
    assert "DimensionPruning" in said and "test AUC" in said and f"{result['ratio']:.2f}×" in said
    assert f"{result['compressed']['auc']:.4f}" in html and "Best possible AUC" in html


def test_a_file_in_criteos_layout(tmp_path: Path) -> None:
    rng = random.Random(0)
    lines = []
    for _ in range(1500):
        ids = [f"{rng.randrange(40):08x}" for _ in range(26)]
        label = int(rng.random() < 0.2 + 0.5 * (int(ids[0], 16) % 2))
        lines.append("\t".join([str(label), *[str(rng.randrange(9)) for _ in range(13)], *ids]) + "\n")
    (tmp_path / "log.txt").write_text("".join(lines))
    result, html = run(tmp_path, "--data", str(tmp_path / "log.txt"))
    check(result, 26 * 41)
    assert "log.txt" in html and "Best possible AUC" not in html


def test_real_criteo_rows(tmp_path: Path, real_data: Path) -> None:
    file = real_data / "criteo_kaggle_80k" / "train_first80k.hashed.txt.xz"
    if not file.is_file():
        pytest.skip(f"{file} is missing")
    before = set(file.parent.iterdir())
    result, _ = run(tmp_path, "--data", str(file), "--rows", "8000")
    assert result["plain"]["auc"] > 0.55 and result["ratio"] > 4
    assert set(file.parent.iterdir()) == before  # nothing is left beside the data


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no such data file"), ("1\t2\n", "line 1"), ("", "the file is empty")]
)
def test_unreadable_data_is_named(
    tmp_path: Path, content: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "log.txt"
    if content is not None:
        file.write_text(content)
    assert demo.main(["--data", str(file), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert message in said and "log.txt" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"), [(["--target", "90"], "write 0.9"), (["--epochs", "0"], "--epochs must be at least 1")]
)
def test_settings_out_of_range_are_named(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status: object = demo.main(["--out", str(tmp_path / "out"), *arguments])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert message in capsys.readouterr().err

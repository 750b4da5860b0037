"""Fronts, figures and the entry of the benchmarks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.__main__ import NAMES, main
from benchmarks.large import CRITEO, sizes
from benchmarks.peers.fronts import compare, points_of, record
from benchmarks.plots import draw

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def result(folder: Path, method: str, level: int, seed: int, noise: float, serving: int) -> tuple[dict, Path]:
    """A made-up run whose predictions are the worse the more noise there is."""
    rng = np.random.default_rng(7)
    labels = rng.random(600) < 0.4
    scores = np.clip(0.5 + 0.2 * (labels - 0.5) + noise * rng.normal(size=600), 0.01, 0.99)
    path = folder / f"{method}-{level}-{seed}.npz"
    arrays: dict[str, Any] = {"labels": labels.astype(np.uint8), "as trained": scores}
    np.savez(path, **arrays)
    run = {"dataset": "d", "method": method, "level": level, "seed": seed, "scale": 1.0}
    form = {"serving_bytes": serving, "val_ne": noise, "test_auc": 1 - noise, "test_ne": noise}
    found = {
        "run": run,
        "plain": {"weights": 6400, "training": 6800},
        "training_bytes": 6800 // level,
        "forms": {"as trained": form},
    }
    return found, path


@pytest.fixture
def results(tmp_path: Path) -> list[tuple[dict, Path]]:
    return [
        *(result(tmp_path, "plain", 1, seed, 0.10, 6400) for seed in (0, 1)),
        *(result(tmp_path, "pruning", 10, seed, 0.12, 640) for seed in (0, 1)),
        result(tmp_path, "pruning", 20, 0, 0.40, 320),
        result(tmp_path, "hashing", 10, 0, 0.30, 640),
        result(tmp_path, "rows", 20, 0, 0.02, 320),
    ]


def test_each_level_compares_the_best_that_is_small_enough(results: list[tuple[dict, Path]]) -> None:
    points = points_of(results, dict.fromkeys(("plain", "pruning", "hashing", "rows"), 1.0))
    rows = {(r["axis"], r["level"], r["family"]): r for r in compare(points, (10, 20)) if r["theirs"]}
    ahead = rows["serving", 10, "hashing"]
    assert ahead["ours"] == "pruning 10, as trained"  # the lower NE of the two that are small enough
    assert ahead["verdict"] == "win"
    assert ahead["difference"]["seeds"] == [0]
    assert ahead["difference"]["auc"] == pytest.approx(0.18)
    assert rows["training", 10, "rows"]["verdict"] == "loss"
    assert ("serving", 20, "hashing") not in rows
    assert rows["serving", 20, "rows"]["ours"] == "pruning 20, as trained"
    by_name = {point.name: point for point in points}
    to_plain = record(by_name["pruning 10, as trained"], by_name["plain 1, as trained"])["to_plain"]
    assert to_plain["seeds"] == [0, 1]
    assert to_plain["auc_interval"][0] < to_plain["auc_interval"][1]


def test_figures_are_drawn_the_same_each_time(results: list[tuple[dict, Path]], tmp_path: Path) -> None:
    points = [
        {
            "family": "plain" if found["run"]["method"] == "plain" else found["run"]["method"],
            "form": "as trained",
            "auc": 0.8 - 0.001 * found["run"]["level"],
            "training_ratio": found["run"]["level"],
            "serving_ratio": 2 * found["run"]["level"],
        }
        for found, _ in results
    ]
    (tmp_path / "pareto.json").write_text(json.dumps({"results": {"criteo_80k": {"points": points}}}))
    [first], [second] = draw(tmp_path, tmp_path / "a"), draw(tmp_path, tmp_path / "b")
    assert first.name == "pareto-criteo_80k.svg"
    assert first.read_bytes() == second.read_bytes()
    assert "DimensionPruning" in first.read_text()
    assert b"<dc:date>" not in first.read_bytes()


def test_help_lists_every_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    text = capsys.readouterr().out
    entries = {path.stem for path in FOLDER.glob("*.py") if "def main(" in path.read_text()} - {"__main__", "link"}
    assert entries == set(NAMES)
    assert all(name in text for name in entries)


def test_an_unknown_benchmark_is_named() -> None:
    with pytest.raises(SystemExit, match="no benchmark 'nothing': choose one of quality"):
        main(["nothing"])


def test_the_large_log_keeps_criteos_shape() -> None:
    assert len(sizes()) == len(CRITEO)
    assert 4_999_900 < sum(sizes()) <= 5_000_000
    assert all(mine == size for mine, size in zip(sizes(), CRITEO, strict=True) if size <= 10**6)

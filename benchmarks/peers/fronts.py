"""From single runs to fronts: which point a method has at a level, and who is ahead of whom by how much."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality import Resampled

OWN = ("pruning", "precision", "rates", "rates_pruning", "together")
"""This project's methods."""
LABELS = {
    "plain": "plain FP32",
    "fp16": "FP16 tables",
    "rounding": "rounding after training",
    "magnitude": "magnitude pruning after training",
    "hashing": "hashing trick",
    "qr": "quotient–remainder",
    "rows": "row pruning (K = 1)",
    "pep": "learned thresholds (PEP-like)",
    "restart": "control: tables started anew",
    "pruning": "DimensionPruning",
    "precision": "MixedPrecisionSearch",
    "rates": "FrequencyAwareLR",
    "rates_pruning": "rates + pruning",
    "together": "all three",
}
TRAINED_FORMS = ("as trained", "packed", "sparse")
"""The form that a method trains; others are made after training."""
TOLERANCE = 0.97
"""A point counts at a level from this share of it on."""
DRAWS = 200


@dataclass(kw_only=True, eq=False)
class Point:
    """One form of one method at one level, over seeds.

    Args:
        family: Key of :data:`LABELS`.
        method: What was trained.
        form: Served form.
        level: Level that was asked for.
        scale: Factor on the rate.
        seeds: Figures by seed.
    """

    family: str
    method: str
    form: str
    level: int
    scale: float
    seeds: dict[int, dict[str, float]] = field(default_factory=dict)
    files: dict[int, Path] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Method, level and form; unique within a data set."""
        return f"{self.method} {self.level}, {self.form}"

    @property
    def own(self) -> bool:
        """Whether the method is this project's."""
        return self.family in OWN

    def mean(self, key: str, seeds: Iterable[int] | None = None) -> float:
        """Mean of a figure over seeds."""
        return float(np.mean([self.seeds[seed][key] for seed in (self.seeds if seeds is None else seeds)]))

    @cached_property
    def draws(self) -> dict[int, np.ndarray]:
        """AUC and NE under resampled test rows by seed, ``(draws, 2)``; the same rows for every point of a set."""
        found = {}
        for seed, path in self.files.items():
            with np.load(path) as arrays:
                labels, scores = arrays["labels"].astype(np.float64), arrays[self.form].astype(np.float64)
            sample, rng = Resampled(labels, scores), np.random.default_rng(0)
            rows = labels.size
            weights = (np.bincount(rng.integers(0, rows, rows), minlength=rows) for _ in range(DRAWS))
            found[seed] = np.array([(sample.auc(w), sample.ne(w)) for w in weights])
        return found


def family_of(method: str, form: str) -> str:
    """Who a form counts for: what is done to plain tables after training is a method of its own.

    Example:
        >>> family_of("plain", "8 bits"), family_of("hashing", "8 bits"), family_of("plain", "sparse 10")
        ('rounding', 'hashing', 'magnitude')
    """
    if method != "plain" or form == "as trained":
        return method
    return "magnitude" if form.startswith("sparse") else "rounding"


def points_of(results: Sequence[tuple[dict[str, Any], Path]], scales: dict[str, float]) -> list[Point]:
    """Collect runs to points.

    Args:
        results: Results of runs of one data set, with the files of their predictions.
        scales: Factor on the rate that counts, by method.
    """
    points: dict[tuple[str, int, str], Point] = {}
    for result, path in results:
        run = result["run"]
        if run["scale"] != scales[run["method"]]:
            continue
        for form, figures in result.get("forms", {}).items():
            key = (run["method"], run["level"], form)
            family = family_of(run["method"], form)
            names = {"method": run["method"], "form": form, "level": run["level"], "scale": run["scale"]}
            point = points.setdefault(key, Point(family=family, **names))
            point.seeds[run["seed"]] = {
                "auc": figures["test_auc"],
                "ne": figures["test_ne"],
                "val_ne": figures["val_ne"],
                "training_ratio": result["plain"]["training"] / result["training_bytes"],
                "serving_ratio": result["plain"]["weights"] / figures["serving_bytes"],
                "training_bytes": result["training_bytes"],
                "serving_bytes": figures["serving_bytes"],
            }
            point.files[run["seed"]] = path
    return list(points.values())


def best_at(points: Iterable[Point], axis: str, level: float, plain: Point) -> Point | None:
    """The point with the lowest validation NE, against plain on the same seeds, among those that are small enough.

    Args:
        points: Points to choose from.
        axis: ``training`` or ``serving``. In training only the form counts that is trained.
        level: Plain over held bytes.
        plain: The plain point.
    """
    fitting = [
        point
        for point in points
        if point.mean(f"{axis}_ratio") >= TOLERANCE * level and (axis == "serving" or point.form in TRAINED_FORMS)
    ]

    def loss(point: Point) -> float:
        seeds = sorted(set(point.seeds) & set(plain.seeds))
        return point.mean("val_ne", seeds) - plain.mean("val_ne", seeds)

    return min((point for point in fitting if set(point.seeds) & set(plain.seeds)), key=loss, default=None)


def difference(mine: Point, other: Point) -> dict[str, Any]:
    """Test AUC and NE of one point less those of another, on the seeds of both, with paired 95 % intervals."""
    seeds = sorted(set(mine.seeds) & set(other.seeds))
    if not seeds:
        raise ValueError(f"{mine.method} and {other.method} have no seed in common")
    drawn = np.mean([mine.draws[seed] - other.draws[seed] for seed in seeds], axis=0)
    low, high = np.percentile(drawn, (2.5, 97.5), axis=0)
    return {
        "seeds": seeds,
        "auc": mine.mean("auc", seeds) - other.mean("auc", seeds),
        "auc_interval": [float(low[0]), float(high[0])],
        "ne": mine.mean("ne", seeds) - other.mean("ne", seeds),
        "ne_interval": [float(low[1]), float(high[1])],
    }


def verdict(found: dict[str, Any]) -> str:
    """Whether a difference of AUC has a sign.

    Example:
        >>> verdict({"auc_interval": [0.001, 0.002]}), verdict({"auc_interval": [-0.001, 0.002]})
        ('win', 'level')
    """
    low, high = found["auc_interval"]
    return "win" if low > 0 else "loss" if high < 0 else "level"


def record(point: Point, plain: Point | None = None) -> dict[str, Any]:
    """A point for JSON."""
    found: dict[str, Any] = {
        "name": point.name,
        "family": point.family,
        "label": LABELS[point.family],
        "own": point.own,
        "method": point.method,
        "form": point.form,
        "level": point.level,
        "scale": point.scale,
        "seeds": sorted(point.seeds),
        "auc": point.mean("auc"),
        "auc_std": float(np.std([figures["auc"] for figures in point.seeds.values()])),
        "ne": point.mean("ne"),
        "val_ne": point.mean("val_ne"),
        "training_ratio": point.mean("training_ratio"),
        "serving_ratio": point.mean("serving_ratio"),
        "training_bytes": point.mean("training_bytes"),
        "serving_bytes": point.mean("serving_bytes"),
    }
    if plain is not None and point is not plain and set(point.seeds) & set(plain.seeds):
        found["to_plain"] = difference(point, plain)
    return found


def compare(points: Sequence[Point], levels: Sequence[int]) -> list[dict[str, Any]]:
    """Our best point against each other family's best, on both axes at every level; points by their names."""
    [plain] = [point for point in points if point.family == "plain"]
    rows = []
    for axis in ("training", "serving"):
        for level in levels:
            ours = best_at([point for point in points if point.own], axis, level, plain)
            for family in LABELS:
                if family in OWN or (family == "plain" and level > 1):
                    continue
                theirs = best_at([point for point in points if point.family == family], axis, level, plain)
                row: dict[str, Any] = {"axis": axis, "level": level, "family": family}
                row["ours"] = None if ours is None else ours.name
                row["theirs"] = None if theirs is None else theirs.name
                if ours is not None and theirs is not None and set(ours.seeds) & set(theirs.seeds):
                    row["difference"] = difference(ours, theirs)
                    row["verdict"] = verdict(row["difference"])
                rows.append(row)
    return rows


def read(folder: Path) -> list[tuple[dict[str, Any], Path]]:
    """Results of all runs of a data set, with the files of their predictions."""
    return [(json.loads(path.read_text()), path.with_suffix(".npz")) for path in sorted(folder.glob("*.json"))]

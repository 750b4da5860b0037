"""Which runs make the Pareto fronts, in which order, and at which rates."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.datasets import CACHE
from benchmarks.peers.cases import METHODS

RUNS = CACHE / "pareto-runs"
TUNED = ("criteo_80k",)
"""Sets on which a method has its rate from three, at :data:`TUNING_LEVEL` on seed 0; else the plain one's."""
NOT_TUNED = ("fp16", "restart", "rates", "pep", "rates_pruning", "together")
SCALES, TUNING_LEVEL = (0.5, 1.0, 2.0), 10


@dataclass(frozen=True, kw_only=True, order=True)
class Run:
    """One training run.

    Args:
        dataset: Name of the data set.
        method: One of :data:`~benchmarks.peers.cases.METHODS`.
        level: Its level.
        seed: Seed of everything.
        scale: Factor on the rate of the tables.
    """

    dataset: str
    method: str
    level: int
    seed: int
    scale: float = 1.0

    @property
    def path(self) -> Path:
        """File of the result, without its ending."""
        return RUNS / self.dataset / f"{self.method}-{self.level}-x{self.scale:g}-s{self.seed}"

    @property
    def exists(self) -> bool:
        """Whether it was made."""
        return Path(f"{self.path}.json").exists()


Plan = tuple[tuple[str, dict[str, tuple[int, ...]]], ...]
FEW = {"plain": (1,), "pruning": (5,), "hashing": (5,), "precision": (10,), "restart": (1,)}
MORE = {
    "rows": (5,),
    "pruning": (2, 10),
    "hashing": (2, 10),
    "precision": (5, 20),
    "qr": (10,),
}
REST = {"hashing": (20, 50), "rows": (2, 10), "together": (20,), "pruning": (20,), "fp16": (1,), "pep": (5,)}
BOOKS = {"plain": (1,), "pruning": (2, 5, 10, 20), "hashing": (10, 50), "precision": (10, 50)}
PLAN: Plan = (
    ("book_crossing", BOOKS),
    ("movielens_1m", FEW),
    ("us_flights", FEW),
    ("book_crossing", {"restart": (1,), "rows": (10,)}),
    ("large", {"plain": (1,), "pruning": (10,), "hashing": (10,), "precision": (10,)}),
    ("movielens_1m", MORE),
    ("us_flights", MORE),
    ("book_crossing", {"together": (20,), "qr": (10,), "hashing": (2, 5, 20), "precision": (5, 20), "rows": (5, 20)}),
    ("large", {"rows": (10,), "qr": (10,), "hashing": (50,), "precision": (50,), "restart": (1,), "pruning": (20,)}),
    ("movielens_1m", REST),
    ("us_flights", REST),
    ("book_crossing", {"qr": (50,), "fp16": (1,)}),
)
"""What is made after Criteo on one seed, what is needed most first. ``pep`` is left out on the books, where Adam takes
minutes per epoch."""
ONCE = ("pep", "rates", "rates_pruning", "fp16")
"""Methods that further seeds leave out."""


def queue_of() -> Iterator[Run]:
    """All runs, those that are needed most first; rates that were tuned are read from the runs before."""
    for method in METHODS:
        yield from tuning_runs("criteo_80k", method)
    yield from _levels("criteo_80k", 0, METHODS)
    for dataset, methods in PLAN:
        yield from _levels(dataset, 0, methods)
    for seed in (1, 2):
        yield from _levels("criteo_80k", seed, METHODS)
        yield from _levels("book_crossing", seed, BOOKS)


def _levels(dataset: str, seed: int, methods: dict[str, tuple[int, ...]]) -> Iterator[Run]:
    for method in methods:
        if seed and method in ONCE:
            continue
        scale = tuned_scale(dataset, method)
        for level in methods[method]:
            yield Run(dataset=dataset, method=method, level=level, seed=seed, scale=scale)


def tuned_scale(dataset: str, method: str) -> float:
    """Factor on the rate that was best by validation on the tuning runs of a method."""
    found = {}
    for run in tuning_runs(dataset, method):
        if run.exists:
            result = json.loads(Path(f"{run.path}.json").read_text())
            if "history" in result:
                found[run.scale] = next(iter(result["forms"].values()))["val_ne"]
    return min(found, key=found.__getitem__) if found else 1.0


def tuning_runs(dataset: str, method: str) -> list[Run]:
    """Runs that a method has for its rate."""
    if dataset not in TUNED or method in NOT_TUNED:
        return []
    level = TUNING_LEVEL if TUNING_LEVEL in METHODS[method] else METHODS[method][0]
    return [Run(dataset=dataset, method=method, level=level, seed=0, scale=scale) for scale in SCALES]

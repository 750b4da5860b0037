"""Two callbacks in one trainer, in both orders of the list."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_embcomp import PooledThresholding

from .bench import Bench, assert_same, everything
from .matrix import DIM, MATRIX, OWNERS, PAIRS, Case, on_one_rank, sharded

SECOND: dict[str, dict[str, Any]] = {
    "ModelExport": {"name": "served too"},
    "GradientThresholding": {"parameters": "model.over_arch.*"},
    "EmbeddingTrafficMonitor": {},
    "ReshardOnImbalance": {},
}
"""What sets a second instance of a class apart from the first; other tables, where nothing is said."""
# Every callback can live with SGD in the tables.
TABLES: dict[str, Any] = {"embedding_optimizer": "sgd", "embedding_lr": 1.0, "dense_optimizer": "sgd", "dense_lr": 0.05}


def case_of(one: str, other: str) -> Case:
    """A case in which both can run."""
    names, settings, strategy = {one, other}, TABLES, MATRIX[one].strategy
    several = any(MATRIX[name].processes > 1 for name in names)
    if several:
        more: dict[str, Any] = {}
        if "EmbeddingTrafficMonitor" in names:
            more["codecs"] = PooledThresholding(row_dim=DIM, forward_density=0.5)
        if "ReshardOnImbalance" in names:
            more["planner"] = on_one_rank
        if "ReshardOnImbalance" in names and not names & set(OWNERS):
            more |= {"fused_params": {"optimizer": "sgd", "learning_rate": 1.0}}
            settings = {**TABLES, "embedding_optimizer": "none"}
        strategy = sharded(**more)
        if names == {"ModelExport", "GradientThresholding"}:
            settings, strategy = {**TABLES, "embedding_optimizer": "none"}, MATRIX["GradientThresholding"].strategy
    return replace(MATRIX[one], settings=settings, strategy=strategy, processes=2 if several else 1)


def callbacks(one: str, other: str, folder: Path) -> list[pl.Callback]:
    more = SECOND.get(one, {"tables": "t_feature_1"}) if one == other else {}
    return [MATRIX[one].make(folder), MATRIX[other].make(folder, **more)]


def fit_pair(one: str, other: str, folder: Path, reverse: bool) -> dict[str, Any]:
    """Everything that a fit leaves, what it has exported included."""
    folder = folder / f"{one} {other} {reverse}"
    folder.mkdir(exist_ok=True)
    bench, listed = Bench(case_of(one, other), folder), callbacks(one, other, folder)
    module = bench.model()
    bench.fit(module, *(reversed(listed) if reverse else listed), max_epochs=1)
    files = {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*.safetensors"))}
    return {**everything(module), **{k: torch.frombuffer(bytearray(v), dtype=torch.uint8) for k, v in files.items()}}


def check_pair(one: str, other: str, folder: Path) -> None:
    """Both orders leave the same, bit for bit; or both are refused, as :data:`~tests.conformance.matrix.PAIRS` says."""
    refusal = PAIRS.get(frozenset({one, other}))
    if refusal is None:
        assert_same(fit_pair(one, other, folder, False), fit_pair(one, other, folder, True))
        return
    for reverse in (False, True):
        try:
            fit_pair(one, other, folder, reverse)
        except refusal.error as error:
            assert re.search(refusal.says, str(error)), error
        else:
            raise AssertionError(f"{one} and {other} are not refused")

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from lightning_embcomp import (
    CounterSettings,
    DimensionPruning,
    FrequencyAwareLR,
    Granularity,
    MixedPrecisionSearch,
    PrecisionSearch,
)
from lightning_embcomp.engine.host import HeldTable
from lightning_embcomp.engine.layout import LogicalTable
from lightning_embcomp.engine.memory import table_memory
from lightning_embcomp.methods.fiited.module import DimensionPruner
from lightning_embcomp.planners import TableFootprint, callback_footprints, engine_footprint
from lightning_embcomp.planners.footprint import most_used
from lightning_embcomp.surgery import build_host
from lightning_embcomp.tables import find_hosts

from .models import bags

SIZES = {"large": (20_000, 32), "small": (500, 32)}


def test_most_used_keeps_the_most_used() -> None:
    """Against every chunk of every row, sorted."""
    rows, dims, chunks, falloff = (4000, 900), (16, 32), 4, 0.3
    costs = [(dim / chunks,) * chunks for dim in dims]
    budget = 0.3 * sum(n * dim for n, dim in zip(rows, dims, strict=True))
    value, cost, table, chunk = [], [], [], []
    for t, n in enumerate(rows):
        ranks = np.arange(1, n + 1)
        worth = 1 / (ranks * (1 / ranks).sum())
        for c in range(chunks):
            value.append(worth * falloff**c)
            cost.append(np.full(n, costs[t][c]))
            table.append(np.full(n, t))
            chunk.append(np.full(n, c))
    order = np.argsort(-np.concatenate(value), kind="stable")
    kept = order[np.concatenate(cost)[order].cumsum() <= budget]
    wanted = np.zeros((2, chunks))
    np.add.at(wanted, (np.concatenate(table)[kept], np.concatenate(chunk)[kept]), 1)
    found = np.array(most_used(rows, costs, budget, falloff))
    np.testing.assert_allclose(found, wanted / np.array(rows)[:, None], atol=2e-3)


def test_a_lookup_reads_what_frequent_rows_store() -> None:
    rows, live = 10_000, (0.5, 0.1)
    probability = 1 / np.arange(1, rows + 1)
    probability /= probability.sum()
    stored = (np.arange(rows)[:, None] < np.array(live) * rows).mean(1)
    found = TableFootprint(live=live).read(rows, slice(0, 2))
    assert found == pytest.approx(float((probability * stored).sum()), rel=1e-3)


def test_first_rows_may_hold_everything() -> None:
    footprint = TableFootprint(live=(0.5, 0.25))
    quarters = [footprint.stored(100, first, 25, slice(0, 2)) for first in (0, 25, 50, 75)]
    assert quarters == [(1.0, 1.0), (1.0, 0.25), (0.5, 0.25), (0.5, 0.25)]
    assert footprint.stored(100, 100, 0, slice(0, 2)) == (0.0, 0.0)


def test_parts_by_columns_hold_their_own_chunks() -> None:
    footprint = TableFootprint(live=(0.8, 0.4, 0.2, 0.1))
    assert footprint.chunks_of(64, 32, 32) == slice(2, 4)
    assert footprint.chunks_of(64, 0, 24) is None
    assert TableFootprint(live=(0.5,)).chunks_of(64, 24, 12) == slice(0, 1)
    # 1.5 of 4 chunks per row on average: at most 0.75 of the rows store two, 0.375 all.
    assert footprint.stored(10, 0, 10, slice(0, 2)) == pytest.approx((0.8, 0.75))
    assert footprint.stored(10, 0, 10, slice(2, 4)) == pytest.approx((0.375, 0.375))
    assert replace(footprint, prefix=False).chunks_of(64, 32, 32) is None
    assert replace(footprint, prefix=False).chunks_of(64, 0, 64) == slice(0, 4)


@pytest.mark.parametrize("wrong", [{"live": ()}, {"live": (1.5,)}, {"row_bytes": -1.0}, {"state_bytes": float("nan")}])
def test_impossible_footprints_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TableFootprint(**wrong)


def test_one_method_removes_weights() -> None:
    with pytest.raises(ValueError, match="two methods remove weights"):
        TableFootprint(live=(0.5,)).beside(TableFootprint(live=(0.9, 0.1)))


@pytest.mark.parametrize(
    ("settings", "granularity"),
    [
        ({"target": 0.65}, Granularity()),
        ({"target": 0.9}, Granularity(chunks=2, falloff=0.7)),
        ({"target": 0.5, "scope": "table"}, Granularity()),
        ({"target": 0.8}, Granularity(layout="chunks")),
        ({"budget": "1.2MB"}, Granularity()),
    ],
)
def test_pruning_is_foreseen(settings: dict, granularity: Granularity) -> None:
    """Against the engine that a run starts with."""
    module = torch.nn.ModuleDict({"bags": bags(SIZES)})
    callback = DimensionPruning(**settings, granularity=granularity)
    [view] = find_hosts(module)
    expected = callback_footprints([view], [callback])
    host = build_host(view, callback.table_cuts(view.tables), torch.device("cpu"))
    pruner = DimensionPruner(
        [HeldTable(host, t, table.name) for t, table in enumerate(view.tables)],
        target=callback.target,
        budget=callback.budget,
        scope=callback.scope,
        granularity=granularity,
    )
    pruner.start()
    held = foreseen = 0.0
    for t, table in enumerate(view.tables):
        found, wanted = engine_footprint(host.engine, t), expected[table.name]
        # Equally worthy chunks are kept by their order, and small tables are rounded up to a block of the router.
        atol = 0.02 if granularity.layout == "prefix" else 1.0
        np.testing.assert_allclose(found.live, wanted.live, atol=atol)
        assert found.row_bytes == pytest.approx(wanted.row_bytes, abs=0.1)
        assert found.lookup_bytes == wanted.lookup_bytes
        held += table_memory(host.engine, t).weights
        foreseen += wanted.kept * table.rows * table.dim * 4
    assert held == pytest.approx(foreseen, rel=0.01)


def test_hand_worked_overheads() -> None:
    """Router: 4 chunks need 8 words of 8 bytes for 64 rows, an uncut table 2. Utilities: 2 bytes."""
    module = torch.nn.ModuleDict({"bags": bags(SIZES), "other": bags({"plain": (100, 16)})})
    pruning = DimensionPruning(target=0.5, tables="*large")
    rates = FrequencyAwareLR(tables="bags.*", counter=CounterSettings(encoding="exact"))
    search = MixedPrecisionSearch(ratio=16, tables="bags.*", search=PrecisionSearch(frequency="rank"))
    found = callback_footprints(find_hosts(module), [pruning, rates, search])
    assert set(found) == {"bags.large", "bags.small"}
    large, small = found["bags.large"], found["bags.small"]
    assert large.kept == pytest.approx(0.5)
    assert large.row_bytes == pytest.approx(1 + 2 + 4 + 2 / 64)
    assert small.live == (1.0,) and small.row_bytes == pytest.approx(0.25 + 2 + 4 + 2 / 64)
    assert (large.lookup_bytes, small.lookup_bytes) == (64, 16)
    assert large.serving_bits == small.serving_bits == 2


def test_counter_sgd_keeps_three_numbers_per_row() -> None:
    module = torch.nn.ModuleDict({"bags": bags(SIZES, torch.optim.SGD)})
    found = callback_footprints(find_hosts(module), [FrequencyAwareLR(backend="fbgemm", tables="*small")])
    assert found["bags.small"].state_bytes == 12
    assert found["bags.large"] == TableFootprint(row_bytes=0.25, lookup_bytes=16)


def test_budgets_below_the_overheads_are_refused() -> None:
    module = torch.nn.ModuleDict({"bags": bags(SIZES)})
    with pytest.raises(ValueError, match="a budget of 61,500 bytes is not above the 61,500 bytes"):
        callback_footprints(find_hosts(module), [DimensionPruning(budget=61_500)])


def test_parts_of_tables_have_no_footprint() -> None:
    from lightning_embcomp.engine.layout import Shard
    from lightning_embcomp.engine.routed import RoutedEmbeddings, RoutedOptions

    part = LogicalTable(name="t", rows=10, dim=8, chunks=2, shard=Shard(rows=20, dim=8))
    engine = RoutedEmbeddings([part], [0], [False], RoutedOptions(optimizer=None))
    with pytest.raises(ValueError, match="'t' is sharded"):
        engine_footprint(engine, 0)

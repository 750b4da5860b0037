"""Tables that a strategy shards, in two processes, against the same tables in one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_embcomp.engine.counters import CounterSettings, RowCounters, agree_on_time, share_counters
from lightning_embcomp.engine.group import Group
from lightning_embcomp.engine.layout import LogicalTable, Shard
from lightning_embcomp.engine.optimizer import FusedOptimizerSpec
from lightning_embcomp.engine.rates import KnownFrequencies
from lightning_embcomp.engine.routed import RoutedEmbeddings, RoutedOptions
from lightning_embcomp.methods.frequency_lr.agreement import refused_together
from tests.processes import run_processes

ROWS = (70, 131, 3)  # of the worker's tables


@pytest.mark.parametrize(
    ("processes", "kinds"),
    [(2, ["table_wise", "row_wise"]), (2, ["column_wise", "data_parallel", "mixed"]), (4, ["row_wise"])],
)
def test_training_equals_unsharded(processes: int, kinds: list[str], tmp_path: Path) -> None:
    """Rows, counters, clocks, logged rates and bytes of every form; of four processes one holds no row of a table."""
    draw = np.random.default_rng(0)
    counts = {f"t{t}": draw.integers(0, 60, rows) for t, rows in enumerate(ROWS)}
    np.savez(tmp_path / "counts.npz", allow_pickle=False, **counts)
    said = run_processes(
        processes, "tests.methods.frequency_lr.sharded_engines_worker", str(tmp_path / "counts.npz"), *kinds
    )
    assert all("all checks passed" in text for text in said)


def parts() -> list[RoutedEmbeddings]:
    """A table of 300 rows behind one of 1000, as a whole and as its rows from 120 on."""
    whole = [LogicalTable(name="a", rows=1000, dim=4), LogicalTable(name="b", rows=300, dim=4)]
    part = LogicalTable(name="b", rows=180, dim=4, shard=Shard(rows=300, dim=4, first_row=120, number=1120))
    options = RoutedOptions(optimizer=FusedOptimizerSpec(kind="sgd"))
    return [RoutedEmbeddings(whole, options=options), RoutedEmbeddings([part], options=options)]


def test_sweeps_round_a_part_as_the_whole() -> None:
    whole, part = parts()
    settings = CounterSettings(half_life=1.0)
    counters = [share_counters(whole, [1], settings, "test"), share_counters(part, [0], settings, "test")]
    values = [counters[0].values[1], counters[1].values[0]]
    for stored in values:
        assert stored is not None
        stored.fill_(120)
    for _ in range(8):
        for found in counters:
            found.begin_step()
    assert values[0] is not None and values[1] is not None
    assert torch.equal(values[0][120:], values[1]) and values[1].unique().numel() > 1


def test_state_says_what_is_per_row() -> None:
    whole, _ = parts()
    counters = share_counters(whole, [1], CounterSettings(), "test")
    assert counters.row_tensors(0) == frozenset()
    assert counters.tensors(1).keys() - counters.row_tensors(1) == {"clock"}
    known = KnownFrequencies([3], log=False)
    assert known.row_tensors(0) == frozenset()
    known.set_table(0, torch.tensor([2.0, 4.0, 8.0]).double(), torch.tensor(1.0).double())
    assert known.tensors(0).keys() - known.row_tensors(0) == {"unit"}
    assert known.frequency(0).tolist() == [2.0, 4.0, 8.0] and known.stored(0).tolist() == [2.0, 4.0, 8.0]


def test_counters_that_read_no_clock_keep_theirs() -> None:
    counters = RowCounters([3], CounterSettings(), "test", torch.device("cpu"))
    counters.step = 7
    counters.restored()
    assert counters.step == 7


def test_engines_agree_on_the_latest_step() -> None:
    engines = parts()
    first, second = (share_counters(engine, [0], CounterSettings(half_life=2.0), "test") for engine in engines)
    for _ in range(5):
        first.begin_step()
    agree_on_time([engines], Group())
    assert (first.step, first.halvings) == (second.step, second.halvings) == (5, 2)
    agree_on_time([[parts()[0]]], Group())  # nothing counts there


def test_a_refusal_in_one_process_goes_through() -> None:
    with pytest.raises(LookupError, match="not a refusal"):
        with refused_together(Group()):
            raise LookupError("not a refusal")
    with pytest.raises(ValueError, match="no such table"):
        with refused_together(Group()):
            raise ValueError("no such table")
    with refused_together(Group()):
        pass

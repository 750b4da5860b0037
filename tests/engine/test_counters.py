"""The counters of an engine: half-lives, sweeps, sharing, bytes, copies."""

import copy
import math
import pickle

import pytest
import torch

from lightning_embcomp.engine.counters import (
    MAX_LOG_HALF_LIFE,
    CounterConflictError,
    CounterSettings,
    RowCounters,
    counters_of,
    share_counters,
)
from lightning_embcomp.engine.memory import engine_bytes, table_memory
from lightning_embcomp.engine.plan import FixedPlan
from lightning_embcomp.engine.routed import RoutedEmbeddings
from lightning_embcomp.kernels.count import nearest_code

from .engines import TABLES, assert_same_state, batch, make_engine, random_codes, snapshot, train

EXACT = CounterSettings(encoding="exact", counted="presence")


def count_by_hand(steps: int, half_life: float | None = None) -> list[torch.Tensor]:
    """Presence counts after some of the batches that ``train`` uses."""
    counts = [torch.zeros(t.rows, dtype=torch.float64) for t in TABLES]
    for step in range(steps):
        ids, offsets, _ = batch(step)
        for t in range(3):
            counts[t] *= 1.0 if half_life is None else 0.5 ** (1 / half_life)
        seen = [torch.zeros(t.rows, dtype=torch.bool) for t in TABLES]
        for feature, t in enumerate((0, 0, 1, 2)):
            seen[t][ids[int(offsets[8 * feature]) : int(offsets[8 * feature + 8])]] = True
        for t in range(3):
            counts[t] += seen[t]
    return counts


@pytest.mark.parametrize("kind", ["sgd", "rowwise_adagrad", "adagrad", None])
def test_counting_goes_with_every_optimizer(kind: str) -> None:
    """Whoever needs frequencies can count, whatever trains the rows; and training is not touched by it."""
    engine, plain = (make_engine(kind, random_codes(1)) for _ in range(2))  # type: ignore[arg-type]
    counters = share_counters(engine, range(3), EXACT, "test")
    train(engine, 12)
    train(plain, 12)
    for t, expected in enumerate(count_by_hand(12)):
        assert torch.equal(counters.counts(t), expected)
    one, two = snapshot(engine), snapshot(plain)
    assert_same_state({key: one[key] for key in two}, two)


def test_half_precision_rows_are_counted() -> None:
    engine = make_engine("sgd", dtype=torch.float16)
    counters = share_counters(engine, range(3), EXACT, "test")
    train(engine, 3)
    assert torch.equal(counters.counts(0), count_by_hand(3)[0])


@pytest.mark.parametrize("half_life", [0.3, 3.0, 40.0])
def test_half_lives_survive_sweeps(half_life: float) -> None:
    engine = make_engine("sgd")
    settings = CounterSettings(encoding="exact", counted="presence", half_life=half_life)
    counters = share_counters(engine, range(3), settings, "test")
    train(engine, 120)
    for t, expected in enumerate(count_by_hand(120, half_life)):
        torch.testing.assert_close(counters.counts(t), expected, rtol=1e-5, atol=1e-9)
    assert (counters.halvings > 0) == (half_life < 4)


def test_sweeps_of_log_counters_have_no_bias() -> None:
    counters = RowCounters([20_000], CounterSettings(half_life=1.0), "test", torch.device("cpu"))
    counters.watch(0)
    values = counters.values[0]
    assert values is not None
    values.fill_(120)
    before = counters.counts(0).mean()
    for _ in range(8):
        counters.begin_step()
    assert counters.halvings == 8 and counters.exponent == 0.0
    assert float(counters.counts(0).mean()) == pytest.approx(float(before) * 2.0**-8, rel=0.01)


def test_log_counters_of_a_busy_row_do_not_run_full() -> None:
    """A row in half of a large batch, at the largest half-life: its count must not meet the end of the scale."""
    half_life, per_step = MAX_LOG_HALF_LIFE, 2048
    steady = per_step * half_life / math.log(2)
    largest = steady * 2.0 ** (2 + 1 / half_life)  # what is stored just before a sweep
    assert float(nearest_code(torch.tensor([largest], dtype=torch.float64))[0]) < 250


def test_counters_do_not_move_with_rows() -> None:
    engine = make_engine("sgd")
    counters = share_counters(engine, range(3), EXACT, "test")
    train(engine, 5)
    engine.move(FixedPlan([0, 1, 0]))
    for t, expected in enumerate(count_by_hand(5)):
        assert torch.equal(counters.counts(t), expected)


def test_only_watched_tables_take_memory() -> None:
    engine = make_engine("sgd")
    for encoding, size in (("log", 1), ("exact", 4)):
        engine = make_engine("sgd")
        counters = share_counters(engine, [2], CounterSettings(encoding=encoding, counted="presence"), "test")  # type: ignore[arg-type]
        assert [table_memory(engine, t).statistics for t in range(3)] == [0, 0, 67 * size + 16]
        assert sum(table_memory(engine, t).total for t in range(3)) == engine_bytes(engine)
        with pytest.raises(ValueError, match="table 0 is not counted"):
            counters.counts(0)


def test_one_set_of_counters_per_engine() -> None:
    engine = make_engine("sgd")
    assert counters_of(engine) is None
    counters = share_counters(engine, [0], CounterSettings(), "Rates[*]")
    assert share_counters(engine, [2], CounterSettings(), "Precision[*]") is counters
    assert [values is not None for values in counters.values] == [True, False, True]
    with pytest.raises(CounterConflictError, match=r"Precision\[\*\] and Rates\[\*\] count .* half_life=3.0.*None"):
        share_counters(engine, [0], CounterSettings(half_life=3.0), "Precision[*]")


@pytest.mark.parametrize("settings", [CounterSettings(), CounterSettings(encoding="exact", half_life=2.0)])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict"])
def test_copies_count_on_their_own(how: str, settings: CounterSettings) -> None:
    engine = make_engine("sgd")
    share_counters(engine, range(3), settings, "test")
    train(engine, 90)
    other: RoutedEmbeddings
    if how == "deepcopy":
        other = copy.deepcopy(engine)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(engine))
    else:
        other = make_engine("sgd")
        share_counters(other, range(3), settings, "test")
        other.load_state_dict(snapshot(engine))
    before = snapshot(engine)
    train(other, 5, first=90)
    assert_same_state(before, snapshot(engine))
    train(engine, 5, first=90)
    assert_same_state(snapshot(engine), snapshot(other))

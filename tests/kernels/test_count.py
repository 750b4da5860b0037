"""Counters: exact ones against NumPy, log counters by their statistics, and both twins against each other."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_embcomp.engine.layout import LogicalTable
from lightning_embcomp.kernels.count import LOG_VALUES, RowCounts, count_rows, decode, nearest_code, uniform
from lightning_embcomp.kernels.count.cpu import _IDS_PER_THREAD
from lightning_embcomp.kernels.dispatch import force_backend
from lightning_embcomp.kernels.types import BagLayout

from .cases import LARGE, Case, make_case, threads

PARTS = tuple(LogicalTable(name=f"t{t}", rows=10, dim=4) for t in range(3))
ENCODING = {torch.uint8: 1, torch.int32: 2, torch.float32: 3}


def row_counts(
    tables: list[Tensor | None], increment: float = 1.0, *, occurrences: bool = False, seed: int = 1
) -> RowCounts:
    rows = [0 if t is None else t.numel() for t in tables]
    return RowCounts(
        tables=tuple(tables),
        address=torch.tensor([0 if t is None else t.data_ptr() for t in tables]),
        encoding=torch.tensor([0 if t is None else ENCODING[t.dtype] for t in tables]),
        first_row=torch.tensor([sum(rows[:i]) for i in range(len(rows))]),
        increment=torch.tensor([0.0 if t is None else increment for t in tables], dtype=torch.float64),
        occurrences=torch.full((len(tables),), int(occurrences)),
        gain=torch.zeros(len(tables)),
        cap=torch.full((len(tables),), torch.inf),
        floor=torch.ones(len(tables), dtype=torch.float64),
        seed=torch.tensor([seed]),
    )


def occurrences_of(case: Case) -> list[np.ndarray]:
    """Lookups of every row of every table."""
    counts = [np.zeros(table.rows, np.int64) for table in case.tables]
    for _, _, _, t, row, _ in case.occurrences():
        counts[t][row] += 1
    return counts


def one_bag(ids: Tensor, rows: int) -> tuple[Tensor, Tensor, BagLayout]:
    """The ids as one bag of one table."""
    case = make_case((LogicalTable(name="t", rows=rows, dim=4),), (0,), (False,), batch_size=1)
    return ids, torch.tensor([0, ids.numel()]), case.layout()


@pytest.mark.parametrize("occurrences", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.float32])
def test_exact_counts(backend: str, case: Case, dtype: torch.dtype, occurrences: bool) -> None:
    tables: list[Tensor | None] = [torch.full((t.rows,), 3, dtype=dtype) for t in case.tables]
    counts = row_counts(tables, 1.0, occurrences=occurrences)
    count_rows(counts, case.ids_tensor(torch.int32), case.offsets_tensor(), case.layout())
    for found, seen in zip(tables, occurrences_of(case), strict=True):
        assert found is not None
        np.testing.assert_array_equal(found.numpy(), 3 + (seen if occurrences else np.minimum(seen, 1)))


def test_tables_without_counters_are_left_out(backend: str) -> None:
    case = make_case()
    kept, still = torch.zeros(130, dtype=torch.int32), torch.zeros(67, dtype=torch.int32)
    counts = row_counts([kept, None, still])
    counts.increment[2] = 0.0
    count_rows(counts, case.ids_tensor(), case.offsets_tensor(), case.layout())
    np.testing.assert_array_equal(kept.numpy(), np.minimum(occurrences_of(case)[0], 1))
    assert not still.any()


def test_integers_saturate(backend: str) -> None:
    stored = torch.tensor([2**31 - 2, 5], dtype=torch.int32)
    batch = one_bag(torch.tensor([0, 0, 0, 1]), 2)
    count_rows(row_counts([stored], occurrences=True), *batch)
    assert stored.tolist() == [2**31 - 1, 6]


@pytest.mark.parametrize("increment", [1.0, 7.25])
@pytest.mark.parametrize("occurrences", [False, True])
def test_log_counters_of_both_twins_are_equal(case: Case, increment: float, occurrences: bool) -> None:
    results = []
    for backend in ("cpu", "reference"):
        tables: list[Tensor | None] = [torch.arange(t.rows).to(torch.uint8) for t in case.tables]
        with force_backend(backend):
            for seed in range(20):
                counts = row_counts(tables, increment, occurrences=occurrences, seed=seed)
                count_rows(counts, case.ids_tensor(), case.offsets_tensor(), case.layout())
        results.append(tables)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_threads_do_not_change_a_bit() -> None:
    assert len(LARGE.ids) // _IDS_PER_THREAD >= 2
    results = []
    for count in (1, 2):
        tables: list[Tensor | None] = [torch.full((t.rows,), 30, dtype=torch.uint8) for t in LARGE.tables]
        with threads(count):
            count_rows(row_counts(tables, occurrences=True), LARGE.ids_tensor(), LARGE.offsets_tensor(), LARGE.layout())
        results.append(tables)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_parts_of_one_table_count_alike(backend: str, dtype: torch.dtype) -> None:
    """Parts with other columns of the same rows have the same row numbers, hence the same random bits."""
    tables: list[Tensor | None] = [torch.full((t.rows,), 20, dtype=dtype) for t in PARTS]
    case = make_case(PARTS, (0, 1, 2), (False,) * 3, batch_size=64)
    ids = torch.arange(64).remainder(7)
    counts = replace(row_counts(tables, 3.0, occurrences=True), first_row=torch.tensor([40, 40, 50]))
    count_rows(counts, ids.repeat(3), torch.arange(3 * 64 + 1), case.layout())
    first, second, other = (t for t in tables if t is not None)
    assert torch.equal(first, second)
    assert bool((first[:7] > 20).all()) and bool((first[7:] == 20).all())
    if dtype == torch.int32:
        assert first[:7].tolist() == [20 + 3 * int((ids == row).sum()) for row in range(7)]
        assert torch.equal(first, other)


def test_log_codes_reach_a_thousand_million() -> None:
    assert LOG_VALUES[0] == 0 and LOG_VALUES[1] == 1 and LOG_VALUES[255] >= 1e9
    stored = torch.tensor([254, 255], dtype=torch.uint8)
    batch = one_bag(torch.tensor([0, 1]), 2)
    count_rows(row_counts([stored], 1e12), *batch)
    assert stored.tolist() == [255, 255]


@pytest.mark.parametrize("steps", [1, 10, 1000])
@pytest.mark.parametrize("growth", [1.0, 1.01])
def test_log_counters_have_no_bias(steps: int, growth: float) -> None:
    """Over 4000 counters; ``growth`` is what a half-life makes of increments from step to step."""
    rows = 4000
    stored = torch.zeros(rows, dtype=torch.uint8)
    batch = one_bag(torch.arange(rows), rows)
    for step in range(steps):
        count_rows(row_counts([stored], growth**step, seed=step), *batch)
    exact = sum(growth**step for step in range(steps))
    counts = decode(stored).numpy() / exact
    spread = counts.std()
    assert abs(counts.mean() - 1) <= 4 * spread / rows**0.5 + 1e-12
    # The variance of Morris's counter is (b - 1) n (n - 1) / 2; larger increments round fewer times.
    assert spread <= 1.1 * np.sqrt((LOG_VALUES[2] - 2) / 2) + 1e-12


def test_random_bits_of_rows_and_steps_are_independent() -> None:
    draws = torch.stack([uniform(step, torch.arange(2000)) for step in range(20)])
    assert draws.min() >= 0 and draws.max() < 1
    assert abs(float(draws.mean()) - 0.5) < 0.01
    off_diagonal = torch.corrcoef(draws).fill_diagonal_(0).abs().max()
    assert off_diagonal < 0.1


def test_nearest_code_is_within_half_a_code() -> None:
    values = torch.logspace(0, 9, 1000, dtype=torch.float64)
    error = (decode(nearest_code(values)) / values).log().abs()
    assert error[values > 20].max() < 0.06
    assert torch.equal(nearest_code(torch.from_numpy(LOG_VALUES[1:])).long(), torch.arange(1, 256))


def test_the_seed_changes_only_the_rounding() -> None:
    stored = [torch.full((500,), 100, dtype=torch.uint8) for _ in range(2)]
    batch = one_bag(torch.arange(500), 500)
    for seed, values in enumerate(stored):
        count_rows(replace(row_counts([values], 40.0), seed=torch.tensor([seed])), *batch)
    assert not torch.equal(*stored)
    assert set(torch.cat(stored).tolist()) <= {100, 101}

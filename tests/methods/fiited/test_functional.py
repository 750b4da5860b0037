"""The allocation of bytes against a greedy choice over single chunks in NumPy."""

import numpy as np
import pytest
import torch

from lightning_embcomp.methods.fiited.functional import (
    BINS,
    Cells,
    allocate,
    bin_values,
    chunk_factors,
    with_hysteresis,
    zipf_prior,
)


def random_cells(seed: int, size: int = 40) -> Cells:
    """Few different values, so that there are ties of every kind."""
    rng = np.random.default_rng(seed)
    return Cells(
        value=torch.from_numpy(rng.integers(0, 6, size) / 2.0),
        cost=torch.from_numpy(rng.choice([4, 8, 12, 20], size)),
        count=torch.from_numpy(rng.integers(0, 9, size)),
        live=torch.from_numpy(rng.random(size) < 0.5),
        order=torch.from_numpy(rng.integers(0, 4, size)),
    )


def greedy(cells: Cells, budget: int) -> np.ndarray:
    """Chunk by chunk: highest value first, live before dead, lower order first; stop at the first that is too dear."""
    chunks = [
        (-float(cells.value[i]), not bool(cells.live[i]), int(cells.order[i]), i)
        for i in range(cells.value.numel())
        for _ in range(int(cells.count[i]))
    ]
    kept = np.zeros(cells.value.numel(), np.int64)
    for *_, i in sorted(chunks):
        if budget < cells.cost[i]:
            break
        budget -= int(cells.cost[i])
        kept[i] += 1
    return kept


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.35, 0.5, 0.77, 0.999, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(6))
def test_allocation_is_the_greedy_one(seed: int, share: float) -> None:
    cells = random_cells(seed)
    budget = int(share * int((cells.cost * cells.count).sum()))
    kept = allocate(cells, budget)
    np.testing.assert_array_equal(kept.numpy(), greedy(cells, budget))
    spent = int((kept * cells.cost).sum())
    assert spent <= budget
    assert ((kept > 0) & (kept < cells.count)).sum() <= 1
    if share < 1:
        assert budget - spent < int(cells.cost.max())
    else:
        assert torch.equal(kept, cells.count)


def test_a_negative_budget_keeps_nothing() -> None:
    assert not allocate(random_cells(0), -1).any()


def test_ties_keep_what_is_live() -> None:
    cells = Cells(
        value=torch.tensor([1.0, 1.0]),
        cost=torch.tensor([4, 4]),
        count=torch.tensor([3, 3]),
        live=torch.tensor([False, True]),
        order=torch.tensor([0, 1]),
    )
    assert allocate(cells, 12).tolist() == [0, 3]
    assert allocate(cells, 16).tolist() == [1, 3]


@pytest.mark.parametrize(("margin", "wins"), [(0.0, True), (0.09, True), (0.1, False), (0.5, False)])
def test_hysteresis_asks_for_a_clear_gain(margin: float, wins: bool) -> None:
    value, live = torch.tensor([1.1, 1.0], dtype=torch.float64), torch.tensor([False, True])
    cells = Cells(
        value=with_hysteresis(value, live, margin),
        cost=torch.tensor([4, 4]),
        count=torch.tensor([1, 1]),
        live=live,
        order=torch.tensor([0, 0]),
    )
    assert allocate(cells, 4).tolist() == ([1, 0] if wins else [0, 1])


def test_bins_are_the_bit_patterns_of_bfloat16() -> None:
    values = bin_values()
    finite = values[values.isfinite()]
    assert values.shape == (BINS,) and (finite.diff() > 0).all()
    some = torch.tensor([0.0, 1e-30, 0.1, 1.0, 3.3, 1e30], dtype=torch.bfloat16)
    assert torch.equal(values[some.view(torch.int16).long()], some.double())


def test_factors_fall() -> None:
    assert chunk_factors(3, 1.0).tolist() == [1.0, 1.0, 1.0]
    assert chunk_factors(4, 0.25).tolist() == [1.0, 0.25, 0.0625, 0.015625]


@pytest.mark.parametrize("rows", [1, 2, 50, 5000])
def test_zipf_prior(rows: int) -> None:
    prior = torch.cat([zipf_prior(0, rows // 2, rows), zipf_prior(rows // 2, rows, rows)]).double().numpy()
    ranks = np.arange(1, rows + 1)
    wanted = 1 / (ranks * (1 / ranks).sum())
    # The harmonic number is an expansion for large tables, and the values are bfloat16.
    np.testing.assert_allclose(prior, wanted, rtol=0.09 if rows == 1 else 0.03)
    assert (np.diff(prior) <= 0).all()

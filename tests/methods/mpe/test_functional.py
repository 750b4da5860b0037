"""Groups, penalty, selection and budget, against hand-worked examples and brute force."""

import itertools

import numpy as np
import pytest
import torch

from lightning_embcomp.methods.mpe.functional import (
    cheapest_widths,
    group_bounds,
    half_steps,
    initial_steps,
    is_falling,
    largest_likely_width,
    penalty_gradient,
    softmax_gradient,
)
from lightning_embcomp.methods.mpe.groups import GroupBounds, RowGroups, TablePart


def test_group_bounds_by_hand() -> None:
    assert group_bounds(64, 1) == [0, 64]
    assert group_bounds(65, 1) == [0, 64, 65]
    assert group_bounds(700, 130) == [0, 64, 128, 256, 448, 640, 700]  # 130 is rounded up to 192


def test_statistics_of_ordered_and_unordered_tables() -> None:
    """The same 130 rows numbered by frequency and shuffled: rows of the same count share a group."""
    counts = torch.arange(130, 0, -1)
    shuffle = torch.randperm(130, generator=torch.Generator().manual_seed(0))
    whole = GroupBounds([130, 7, 130], [0, 2], [64, 64])
    unordered = whole.by_frequency(2, counts[shuffle])
    groups = RowGroups(whole, [TablePart(table=t, rows=n, dim=4) for t, n in enumerate((130, 7, 130))], {2: unordered})
    assert whole.bounds[0].tolist() == [0, 64, 128, 130] == whole.bounds[2].tolist()
    assert whole.table.tolist() == [0, 0, 0, 2, 2, 2]
    assert whole.sizes().tolist() == [64, 64, 2, 64, 64, 2]
    wanted = [sum(range(67, 131)), sum(range(3, 67)), 2 + 1]
    assert whole.sum_rows(0, counts.double()).tolist() == wanted
    assert whole.sum_rows(2, counts[shuffle].double(), unordered).tolist() == wanted
    ids = torch.tensor([0, 63, 64, 129, 3, int((shuffle == 0).nonzero()), int((shuffle == 129).nonzero())])
    assert groups.of_ids(ids, torch.tensor([0, 0, 0, 0, 1, 2, 2])).tolist() == [0, 0, 1, 2, -1, 3, 5]


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("unordered", [True, False])
@pytest.mark.parametrize("cuts", [[0, 100, 100, 199, 700], [0, 64, 700]])
def test_parts_of_a_table_have_its_groups(cuts: list[int], unordered: bool, alone: bool) -> None:
    """Parts start anywhere, and may be empty; another table's part stands before or behind them."""
    whole = GroupBounds([70, 700], [0, 1], [64, 128])
    of_row = whole.by_frequency(1, torch.arange(700) % 13) if unordered else whole.by_rank(1)
    for first, last in itertools.pairwise(cuts):
        part = TablePart(table=1, rows=last - first, first_row=first, dim=4)
        parts = [part] if alone else [part, TablePart(table=0, rows=70, dim=4)]
        groups = RowGroups(whole, parts, {1: of_row} if unordered else {})
        ids = torch.arange(last - first)
        found = groups.of_ids(ids, None if alone else torch.zeros_like(ids))
        assert torch.equal(found, of_row[first:last].long() + 2)
        assert groups.lookup_bytes(0) <= (2 * part.rows if unordered else 2 * (part.rows / 64 + 2))
        if not unordered:
            in_part = torch.bucketize(ids, groups.local_bounds(0)[1:-1], right=True)
            assert torch.equal(in_part, of_row[first:last])


def test_lookup_costs_a_fraction_of_a_byte_where_ids_are_ordered() -> None:
    whole = GroupBounds([64_000, 64_000], [0, 1], [1000, 1000])
    parts = [TablePart(table=t, rows=64_000, dim=4) for t in range(2)]
    groups = RowGroups(whole, parts, {1: whole.by_frequency(1, torch.randperm(64_000))})
    assert groups.lookup_bytes(0) == 2 * 1000
    assert groups.lookup_bytes(1) == 2 * 64_000


def test_falling_counts() -> None:
    assert is_falling(torch.tensor([0, 5, 5, 1]))  # id 0, the unknown value, may be anything
    assert not is_falling(torch.tensor([9, 1, 5]))


def test_penalty_of_the_paper_by_hand() -> None:
    """Two groups of equal size: occurrences 30 and 10, so that the frequent one is pressed a third as hard."""
    gradient = penalty_gradient(torch.tensor([0, 2, 4]), torch.tensor([5, 5]), torch.tensor([30, 10]))
    torch.testing.assert_close(gradient, torch.tensor([[0, 2 / 3, 4 / 3], [0, 2, 4]]))


def test_softmax_gradient_is_that_of_autograd() -> None:
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
    gradient = torch.randn(4, 3, generator=torch.Generator().manual_seed(2))
    shares = torch.softmax(logits / 0.3, 1)
    (shares * gradient).sum().backward()
    torch.testing.assert_close(softmax_gradient(shares.detach(), gradient, 0.3), logits.grad)


def test_selection_takes_the_largest_width_with_half_an_equal_share() -> None:
    shares = torch.tensor([[0.5, 0.375, 0.125, 0.0], [1.0, 0.0, 0.0, 0.0], [0.13, 0.13, 0.13, 0.61]])
    assert largest_likely_width(shares, torch.tensor([0, 2, 4, 8])).tolist() == [2, 0, 3]


def test_steps_of_widths() -> None:
    steps = initial_steps(torch.tensor([0.5]), torch.tensor([1, 2, 8]))
    np.testing.assert_allclose(steps[0], [1.0, 1 / np.sqrt(2), 1 / np.sqrt(128)], rtol=1e-6)
    rounded = half_steps(steps.log())
    assert torch.equal(rounded, rounded.half().float())
    assert float(half_steps(torch.tensor(-99.0))) == 2.0**-14


@pytest.mark.parametrize("seed", range(5))
def test_widths_against_brute_force(seed: int) -> None:
    """The multiplier finds the best choice among those on the convex hull; brute force finds the best of all."""
    rng = np.random.default_rng(seed)
    cost = torch.tensor(np.sort(rng.exponential(size=(5, 3)), 1)[:, ::-1].copy())
    size = torch.tensor([[0, 20, 40]] * 5) * torch.tensor(rng.integers(1, 4, (5, 1)))
    choices = np.array(list(itertools.product(range(3), repeat=5)))
    rows = np.arange(5)
    sizes = size.numpy()[rows, choices].sum(1)
    costs = cost.numpy()[rows, choices].sum(1)
    before = np.inf
    for budget in range(0, 520, 40):
        choice = cheapest_widths(cost, size, budget).numpy()
        used, found = size.numpy()[rows, choice].sum(), cost.numpy()[rows, choice].sum()
        best = costs[sizes <= budget].min()
        assert used <= budget
        assert found <= before + 1e-12  # a larger budget never costs more
        assert found - best <= (cost[:, 0] - cost[:, 2]).max() + 1e-12  # at most one group is not as it could be
        before = min(before, found)
    assert cheapest_widths(cost, size, float(size[:, 2].sum())).tolist() == cost.argmin(1).tolist()


def test_a_budget_out_of_reach() -> None:
    with pytest.raises(ValueError, match="smallest widths take 40 bits, the budget is 30"):
        cheapest_widths(torch.zeros(2, 2), torch.tensor([[20, 40], [20, 40]]), 30)

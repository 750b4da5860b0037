"""Utilities against sums in NumPy, and the expectation of their rounding."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_embcomp.kernels.dispatch import force_backend
from lightning_embcomp.kernels.types import BagLayout
from lightning_embcomp.kernels.utility import accumulate_utility
from lightning_embcomp.kernels.utility.reference import round_stochastically

from .cases import CASES, LARGE, Case, threads


def row_start(case: Case) -> Tensor:
    rows = [table.rows for table in case.tables]
    return torch.tensor([sum(rows[:t]) for t in range(len(rows))])


def run(case: Case, utility: Tensor, norms: Tensor, kind: str, seed: int = 1, dtype: torch.dtype = torch.int64) -> None:
    ids, offsets = case.ids_tensor(dtype), case.offsets_tensor(dtype)
    weights = case.weights_tensor()
    accumulate_utility(utility, row_start(case), ids, offsets, case.layout(), norms, weights, kind, seed)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("kind", ["gradient", "frequency", "peak_gradient"])
def test_contributions(backend: str, case: Case, kind: str, parts: int, dtype: torch.dtype) -> None:
    """Norms that are small powers of two add up without rounding."""
    rng = np.random.default_rng(0)
    norms = 2.0 ** rng.integers(-1, 2, (len(case.offsets) - 1, parts))
    if case.weights is not None:
        weights = 2.0 ** rng.integers(-1, 2, len(case.ids)) * rng.choice([-1, 1], len(case.ids))
        case = replace(case, weights=weights.astype(np.float32))
    rows = sum(table.rows for table in case.tables)
    start = row_start(case).numpy()
    wanted = np.full((rows, parts), 0.25)
    for i, bag, _, t, row, _ in case.occurrences():
        gain = norms[bag] * (1 if case.weights is None else abs(case.weights[i]))
        at = start[t] + row
        if kind == "gradient":
            wanted[at] += gain
        elif kind == "frequency":
            wanted[at] += 1
        else:
            wanted[at] = np.maximum(wanted[at], gain)
    utility = torch.full((rows, parts), 0.25, dtype=torch.bfloat16)
    run(case, utility, torch.from_numpy(norms).float(), kind, dtype=dtype)
    exact = wanted < 32  # above, a bfloat16 has no room for the quarters
    np.testing.assert_array_equal(utility.double().numpy()[exact], wanted[exact])
    np.testing.assert_allclose(utility.double().numpy(), wanted, rtol=0.03)


def single(ids: int) -> tuple[Tensor, Tensor, BagLayout, Tensor]:
    """One bag per id over a table of as many rows: start of the table, offsets, layout and ids."""
    layout = BagLayout(
        table=torch.tensor([0]),
        bag_start=torch.tensor([0, ids]),
        row_start=torch.tensor([0]),
        column=torch.tensor([0]),
        width=torch.tensor([4]),
        mean=torch.tensor([0]),
        shape=(ids, 4),
    )
    return torch.tensor([0]), torch.arange(ids + 1), layout, torch.arange(ids)


@pytest.mark.parametrize(("value", "gain"), [(1.0, 0.001), (256.0, 0.3), (1000.0, 1.0), (3.0, 0.011)])
def test_rounding_is_right_on_average(backend: str, value: float, gain: float) -> None:
    rows, rounds = 2000, 20
    start, offsets, layout, ids = single(rows)
    utility = torch.full((rows, 1), value, dtype=torch.bfloat16)
    for seed in range(rounds):
        accumulate_utility(utility, start, ids, offsets, layout, torch.full((rows, 1), gain), None, "gradient", seed)
    spacing = 2.0 ** (np.floor(np.log2(value)) - 7)
    # Each rounding has a variance of p (1 - p) spacings squared; the bound is five standard errors.
    share = gain / spacing
    error = np.sqrt(rounds * share * (1 - share) / rows) * spacing
    assert abs(utility.double().mean().item() - value - rounds * gain) < 5 * error


def test_nearest_rounding_would_lose_these_gains() -> None:
    """The test above means something: 256 + 0.3 is 256 in bfloat16."""
    assert (torch.tensor(256.0).bfloat16() + 0.3).bfloat16().item() == 256.0


def test_rounding_differs_between_seeds_and_rows(backend: str) -> None:
    start, offsets, layout, ids = single(500)
    results = []
    for seed in (1, 1, 2):
        utility = torch.full((500, 1), 256.0, dtype=torch.bfloat16)
        accumulate_utility(utility, start, ids, offsets, layout, torch.ones(500, 1), None, "gradient", seed)
        assert set(utility.unique().tolist()) == {256.0, 258.0}
        results.append(utility)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_single_occurrences_round_alike_on_both_twins() -> None:
    start, offsets, layout, ids = single(300)
    gains = torch.rand(300, 1, generator=torch.Generator().manual_seed(0))
    results = []
    for backend in ("cpu", "reference"):
        utility = torch.full((300, 1), 77.0, dtype=torch.bfloat16)
        with force_backend(backend):
            accumulate_utility(utility, start, ids, offsets, layout, gains, None, "gradient", 9)
        results.append(utility)
    assert torch.equal(*results)


def test_exact_values_are_not_moved() -> None:
    values = torch.tensor([0.0, 1.0, 2.5, 2.0**100, 2.0**-130])
    for bits in (0, 0xFFFF):
        assert torch.equal(round_stochastically(values, torch.full((5,), bits)).float(), values.bfloat16().float())


def test_threads_do_not_change_a_bit() -> None:
    rows = sum(table.rows for table in LARGE.tables)
    norms = torch.rand(len(LARGE.offsets) - 1, 2, generator=torch.Generator().manual_seed(5))
    results = []
    for count in (1, 2):
        utility = torch.zeros(rows, 2, dtype=torch.bfloat16)
        with threads(count):
            run(LARGE, utility, norms, "gradient")
        results.append(utility)
    assert torch.equal(*results)


def test_no_id_moves_nothing(backend: str) -> None:
    case = CASES["all_empty"]
    utility = torch.rand(198, 1).bfloat16()
    before = utility.clone()
    run(case, utility, torch.ones(len(case.offsets) - 1, 1), "gradient")
    assert torch.equal(utility, before)

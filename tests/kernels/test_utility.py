"""Utilities against sums in NumPy, and the expectation of their rounding."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_embcomp.kernels.dispatch import force_backend
from lightning_embcomp.kernels.types import BagLayout
from lightning_embcomp.kernels.utility import accumulate_utility, decay_utility
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


@pytest.mark.parametrize("factor", [0.999, 0.995, 0.98])
def test_a_chain_of_decays_is_right_on_average(backend: str, factor: float) -> None:
    before = 10.0 ** torch.linspace(-3, 3, 4000)
    utility = before.bfloat16().view(-1, 2)
    exact = utility.double().sum(1) * factor**100
    for step in range(100):
        decay_utility(utility, factor, seed=1000 + step)
    # A hundred independent roundings, each off by about 2^-9 of the value, come to about 0.02 per number.
    found = utility.double().sum(1)
    assert ((found - exact) / exact).abs().max() < 0.15
    assert abs(((found - exact) / exact).mean().item()) < 0.005


def test_nearest_rounding_would_lose_these_decays() -> None:
    """The test above means something: 200 is what rounding to nearest makes of 200 times 0.999."""
    assert (torch.tensor(200.0).bfloat16() * 0.999).item() == 200.0


def test_decays_round_alike_on_both_twins_and_any_number_of_threads() -> None:
    values = torch.rand((1 << 20) + 5, 1, generator=torch.Generator().manual_seed(0)).bfloat16()
    results = []
    for backend, count in (("cpu", 1), ("cpu", 2), ("reference", 1)):
        found = values.clone()
        with force_backend(backend), threads(count):  # type: ignore[arg-type]
            decay_utility(found, 0.98, 9)
        results.append(found)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    other = values.clone()
    decay_utility(other, 0.98, 10)
    assert not torch.equal(results[0], other)


def test_decay_by_exact_factors(backend: str) -> None:
    values = torch.tensor([0.0, 1.0, 3.5, 2.0**-120], dtype=torch.bfloat16)
    for factor in (1.0, 0.5, 0.0):
        found = values.clone()
        decay_utility(found, factor, 3)
        assert torch.equal(found, values * factor)
    decay_utility(values[:0], 0.9, 1)


@pytest.mark.parametrize("factor", [-0.1, 1.1, float("nan")])
def test_decays_that_are_none_are_refused(factor: float) -> None:
    with pytest.raises(ValueError, match="factor from 0 to 1"):
        decay_utility(torch.ones(3, dtype=torch.bfloat16), factor, 1)
    with pytest.raises(ValueError, match="must be contiguous bfloat16, not torch.float32"):
        decay_utility(torch.ones(3), 0.5, 1)

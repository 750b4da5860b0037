"""Updates with two moments against NumPy in float64, and stochastic rounding against the float16 around a number."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_embcomp.engine.layout import LogicalTable
from lightning_embcomp.kernels.dispatch import force_backend
from lightning_embcomp.kernels.route import find
from lightning_embcomp.kernels.update import UpdateRule, update_rows
from lightning_embcomp.kernels.update.moments.cpu import _IDS_PER_THREAD
from lightning_embcomp.kernels.update.moments.cpu import round_to_half as round_on_cpu
from lightning_embcomp.kernels.update.moments.rounding import draws, round_to_half

from .cases import CASES, LARGE, Case, make_case, threads
from .test_count import occurrences_of, row_counts

MOMENTS = ("adam", "lamb", "partial_rowwise_adam", "partial_rowwise_lamb")
STEP = 7
SUMS = make_case(mean=(False,) * 4, longest_bag=40, seed=2)
"""Without divisions: with dyadic numbers every sum is exact."""


def rule_of(kind: Any, **settings: Any) -> UpdateRule:
    return UpdateRule(
        kind=kind, **{"learning_rate": 0.3, "eps": 1e-3, "beta1": 0.8, "beta2": 0.95, "weight_decay": 0.1, **settings}
    )


def states_of(case: Case, kind: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
    rng = np.random.default_rng(7)
    first = [rng.normal(size=(t.rows, t.dim)) for t in case.tables]
    second = [rng.uniform(0.1, 1, (t.rows,) if "partial" in kind else (t.rows, t.dim)) for t in case.tables]
    return first, second


def gradient(case: Case) -> Tensor:
    return torch.randn(case.layout().shape, generator=torch.Generator().manual_seed(3))


def updated(
    case: Case,
    rule: UpdateRule,
    full: list[np.ndarray],
    states: tuple[list[np.ndarray], list[np.ndarray]] | None = None,
    *,
    grad: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    step: int = STEP,
    counts: Any = None,
) -> list[list[Tensor]]:
    """Class tables and both states after the update."""
    tables = [table.to(dtype) for table in case.class_tables(full)]
    first, second = ([] for _ in range(2)) if states is None else map(case.class_tables, states)
    ids, offsets, layout = case.ids_tensor(), case.offsets_tensor(), case.layout()
    routes = find(ids, offsets, layout, case.router.tensors, case.classes)
    grad = gradient(case) if grad is None else grad
    rest = (routes, offsets, case.weights_tensor(), layout, case.columns, ids, counts, second or None, step)
    update_rows(tables, first or [None] * case.classes, [rule] * case.classes, grad, *rest)
    return [tables, first, second]


def by_hand(case: Case, rule: UpdateRule, states: tuple[list[np.ndarray], list[np.ndarray]]) -> list[list[np.ndarray]]:
    """Full tables and states, written from the papers; rows that were not looked up stay."""
    full, firsts, seconds = [], [], []
    touched = occurrences_of(case)
    for t, g in enumerate(case.row_gradients(gradient(case).double().numpy())):
        stored, weight = case.mask(t), case.full[t].astype(np.float64)
        moved = touched[t] > 0
        width = np.maximum(stored.sum(1), 1)
        first = rule.beta1 * states[0][t] + (1 - rule.beta1) * g
        square = (g**2).sum(1) / width if "partial" in rule.kind else g**2
        second = rule.beta2 * states[1][t] + (1 - rule.beta2) * square
        root = np.sqrt(second / (1 - rule.beta2**STEP)) + rule.eps
        change = first / (1 - rule.beta1**STEP) / (root[:, None] if root.ndim == 1 else root)
        change = (change + rule.weight_decay * weight) * stored
        if "lamb" in rule.kind:
            norms = np.sqrt(((weight * stored) ** 2).sum(1)), np.sqrt((change**2).sum(1))
            change *= np.divide(*norms, out=np.ones(len(change)), where=(norms[0] > 0) & (norms[1] > 0))[:, None]
        full.append(np.where(moved[:, None], weight - rule.learning_rate * change, weight))
        firsts.append(np.where(moved[:, None], first, states[0][t]))
        where = moved if second.ndim == 1 else moved[:, None]
        seconds.append(np.where(where, second, states[1][t]))
    return [full, firsts, seconds]


@pytest.mark.parametrize("kind", MOMENTS)
def test_update(backend: str, case: Case, kind: str) -> None:
    rule, states = rule_of(kind), states_of(case, kind)
    found, wanted = updated(case, rule, case.full, states), by_hand(case, rule, states)
    for tensors, values in zip(found, wanted, strict=True):
        for one, other in zip(tensors, case.class_tables(values), strict=True):
            np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", ["lamb", "partial_rowwise_lamb"])
def test_rows_leave_zero(backend: str, kind: str) -> None:
    """Columns that a row gets back begin at zero, where a quotient of norms would hold them for ever."""
    case = CASES["weighted"]
    zeros = [np.zeros_like(full) for full in case.full]
    tables, _, _ = updated(case, rule_of(kind), zeros, states_of(case, kind))
    assert any(bool(table.any()) for table in tables)
    assert all(bool(table.isfinite().all()) for table in tables)


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("kind", MOMENTS)
def test_threads_do_not_change_a_bit(kind: str, rounded: bool) -> None:
    assert len(LARGE.ids) // _IDS_PER_THREAD >= 2
    rule, dtype = rule_of(kind, stochastic_rounding=rounded), torch.float16 if rounded else torch.float32
    results = []
    for count in (1, 2):
        with threads(count):
            results.append(sum(updated(LARGE, rule, LARGE.full, states_of(LARGE, kind), dtype=dtype), []))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_features_of_one_table_need_not_be_neighbours(backend: str) -> None:
    tables = tuple(LogicalTable(name=name, rows=9, dim=4) for name in "abc")
    case = make_case(tables, (0, 1, 0, 2, 1, 2), (False,) * 6, code=1, seed=6)
    rule, states = rule_of("adam"), states_of(case, "adam")
    for tensors, values in zip(updated(case, rule, case.full, states), by_hand(case, rule, states), strict=True):
        for one, other in zip(tensors, case.class_tables(values), strict=True):
            np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=2e-5, atol=2e-5)


def test_rows_are_counted_also_without_storage(backend: str) -> None:
    case = CASES["weighted"]
    counted: list[Tensor | None] = [torch.zeros(t.rows) for t in case.tables]
    counts = row_counts(counted, occurrences=True)
    updated(case, rule_of("adam"), case.full, states_of(case, "adam"), counts=counts)
    for found, wanted in zip(counted, occurrences_of(case), strict=True):
        assert found is not None
        np.testing.assert_array_equal(found.numpy(), wanted)


def values_to_round() -> np.ndarray:
    """Ordinary numbers, those below the smallest normal float16, and the ends of its range."""
    rng = np.random.default_rng(5)
    size = np.concatenate([2.0 ** rng.uniform(-26, 15.9, 4000), [0.0, 1.0, 2.0**-14, 2.0**-24, 65472.0, 65503.9]])
    return (size * rng.choice([-1, 1], size.shape)).astype(np.float32)


@pytest.mark.parametrize("where", ["reference", "cpu"])
def test_rounding_takes_one_of_two_neighbours(where: str) -> None:
    values = values_to_round()
    draw = np.random.default_rng(6).uniform(size=values.shape)
    if where == "reference":
        found = round_to_half(torch.from_numpy(values), torch.from_numpy(draw)).numpy()
    else:
        found = np.array([round_on_cpu(v, d) for v, d in zip(values, draw, strict=True)], np.float32).astype(np.float16)
    nearest = values.astype(np.float16)
    beyond = np.abs(nearest.astype(np.float64)) > np.abs(values)
    low = np.where(beyond, np.nextafter(nearest, np.float16(0)), nearest).astype(np.float16)
    high = np.nextafter(low, np.copysign(np.float16(np.inf), values).astype(np.float16))
    share = (values.astype(np.float64) - low) / (high.astype(np.float64) - low)
    np.testing.assert_array_equal(found, np.where(draw < share, high, low))


@pytest.mark.parametrize("value", [65504.0, -65519.9, np.inf, -np.inf, 1e6, np.nan])
def test_numbers_beyond_float16_are_rounded_as_ever(value: float) -> None:
    expected = torch.tensor([value]).half()
    assert torch.allclose(round_to_half(torch.tensor([value]), torch.tensor([0.5])), expected, equal_nan=True)
    found = torch.tensor([float(round_on_cpu(np.float32(value), 0.5))]).half()
    assert torch.allclose(found, expected, equal_nan=True)


def test_rounding_is_unbiased(backend: str) -> None:
    """Steps of 1/16 of the distance between two float16: to nearest, nothing would ever move."""
    case = make_case((LogicalTable(name="t", rows=1, dim=16),), (0,), (False,), code=1, batch_size=1, longest_bag=1)
    case.ids, case.offsets = np.zeros(1, np.int64), np.array([0, 1])
    start, change, steps = 1.5, 2.0**-14, 2000 if backend == "cpu" else 200
    grad = torch.full(case.layout().shape, change)
    sums = {rounded: np.zeros(16) for rounded in (False, True)}
    for rounded in sums:
        rule = UpdateRule(kind="sgd", learning_rate=1.0, stochastic_rounding=rounded)
        for step in range(1, steps + 1):
            full = [np.full((1, 16), start, np.float32)]
            tables, _, _ = updated(case, rule, full, grad=grad, dtype=torch.float16, step=step)
            sums[rounded] += start - tables[-1].double().numpy()[0]
    assert not sums[False].any()
    mean, spacing = sums[True].mean() / steps, 2.0**-10
    error = spacing * np.sqrt(1 / 16 * 15 / 16 / (16 * steps))
    assert abs(mean - change) < 4 * error
    assert sums[True].min() > 0 and len(set(sums[True])) > 4


@pytest.mark.parametrize("kind", ["sgd", "rowwise_adagrad", "adagrad"])
def test_rounded_steps_are_those_of_float32_rounded(backend: str, kind: str) -> None:
    """Equal on all backends, up to the last bits of what is rounded."""
    case = CASES["duplicates"]
    state = None if kind == "sgd" else states_of(case, "partial" if kind == "rowwise_adagrad" else "adam")
    states = None if state is None else (state[1], [np.zeros_like(s) for s in state[1]])
    halves = [full.astype(np.float16).astype(np.float32) for full in case.full]
    exact, _, _ = updated(case, rule_of(kind, weight_decay=0.0), halves, states)
    rule = rule_of(kind, weight_decay=0.0, stochastic_rounding=True)
    found, _, _ = updated(case, rule, halves, states, dtype=torch.float16)
    again, _, _ = updated(case, rule, halves, states, dtype=torch.float16)
    other, _, _ = updated(case, rule, halves, states, dtype=torch.float16, step=STEP + 1)
    before = [table.half() for table in case.class_tables(halves)]
    looked_up = [(one != two).any(1) for one, two in zip(exact, case.class_tables(halves), strict=True)]
    differ = 0
    for c, (one, wanted) in enumerate(zip(found, exact, strict=True)):
        slots = torch.arange(one.shape[0])
        rounded = round_to_half(wanted, draws(STEP, c, slots, one.shape[1]))
        rounded = torch.where(looked_up[c].unsqueeze(1), rounded, before[c])
        differ += int((one != rounded).sum())
        assert torch.equal(one, again[c])
    assert differ <= 2
    assert any(not torch.equal(one, two) for one, two in zip(found, other, strict=True))


def test_rows_with_rates_of_their_own_are_not_rounded() -> None:
    case = CASES["weighted"]
    counts = row_counts([torch.ones(t.rows) for t in case.tables])
    counts.gain.fill_(0.5)
    rule = UpdateRule(kind="sgd", learning_rate=1.0, stochastic_rounding=True)
    with pytest.raises(ValueError, match="rounded to nearest only"):
        updated(case, rule, case.full, dtype=torch.float16, counts=counts)


def dyadic(case: Case) -> tuple[list[np.ndarray], Tensor]:
    """Weights that float16 holds, and gradients finer than it."""
    rng = np.random.default_rng(3)
    full = [rng.integers(-64, 65, f.shape) / 64 for f in case.full]
    return full, torch.from_numpy(rng.integers(-8, 9, case.layout().shape) / 2.0**13).float()


def test_backends_draw_the_same_numbers() -> None:
    full, grad = dyadic(SUMS)
    rule = UpdateRule(kind="sgd", learning_rate=0.5, stochastic_rounding=True)
    results = []
    for backend in ("cpu", "reference"):
        with force_backend(backend):
            results.append(updated(SUMS, rule, full, grad=grad, dtype=torch.float16)[0])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))

"""Row updates against NumPy in float64, and against FBGEMM's fused optimizers."""

import numpy as np
import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    EmbeddingLocation,
    PoolingMode,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor

from lightning_embcomp.engine.layout import LogicalTable
from lightning_embcomp.kernels.pool import pool
from lightning_embcomp.kernels.route import find
from lightning_embcomp.kernels.update import UpdateRule, update_rows
from lightning_embcomp.kernels.update.cpu import _IDS_PER_THREAD

from .cases import LARGE, Case, make_case, threads
from .test_count import occurrences_of, row_counts

KINDS = ("sgd", "rowwise_adagrad", "adagrad")


def run_update(case: Case, rule: UpdateRule, grad: Tensor, state: list[np.ndarray] | None) -> list[list[Tensor]]:
    """Class tables and states after the update."""
    tables = case.class_tables(case.full)
    states = [None] * case.classes if state is None else case.class_tables(state)
    offsets = case.offsets_tensor()
    routes = find(case.ids_tensor(), offsets, case.layout(), case.router.tensors, case.classes)
    rules = [rule] * case.classes
    update_rows(tables, states, rules, grad, routes, offsets, case.weights_tensor(), case.layout(), case.columns)
    return [tables, [] if state is None else states]  # type: ignore[list-item]


def expected(case: Case, rule: UpdateRule, grad: Tensor, state: list[np.ndarray] | None) -> list[list[np.ndarray]]:
    """Full tables and states after the update, float64; rows that were not looked up stay."""
    gradients = case.row_gradients(grad.double().numpy())
    touched = [np.zeros(table.rows, bool) for table in case.tables]
    for _, _, _, t, row, _ in case.occurrences():
        touched[t][row] = True
    full, states = [], []
    for t, g in enumerate(gradients):
        mask, weight = case.mask(t), case.full[t].astype(np.float64)
        if rule.kind == "sgd":
            step = g
        elif state is not None and rule.kind == "rowwise_adagrad":
            moment = state[t] + (g**2).sum(1) / np.maximum(mask.sum(1), 1)
            states.append(moment)
            step = g / (np.sqrt(moment) + rule.eps)[:, None]
        else:
            assert state is not None
            moment = state[t] + g**2
            states.append(moment)
            step = g / (np.sqrt(moment) + rule.eps)
        step[~touched[t]] = 0
        full.append(weight - rule.learning_rate * step)
    return [full, states]


@pytest.mark.parametrize("kind", KINDS)
def test_update(backend: str, case: Case, kind: str) -> None:
    rng = np.random.default_rng(7)
    state = None
    if kind != "sgd":
        state = [rng.uniform(0.1, 1, (t.rows,) if kind == "rowwise_adagrad" else (t.rows, t.dim)) for t in case.tables]
    rule = UpdateRule(kind=kind, learning_rate=0.3, eps=1e-3)  # type: ignore[arg-type]
    grad = torch.randn(case.layout().shape, generator=torch.Generator().manual_seed(3))
    updated = run_update(case, rule, grad, state)
    for found, wanted in zip(updated, expected(case, rule, grad, state), strict=True):
        if not wanted:
            continue
        for c, table in enumerate(case.class_tables(wanted)):
            np.testing.assert_allclose(found[c].numpy(), table.numpy(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_threads_do_not_change_a_bit(kind: str) -> None:
    assert len(LARGE.ids) // _IDS_PER_THREAD >= 2
    state = [np.full((t.rows,) if kind == "rowwise_adagrad" else (t.rows, t.dim), 0.1) for t in LARGE.tables]
    rule = UpdateRule(kind=kind, learning_rate=0.1)  # type: ignore[arg-type]
    grad = torch.randn(LARGE.layout().shape, generator=torch.Generator().manual_seed(4))
    results = []
    for count in (1, 2):
        with threads(count):
            tables, states = run_update(LARGE, rule, grad, None if kind == "sgd" else state)
            results.append([*tables, *states])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_fifty_steps_equal_fbgemm(backend: str, kind: str, weighted: bool) -> None:
    table = LogicalTable(name="t", rows=70, dim=16, chunks=2)
    start = make_case((table,), (0,), (False,), code=2)
    plain = SplitTableBatchedEmbeddingBagsCodegen(
        [(70, 16, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        optimizer=getattr(EmbOptimType, f"EXACT_{kind.upper()}"),
        pooling_mode=PoolingMode.SUM,
        learning_rate=0.05,
        device=torch.device("cpu"),
    )
    weight = torch.from_numpy(start.full[0]).clone()
    plain.split_embedding_weights()[0].copy_(weight)
    tables = [torch.empty(0, 8), weight]
    shape = {"sgd": None, "rowwise_adagrad": (70,), "adagrad": (70, 16)}[kind]
    states: list[Tensor | None] = [
        None if shape is None else torch.zeros(0),
        None if shape is None else torch.zeros(shape),
    ]
    rule = UpdateRule(kind=kind, learning_rate=0.05)  # type: ignore[arg-type]
    for step in range(50):
        batch = make_case((table,), (0,), (False,), code=2, batch_size=16, weighted=weighted, seed=step)
        ids, offsets, weights, layout = (
            batch.ids_tensor(),
            batch.offsets_tensor(),
            batch.weights_tensor(),
            batch.layout(),
        )
        routes = find(ids, offsets, layout, batch.router.tensors, 2)
        pooled = pool(tables, routes, offsets, weights, layout, batch.columns)
        wanted = plain(ids, offsets, per_sample_weights=weights)
        torch.testing.assert_close(pooled, wanted.detach(), rtol=1e-5, atol=1e-6)
        wanted.sin().sum().backward()
        update_rows(tables, states, [rule, rule], pooled.cos(), routes, offsets, weights, layout, batch.columns)
    torch.testing.assert_close(tables[1], plain.split_embedding_weights()[0], rtol=1e-5, atol=2e-6)
    if states[1] is not None:
        kept = plain.split_optimizer_states()[0][0]
        torch.testing.assert_close(states[1], kept.view(states[1].shape), rtol=1e-5, atol=2e-6)


def counted_update(case: Case, grad: Tensor, stored: list[Tensor | None], cap: float = torch.inf) -> list[Tensor]:
    """Class tables after an update with SGD whose rates fall with the counts of the first table and of the last."""
    tables = case.class_tables(case.full)
    ids, offsets, layout = case.ids_tensor(), case.offsets_tensor(), case.layout()
    routes = find(ids, offsets, layout, case.router.tensors, case.classes)
    counts = row_counts(stored, 2.0, occurrences=True)
    counts.gain[:] = torch.tensor([0.5 if t is not None else 0.0 for t in stored])
    counts.cap.fill_(cap)
    rules = [UpdateRule(kind="sgd", learning_rate=0.3)] * case.classes
    weights, none = case.weights_tensor(), [None] * case.classes
    update_rows(tables, none, rules, grad, routes, offsets, weights, layout, case.columns, ids, counts)
    return tables


@pytest.mark.parametrize("cap", [float("inf"), 0.06])
def test_counted_rows_take_their_own_rates(backend: str, case: Case, cap: float) -> None:
    """Every row is counted, also without storage; the middle table keeps the plain rate."""
    stored: list[Tensor | None] = [torch.full((t.rows,), 3.0) for t in case.tables]
    if len(stored) > 1:
        stored[1] = None
    grad = torch.randn(case.layout().shape, generator=torch.Generator().manual_seed(3))
    found = counted_update(case, grad, stored, cap)
    expected_full = []
    for t, (g, seen) in enumerate(zip(case.row_gradients(grad.double().numpy()), occurrences_of(case), strict=True)):
        count = 3 + 2.0 * seen
        rate = np.full(len(count), 0.3)
        values = stored[t]
        if values is not None:
            np.testing.assert_array_equal(values.numpy(), count)
            rate = np.minimum(cap, 0.3 * 0.5 / np.sqrt(count))
        expected_full.append(case.full[t] - rate[:, None] * g)
    for c, table in enumerate(case.class_tables(expected_full)):
        np.testing.assert_allclose(found[c].numpy(), table.numpy(), rtol=2e-5, atol=2e-5)


def test_threads_do_not_change_a_bit_of_counted_rows() -> None:
    grad = torch.randn(LARGE.layout().shape, generator=torch.Generator().manual_seed(4))
    results = []
    for count in (1, 2):
        stored: list[Tensor | None] = [torch.full((t.rows,), 20, dtype=torch.uint8) for t in LARGE.tables]
        with threads(count):
            tables = counted_update(LARGE, grad, stored)
        results.append([*tables, *[t for t in stored if t is not None]])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_features_of_one_table_need_not_be_neighbours(backend: str) -> None:
    """Rows that several features look up are updated once, with the sum of their gradients."""
    tables = tuple(LogicalTable(name=name, rows=9, dim=4) for name in "abc")
    case = make_case(tables, (0, 1, 0, 2, 1, 2), (False,) * 6, code=1, seed=6)
    state = [np.full(t.rows, 0.5) for t in tables]
    rule = UpdateRule(kind="rowwise_adagrad", learning_rate=0.3)
    grad = torch.randn(case.layout().shape, generator=torch.Generator().manual_seed(3))
    updated = run_update(case, rule, grad, state)
    for found, wanted in zip(updated, expected(case, rule, grad, state), strict=True):
        for c, table in enumerate(case.class_tables(wanted)):
            np.testing.assert_allclose(found[c].numpy(), table.numpy(), rtol=2e-5, atol=2e-5)

"""Pooling, assembly, their gradients and their norms, against sums in NumPy."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_embcomp.kernels.assemble import assemble, bag_norms, disassemble
from lightning_embcomp.kernels.pool import pool
from lightning_embcomp.kernels.route import find, route
from lightning_embcomp.kernels.types import BagLayout, RoutedBatch

from .cases import CASES, LARGE, Case, threads

CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


def run_pool(case: Case, dtype: torch.dtype = torch.int64) -> Tensor:
    offsets = case.offsets_tensor(dtype)
    routes = find(case.ids_tensor(dtype), offsets, case.layout(), case.router.tensors, case.classes)
    tables = case.class_tables(case.full)
    return pool(tables, routes, offsets, case.weights_tensor(), case.layout(), case.columns)


def routed(case: Case) -> tuple[RoutedBatch, list[Tensor | None]]:
    """The batch, and the pooled rows of each class."""
    batch = route(case.ids_tensor(), case.offsets_tensor(), case.layout(), case.router.tensors, case.classes)
    pooled: list[Tensor | None] = []
    for c, table in enumerate(case.class_tables(case.full)):
        ids = slice(batch.id_start[c], batch.id_start[c + 1])
        first, last = batch.bag_start[c] + c, batch.bag_start[c + 1] + c + 1
        weights = case.weights_tensor()
        chosen = None if weights is None else weights[batch.positions[ids].long()]
        slots, offsets = batch.slots[ids].long(), batch.offsets[first:last].long()
        pooled.append(
            None
            if slots.numel() == 0
            else torch.nn.functional.embedding_bag(
                slots, table, offsets, mode="sum", include_last_offset=True, per_sample_weights=chosen
            )
        )
    return batch, pooled


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_pool(backend: str, case: Case, dtype: torch.dtype) -> None:
    np.testing.assert_allclose(run_pool(case, dtype).numpy(), case.pooled(), **CLOSE)


def test_assemble(backend: str, case: Case) -> None:
    batch, pooled = routed(case)
    out = assemble(pooled, case.offsets_tensor(), batch, case.layout(), case.columns)
    np.testing.assert_allclose(out.numpy(), case.pooled(), **CLOSE)


def test_disassemble(backend: str, case: Case) -> None:
    batch, pooled = routed(case)
    grad = torch.randn(case.layout().shape, generator=torch.Generator().manual_seed(0))
    parts = disassemble(grad, case.offsets_tensor(), batch, case.layout(), case.columns)
    for c, part in enumerate(parts):
        assert (part is None) == (pooled[c] is None)
        if part is None:
            continue
        for row, bag in enumerate(batch.bags[batch.bag_start[c] : batch.bag_start[c + 1]].tolist()):
            feature = bag // case.batch_size
            length = case.offsets[bag + 1] - case.offsets[bag]
            columns = case.first_column[feature] + case.column_indices(c)
            wanted = grad.numpy()[bag % case.batch_size, columns] / (length if case.mean[feature] else 1)
            np.testing.assert_allclose(part[row].numpy(), wanted, **CLOSE)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_bag_norms(backend: str, case: Case, parts: int) -> None:
    grad = torch.randn(case.layout().shape, generator=torch.Generator().manual_seed(1))
    norms = bag_norms(grad, case.offsets_tensor(), case.layout(), parts)
    wanted = np.zeros((len(case.offsets) - 1, parts))
    for bag in range(len(wanted)):
        feature, length = bag // case.batch_size, case.offsets[bag + 1] - case.offsets[bag]
        at, width = case.first_column[feature], case.dims[feature]
        row = grad.numpy()[bag % case.batch_size, at : at + width].reshape(parts, -1)
        if length:
            wanted[bag] = np.linalg.norm(row, axis=1) / (length if case.mean[feature] else 1)
    np.testing.assert_allclose(norms.numpy(), wanted, **CLOSE)


def test_threads_do_not_change_a_bit() -> None:
    results = []
    for count in (1, 2):
        with threads(count):
            batch, pooled = routed(LARGE)
            grad = torch.randn(LARGE.layout().shape, generator=torch.Generator().manual_seed(2))
            offsets, layout, columns = LARGE.offsets_tensor(), LARGE.layout(), LARGE.columns
            parts = disassemble(grad, offsets, batch, layout, columns)
            results.append(
                [
                    run_pool(LARGE),
                    assemble(pooled, offsets, batch, layout, columns),
                    bag_norms(grad, offsets, layout, 4),
                    *[part for part in parts if part is not None],
                ]
            )
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
    np.testing.assert_allclose(results[0][0].numpy(), LARGE.pooled(), **CLOSE)


def test_rows_of_a_sequence_layout(backend: str) -> None:
    """One bag per id, features of different length below each other."""
    case = CASES["whole_blocks"]
    ids = torch.tensor([5, 0, 127, 64, 5])
    offsets = torch.arange(6)
    layout = BagLayout(
        table=torch.tensor([0, 0, 0]),
        bag_start=torch.tensor([0, 2, 2, 5]),
        row_start=torch.tensor([0, 2, 2]),
        column=torch.zeros(3, dtype=torch.int64),
        width=torch.full((3,), 4),
        mean=torch.zeros(3, dtype=torch.int64),
        shape=(5, 4),
    )
    routes = find(ids, offsets, layout, case.router.tensors, case.classes)
    rows = pool(case.class_tables(case.full), routes, offsets, None, layout, case.columns)
    np.testing.assert_array_equal(rows.numpy(), case.full[0][ids.numpy()])
    batch = route(ids, offsets, layout, case.router.tensors, case.classes)
    assembled = assemble([rows], offsets, batch, layout, case.columns)
    assert torch.equal(assembled, rows)

"""Routing against a count of rows in NumPy."""

import numpy as np
import pytest
import torch

from lightning_embcomp.kernels.route import IdOutOfRangeError, find, route
from lightning_embcomp.kernels.types import NO_CLASS, RoutedBatch

from .cases import CASES, LARGE, Case, threads

FIELDS = ("slots", "positions", "offsets", "bags")


def expected(case: Case) -> tuple[np.ndarray, np.ndarray]:
    slots = case.slots()
    row_class, slot = np.full(len(case.ids), NO_CLASS), np.full(len(case.ids), -1)
    for i, _, _, t, row, _ in case.occurrences():
        if case.codes[t][row]:
            row_class[i] = case.class_map.class_of_code[t][case.codes[t][row]]
            slot[i] = slots[t][row]
    return row_class, slot


@pytest.mark.parametrize("offset_type", [torch.int32, torch.int64])
@pytest.mark.parametrize("id_type", [torch.int32, torch.int64])
def test_find(backend: str, case: Case, id_type: torch.dtype, offset_type: torch.dtype) -> None:
    routes = find(
        case.ids_tensor(id_type), case.offsets_tensor(offset_type), case.layout(), case.router.tensors, case.classes
    )
    row_class, slot = expected(case)
    np.testing.assert_array_equal(routes.row_class.numpy(), row_class)
    stored = row_class != NO_CLASS
    np.testing.assert_array_equal(routes.slot.numpy()[stored], slot[stored])


def run_route(case: Case, dtype: torch.dtype = torch.int64) -> RoutedBatch:
    return route(case.ids_tensor(dtype), case.offsets_tensor(dtype), case.layout(), case.router.tensors, case.classes)


def assert_lists(batch: RoutedBatch, case: Case) -> None:
    row_class, slot = expected(case)
    bag_of = np.repeat(np.arange(len(case.offsets) - 1), np.diff(case.offsets))
    for c in range(case.classes):
        mine = np.flatnonzero(row_class == c)
        ids = slice(batch.id_start[c], batch.id_start[c + 1])
        np.testing.assert_array_equal(batch.positions[ids].numpy(), mine)
        np.testing.assert_array_equal(batch.slots[ids].numpy(), slot[mine])
        bags, lengths = np.unique(bag_of[mine], return_counts=True)
        first, last = batch.bag_start[c], batch.bag_start[c + 1]
        np.testing.assert_array_equal(batch.bags[first:last].numpy(), bags)
        np.testing.assert_array_equal(batch.offsets[first + c : last + c + 1].numpy(), [0, *lengths.cumsum()])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_route(backend: str, case: Case, dtype: torch.dtype) -> None:
    assert_lists(run_route(case, dtype), case)


@pytest.mark.parametrize("count", [1, 2])
def test_threads_do_not_change_the_lists(count: int) -> None:
    with threads(count):
        batch = run_route(LARGE)
    assert batch.chunk_bag.numel() == count + 1
    assert_lists(batch, LARGE)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("value", [-1, -(2**31), 130, 2**31 - 1])
@pytest.mark.parametrize("operation", [find, route])
def test_id_out_of_range(backend: str, operation: object, value: int, dtype: torch.dtype) -> None:
    case = CASES["duplicates"]
    ids = case.ids_tensor(dtype).clone()
    position = int(case.offsets[2 * case.batch_size // 3])
    ids[position] = ids[position + 1] = value
    with pytest.raises(IdOutOfRangeError, match=f"id {value} of feature 0 at position {position} is outside 0..129"):
        operation(ids, case.offsets_tensor(dtype), case.layout(), case.router.tensors, case.classes)  # type: ignore[operator]


@pytest.mark.parametrize("count", [1, 2])
def test_first_bad_id_of_a_later_feature_is_named(count: int) -> None:
    ids = LARGE.ids_tensor().clone()
    position = int(LARGE.offsets[LARGE.batch_size + 7])
    assert LARGE.offsets[LARGE.batch_size + 8] > position
    ids[position], ids[-1] = 1, 10**6
    with threads(count), pytest.raises(IdOutOfRangeError) as caught:
        find(ids, LARGE.offsets_tensor(), LARGE.layout(), LARGE.router.tensors, LARGE.classes)
    assert (caught.value.feature, caught.value.position, caught.value.value, caught.value.rows) == (1, position, 1, 1)

"""The K entries of largest magnitude per row, by NumPy's stable sort."""

import numpy as np
import pytest
import torch

from lightning_embcomp.kernels.topk import place_entries, position_dtype, top_entries

from .cases import threads


def by_sort(rows: np.ndarray, kept: int) -> np.ndarray:
    """Positions: stable, so that of ties the left one comes first; NaN first."""
    key = np.where(np.isnan(rows), np.inf, np.abs(rows).astype(np.float64))
    order = np.lexsort((np.broadcast_to(np.arange(rows.shape[1]), rows.shape), -key, ~np.isnan(rows)), axis=1)
    return np.sort(order[:, :kept], axis=1)


def check(rows: np.ndarray, kept: int) -> None:
    wanted = by_sort(rows, kept)
    positions, values = top_entries(torch.from_numpy(rows), kept)
    np.testing.assert_array_equal(positions.numpy(), wanted)
    np.testing.assert_array_equal(values.numpy(), np.take_along_axis(rows, wanted, 1))
    placed = np.zeros_like(rows)
    np.put_along_axis(placed, wanted, np.take_along_axis(rows, wanted, 1), 1)
    np.testing.assert_array_equal(place_entries(positions, values, rows.shape[1]).numpy(), placed)


@pytest.mark.parametrize(("width", "kept"), [(1, 1), (4, 4), (16, 1), (64, 3), (256, 13), (257, 100), (832, 8)])
def test_random_rows(backend: str, width: int, kept: int) -> None:
    rows = np.random.default_rng(width).standard_normal((50, width)).astype(np.float32)
    check(rows * np.float32(10) ** np.random.default_rng(1).integers(-30, 30, (50, 1)).astype(np.float32), kept)


@pytest.mark.parametrize("kept", [1, 3, 7, 8])
def test_ties_take_the_left_entry(backend: str, kept: int) -> None:
    check(np.random.default_rng(0).integers(-2, 3, (200, 8)).astype(np.float32), kept)


def test_zeros_and_signed_zeros(backend: str) -> None:
    rows = torch.tensor([[0.0, -0.0, 0.0], [-0.0, 0.0, 1e-45]])
    positions, values = top_entries(rows, 2)
    assert positions.tolist() == [[0, 1], [0, 2]]
    assert torch.equal(torch.signbit(values), torch.tensor([[False, True], [True, False]]))


def test_entries_that_are_not_finite_are_kept_first(backend: str) -> None:
    inf, nan = float("inf"), float("nan")
    rows = torch.tensor([[3e38, -inf, 1.0, nan], [nan, 5.0, nan, inf], [-nan, inf, -inf, 9.0]])
    assert top_entries(rows, 1)[0].tolist() == [[3], [0], [0]]
    positions, values = top_entries(rows, 2)
    assert positions.tolist() == [[1, 3], [0, 2], [0, 1]]
    np.testing.assert_array_equal(values.numpy(), [[-inf, nan], [nan, nan], [nan, inf]])


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(backend: str, rows: int) -> None:
    positions, values = top_entries(torch.ones(rows, 8), 2)
    assert positions.shape == values.shape == (rows, 2)
    assert place_entries(positions, values, 8).shape == (rows, 8)


def test_rows_that_are_not_contiguous(backend: str) -> None:
    rows = torch.randn(5, 12).t()
    for found, wanted in zip(top_entries(rows, 2), top_entries(rows.contiguous(), 2), strict=True):
        assert torch.equal(found, wanted)


def test_threads_change_nothing(backend: str) -> None:
    rows = torch.randn(20_000, 64)
    one = top_entries(rows, 5)
    with threads(3):
        several = top_entries(rows, 5)
        assert torch.equal(place_entries(*several, 64), place_entries(*one, 64))
    assert torch.equal(one[0], several[0]) and torch.equal(one[1], several[1])


@pytest.mark.parametrize(("shape", "kept"), [((3, 4), 0), ((3, 4), 5), ((12,), 1), ((1, 40_000), 1)])
def test_out_of_range(shape: tuple[int, ...], kept: int) -> None:
    with pytest.raises(ValueError, match="cannot keep|must have 1 to 32768"):
        top_entries(torch.zeros(shape), kept)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
def test_wrong_positions(backend: str, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="from 0 to 3"):
        place_entries(torch.tensor([[4]], dtype=dtype), torch.ones(1, 1), 4)


def test_smallest_dtype_of_positions() -> None:
    assert position_dtype(1) == position_dtype(256) == torch.uint8
    assert position_dtype(257) == position_dtype(2**15) == torch.int16

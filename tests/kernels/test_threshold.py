"""Selection by a threshold: both backends against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_embcomp.kernels.dispatch import Backend, force_backend
from lightning_embcomp.kernels.threshold import SMALLEST, kth_largest, select_large, select_packed

BACKENDS: tuple[Backend, ...] = ("reference", "cpu")
SIZES = [0, 1, 7, 8, 2047, 2048, 2049, 10_000]


def state(n: int, kind: str, seed: int = 0) -> tuple[Tensor, Tensor | None, Tensor | None, float]:
    """Gradient, residual, estimate and gain of a kind of error feedback."""
    source = torch.Generator().manual_seed(seed)
    grad, residual, estimate = (torch.randn(n, generator=source) for _ in range(3))
    return (
        grad,
        residual if kind in ("ec", "econtrol") else None,
        estimate if kind in ("ef21", "econtrol") else None,
        0.9 if kind == "econtrol" else 1.0,  # of 1 - 0.9 it matters when it is rounded to float32
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["none", "ec", "ef21", "econtrol"])
@pytest.mark.parametrize("n", SIZES)
def test_against_numpy(backend: Backend, kind: str, n: int) -> None:
    grad, residual, estimate, gain = state(n, kind)
    factor, threshold = 0.5, 0.8
    e, h = (np.zeros(n) if x is None else x.double().numpy() for x in (residual, estimate))
    change = factor * grad.double().numpy() - h
    message = change if residual is None else gain * e + change
    kept = None if estimate is None else estimate.clone()
    with force_backend(backend):
        indices, values = select_large(grad, residual, estimate, factor=factor, gain=gain, threshold=threshold)
    wanted = np.flatnonzero(np.abs(message) >= threshold)
    assert indices.dtype == torch.int32 and values.dtype == torch.float32
    np.testing.assert_array_equal(indices, wanted)
    np.testing.assert_allclose(values, message[wanted], rtol=1e-5, atol=1e-6)
    if residual is not None:
        np.testing.assert_allclose(residual, e + change, rtol=1e-5, atol=1e-6)
    if estimate is not None:
        assert kept is not None and torch.equal(estimate, kept)


@pytest.mark.parametrize("kind", ["none", "ec", "ef21", "econtrol"])
@pytest.mark.parametrize("threshold", [SMALLEST, 0.5, 2.5, 1e9])
def test_twins_agree_to_the_bit(kind: str, threshold: float) -> None:
    results = []
    for backend in BACKENDS:
        grad, residual, estimate, gain = state(5000, kind)
        with force_backend(backend):
            found = select_large(grad, residual, estimate, gain=gain, threshold=threshold)
        results.append((*found, torch.zeros(0) if residual is None else residual))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_nothing(threads: int) -> None:
    grad, residual, _, _ = state(1_000_003, "ec")
    assert residual is not None
    other = residual.clone()
    one = select_large(grad, residual, threshold=2.0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        several = select_large(grad, other, threshold=2.0)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one[0], several[0]) and torch.equal(one[1], several[1]) and torch.equal(residual, other)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_selected(backend: Backend, value: float) -> None:
    grad = torch.zeros(5000)
    grad[[3, 4999]] = value
    with force_backend(backend):
        indices, values = select_large(grad, torch.zeros(5000), threshold=1e30)
    assert indices.tolist() == [3, 4999]
    assert not bool(torch.isfinite(values).any())


@pytest.mark.parametrize("backend", BACKENDS)
def test_zeros_are_never_selected(backend: Backend) -> None:
    with force_backend(backend):
        indices, _ = select_large(torch.tensor([0.0, -0.0, 1e-40, 1e-30]), threshold=SMALLEST)
    assert indices.tolist() == [3]


@pytest.mark.parametrize("capacity", [0, 3, 700])
@pytest.mark.parametrize("kind", ["none", "ec", "ef21", "econtrol"])
def test_packed(kind: str, capacity: int) -> None:
    """As many as there is room for, how many there are, and the largest of all; a threshold may be a tensor."""
    (grad, residual, estimate, gain), (_, other, _, _) = state(700, kind), state(700, kind)
    indices, values = select_large(grad, residual, estimate, gain=gain, threshold=1.5)
    packed = select_packed(grad, other, estimate, gain=gain, threshold=torch.tensor([1.5]), capacity=capacity)
    kept = min(capacity, indices.numel())
    assert packed.found.tolist() == [indices.numel()] and packed.indices.numel() == capacity
    assert torch.equal(packed.indices[:kept], indices[:kept]) and torch.equal(packed.values[:kept], values[:kept])
    assert not packed.indices[kept:].any() and not packed.values[kept:].any()
    assert packed.largest.tolist() == [np.abs(values.numpy()).max()]
    assert residual is None or other is not None and torch.equal(residual, other)


def test_largest_of_nothing_and_of_what_is_not_finite() -> None:
    assert select_packed(torch.zeros(5), threshold=1.0, capacity=2).largest.tolist() == [0.0]
    for value in (torch.nan, -torch.inf):
        grad = torch.tensor([1.0, 2.0, value])
        assert not select_packed(grad, threshold=0.5, capacity=1).largest.isfinite().any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rank", [1, 2, 500, 1000])
def test_kth_largest(backend: Backend, rank: int) -> None:
    sizes = torch.from_numpy(np.random.default_rng(rank).integers(0, 300, 1000)).float()
    with force_backend(backend):
        assert kth_largest(sizes, rank) == np.sort(sizes.numpy())[-rank]


def test_wrong_input() -> None:
    grad = torch.zeros(4)
    with pytest.raises(ValueError, match="residual must be a contiguous float32 tensor of shape"):
        select_large(grad, torch.zeros(3), threshold=1.0)
    with pytest.raises(ValueError, match="grad must be a contiguous float32"):
        select_large(grad.half(), threshold=1.0)
    with pytest.raises(ValueError, match="grad must be a contiguous float32"):
        select_large(torch.zeros(8)[::2], threshold=1.0)
    with pytest.raises(ValueError, match="gain=0.5 has no effect without"):
        select_large(grad, torch.zeros(4), gain=0.5, threshold=1.0)
    for threshold in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="the threshold must be at least"):
            select_large(grad, threshold=threshold)
    for tensor in (torch.tensor(1.0), torch.tensor([1.0], dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"a number, or a float32 tensor of shape \(1,\) on cpu, not"):
            select_packed(grad, threshold=tensor, capacity=1)
    with pytest.raises(ValueError, match="rank must be from 1 to 4, not 5"):
        kth_largest(grad, 5)

"""Rounding to several widths at once: both backends against loops over single numbers in NumPy."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_embcomp.kernels.dispatch import Backend, force_backend
from lightning_embcomp.kernels.quantize import PASS, Rounding, RoundingGradients, round_rows, round_rows_backward

BACKENDS: tuple[Backend, ...] = ("reference", "cpu")
WIDTHS = [0, 1, 2, 4, 8, PASS]


def example(rows: int = 40, columns: int = 6, seed: int = 0) -> tuple[Tensor, Tensor, Rounding]:
    """Rows, their gradient, and a rounding over three tables and five groups."""
    source = torch.Generator().manual_seed(seed)
    table = torch.tensor([0, 0, 1, 2, 2])
    shares = torch.rand(5, len(WIDTHS), generator=source)
    shares[1, 2:4] = 0.0
    shares[3] = torch.nn.functional.one_hot(torch.tensor(3), len(WIDTHS))
    rounding = Rounding(
        group=torch.randint(-1, 5, (rows,), generator=source),
        table=table,
        widths=torch.tensor(WIDTHS),
        shares=shares,
        steps=torch.rand(3, len(WIDTHS), generator=source) * 0.5 + 0.05,
        offset=torch.randn(3, columns, generator=source) * 0.1,
    )
    return torch.randn(rows, columns, generator=source), torch.randn(rows, columns, generator=source), rounding


def by_hand(
    grad: np.ndarray, rows: np.ndarray, rounding: Rounding
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Result, gradient of the rows and sums, one number at a time in float64."""
    group, table = rounding.group.numpy(), rounding.table.numpy()
    shares, steps, offset = (x.double().numpy() for x in (rounding.shares, rounding.steps, rounding.offset))
    out, row_grad = np.zeros_like(rows), np.zeros_like(rows)
    sums = {"shares": np.zeros(shares.shape), "errors": np.zeros(shares.shape)}
    sums |= {"steps": np.zeros(steps.shape), "offset": np.zeros(offset.shape)}
    for i in range(rows.shape[0]):
        g = group[i]
        if g < 0:
            out[i], row_grad[i] = rows[i], grad[i]
            continue
        t = table[g]
        for k, width in enumerate(WIDTHS):
            value = np.zeros(rows.shape[1])
            for d in range(rows.shape[1]):
                w, dy = rows[i, d], grad[i, d]
                if width == 0:
                    continue
                if width == PASS:
                    value[d] = w
                    row_grad[i, d] += shares[g, k] * dy
                    continue
                low, high = -(2 ** (width - 1)), 2 ** (width - 1) - 1
                scaled = (w - offset[t, d]) / steps[t, k]
                if scaled < low or scaled > high:
                    level = low if scaled < low else high
                    sums["steps"][t, k] += shares[g, k] * dy * level
                    sums["offset"][t, d] += shares[g, k] * dy
                else:
                    level = round(scaled)  # Python rounds ties to even, as PyTorch does
                    sums["steps"][t, k] += shares[g, k] * dy * (level - scaled)
                    row_grad[i, d] += shares[g, k] * dy
                value[d] = level * steps[t, k] + offset[t, d]
            out[i] += shares[g, k] * value
            sums["shares"][g, k] += grad[i] @ value
            sums["errors"][g, k] += (grad[i] @ value - grad[i] @ rows[i]) ** 2
    return out, row_grad, sums


def as_dict(sums: RoundingGradients) -> dict[str, Tensor]:
    return {name: getattr(sums, name) for name in ("shares", "errors", "steps", "offset")}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(3))
def test_values_and_gradients_by_hand(backend: Backend, seed: int) -> None:
    rows, grad, rounding = example(seed=seed)
    out, row_grad, sums = by_hand(grad.double().numpy(), rows.double().numpy(), rounding)
    with force_backend(backend):
        np.testing.assert_allclose(round_rows(rows, rounding), out, rtol=1e-5, atol=1e-5)
        found, found_sums = round_rows_backward(grad, rows, rounding, True)
    np.testing.assert_allclose(found, row_grad, rtol=1e-5, atol=1e-5)
    for name, wanted in sums.items():
        np.testing.assert_allclose(as_dict(found_sums)[name], wanted, rtol=1e-4, atol=1e-4, err_msg=name)


def test_gradient_of_the_shares_is_that_of_autograd() -> None:
    """The result is linear in the shares: no straight-through rule is involved."""
    rows, grad, rounding = example()
    shares = rounding.shares.clone().clamp(min=1e-3).requires_grad_()  # the definition skips candidates without weight
    with force_backend("reference"):
        (round_rows(rows, replace(rounding, shares=shares)) * grad).sum().backward()
    _, sums = round_rows_backward(grad, rows, rounding, True)
    assert shares.grad is not None
    torch.testing.assert_close(sums.shares, shares.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [0, 1, 9000])
def test_twins_agree(rows: int) -> None:
    values, grad, rounding = example(rows, columns=16)
    results = []
    for backend in BACKENDS:
        with force_backend(backend):
            results.append((round_rows(values, rounding), *round_rows_backward(grad, values, rounding, True)))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])
    for one, other in zip(*(as_dict(result[2]).values() for result in results), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing_but_the_order_of_sums(threads: int) -> None:
    values, grad, rounding = example(20_000, columns=8)
    one = (round_rows(values, rounding), *round_rows_backward(grad, values, rounding, True))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        several = (round_rows(values, rounding), *round_rows_backward(grad, values, rounding, True))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one[0], several[0]) and torch.equal(one[1], several[1])
    for a, b in zip(as_dict(one[2]).values(), as_dict(several[2]).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_all_candidates_only_used_ones_count(backend: Backend) -> None:
    rows, grad, rounding = example()
    with force_backend(backend):
        row_grad, sums = round_rows_backward(grad, rows, rounding, False)
        full_grad, full = round_rows_backward(grad, rows, rounding, True)
    assert torch.equal(row_grad, full_grad) and torch.equal(sums.steps, full.steps)
    assert not sums.shares.any() and not sums.errors.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_rows(backend: Backend) -> None:
    rows, grad, rounding = example()
    with force_backend(backend):
        wanted = round_rows(rows, rounding), round_rows_backward(grad, rows, rounding, True)[0]
        strided = torch.stack([rows, rows], 2)[:, :, 0], torch.stack([grad, grad], 2)[:, :, 0]
        assert not strided[0].is_contiguous()
        assert torch.equal(round_rows(strided[0], rounding), wanted[0])
        assert torch.equal(round_rows_backward(strided[1], strided[0], rounding, True)[0], wanted[1])


def test_zero_width_is_zero_and_not_the_offset() -> None:
    rows, _, rounding = example()
    only_zero = torch.nn.functional.one_hot(torch.zeros(5, dtype=torch.int64), len(WIDTHS)).float()
    rounded = round_rows(rows, replace(rounding, shares=only_zero))
    assert not rounded[rounding.group >= 0].any()
    assert torch.equal(rounded[rounding.group < 0], rows[rounding.group < 0])

r"""Round embedding rows to several widths at once, and the gradients of that.

The quantizer of width b is :math:`Q_b(w) = s\,\mathrm{clamp}(\mathrm{round}\frac{w - o}{s}, -2^{b-1}, 2^{b-1}-1) + o`
with a step s and an offset o; :math:`Q_0 = 0`. A row of group g becomes :math:`\sum_b p_{gb} Q_b(w)`.
"""

from __future__ import annotations

from torch import Tensor

from lightning_embcomp.kernels.dispatch import choose
from lightning_embcomp.kernels.quantize import cpu, reference
from lightning_embcomp.kernels.quantize.types import PASS, Rounding, RoundingGradients

__all__ = ["PASS", "Rounding", "RoundingGradients", "round_rows", "round_rows_backward"]


def round_rows(rows: Tensor, rounding: Rounding) -> Tensor:
    """Weighted sum of the candidates for every row.

    Args:
        rows: float32 ``(N, W)``.
        rounding: Groups, candidates and weights.

    Returns:
        float32 tensor of the same shape.

    Example:
        >>> import torch
        >>> rounding = Rounding(
        ...     group=torch.tensor([0, -1]), table=torch.tensor([0]), widths=torch.tensor([0, 2]),
        ...     shares=torch.tensor([[0.5, 0.5]]), steps=torch.ones(1, 2), offset=torch.zeros(1, 2),
        ... )
        >>> round_rows(torch.tensor([[-5.0, 0.7], [3.0, 4.0]]), rounding)
        tensor([[-1.0000,  0.5000],
                [ 3.0000,  4.0000]])
    """
    return choose(rows.device, cpu.round_rows, reference.round_rows)(rows, rounding)


def round_rows_backward(
    grad: Tensor, rows: Tensor, rounding: Rounding, all_candidates: bool
) -> tuple[Tensor, RoundingGradients]:
    """Gradients of :func:`round_rows`: straight through inside the range of a quantizer, none outside.

    Args:
        grad: Gradient of the result, float32 ``(N, W)``.
        rows: What was rounded.
        rounding: How.
        all_candidates: Whether ``shares`` and ``errors`` are wanted, and for candidates of weight 0 as well; they are
            zero otherwise.

    Returns:
        Gradient of the rows ``(N, W)``, and the sums for the settings.
    """
    kernel = choose(rows.device, cpu.round_rows_backward, reference.round_rows_backward)
    return kernel(grad, rows, rounding, all_candidates)

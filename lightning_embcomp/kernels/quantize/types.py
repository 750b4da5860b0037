"""What the rounding kernels read and give back."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

PASS = 32
"""Width of a candidate that leaves values as they are."""


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """How the rows of a batch are rounded: a weighted sum over candidate widths for each row group.

    Attributes:
        group: Group of each row, int64 ``(N,)``; -1 leaves the row as it is.
        table: Table of each group, int64 ``(G,)``.
        widths: Candidate widths, int64 ``(K,)``: 0 reads as zero, 1 to 8 are bits, 32 leaves values as they are.
        shares: Weight of each candidate, float32 ``(G, K)``; candidates with weight 0 cost nothing.
        steps: Step of each table and candidate, float32 ``(T, K)``, positive; ignored for widths 0 and 32.
        offset: Added to every rounded column of a table, float32 ``(T, W)``.
    """

    group: Tensor
    table: Tensor
    widths: Tensor
    shares: Tensor
    steps: Tensor
    offset: Tensor


@dataclass(frozen=True, kw_only=True)
class RoundingGradients:
    """Sums over a batch that the settings of a rounding are trained by.

    Attributes:
        shares: Gradient of the loss by :attr:`Rounding.shares`, float32 ``(G, K)``; all candidates, if asked for.
        errors: Sum over rows of the squared change of the loss, to first order, were the row rounded to the candidate
            instead of kept as it is, float32 ``(G, K)``.
        steps: Gradient by the steps, float32 ``(T, K)``.
        offset: Gradient by the offsets, float32 ``(T, W)``.
    """

    shares: Tensor
    errors: Tensor
    steps: Tensor
    offset: Tensor

r"""How the rows of a table are rounded: groups of rows, one bit width per group, one step per width.

A row group of width b holds the values :math:`s_b k + o_d` with integers :math:`-2^{b-1} \le k < 2^{b-1}`. Steps are
numbers of float16, so that tables which keep their scale in float16 serve the very same values; rows of width 0 read as
zero and need no storage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

FULL_WIDTH = 32
"""Width of groups that are not rounded."""
MAX_WIDTH = 8
SEARCHED = 255
"""Saved width of groups that a search has not chosen one for."""


@dataclass(frozen=True, kw_only=True)
class TablePrecision:
    """The rounding of one logical table.

    Args:
        bounds: First row of each group, and the number of rows, int64 ``(G + 1,)``, in host memory as all but
            ``group``. Rows count by falling frequency where ``group`` is given, else by their id.
        bits: Width of each group: 0 to 8, or 32 for groups that are not rounded; uint8 ``(G,)``.
        steps: Step of every width from 1 to 8 in use; each a number of float16.
        offset: Added to every rounded column, float32 ``(D,)``.
        group: Group of each row where ids are not numbered by frequency, integers ``(R,)``; None if ``bounds`` are ids.

    Raises:
        ValueError: If the parts do not fit together.

    Example:
        >>> precision = TablePrecision(
        ...     bounds=torch.tensor([0, 1, 3]), bits=torch.tensor([2, 0], dtype=torch.uint8), steps={2: 0.5},
        ...     offset=torch.zeros(4),
        ... )
        >>> precision.round(torch.tensor([[0.4, -0.2, 9.0, -9.0], [1.0, 1.0, 1.0, 1.0]]), start=0)
        tensor([[ 0.5000,  0.0000,  0.5000, -1.0000],
                [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """

    bounds: Tensor
    bits: Tensor
    steps: Mapping[int, float]
    offset: Tensor
    group: Tensor | None = None

    def __post_init__(self) -> None:
        if self.bounds.numel() != self.bits.numel() + 1 or bool((self.bounds.diff() < 0).any()):
            raise ValueError(
                f"{self.bits.numel()} groups need {self.bits.numel() + 1} rising bounds, not {self.bounds.tolist()}"
            )
        for width in self.widths():
            if width > MAX_WIDTH and width != FULL_WIDTH:
                raise ValueError(
                    f"a group has {width} bits; widths are 0 to {MAX_WIDTH}, or {FULL_WIDTH} for unrounded"
                )
            if 0 < width <= MAX_WIDTH and self.steps.get(width, 0.0) <= 0.0:
                raise ValueError(f"groups of {width} bits have no positive step")

    def widths(self) -> list[int]:
        """Widths in use, rising."""
        return sorted({int(bits) for bits in self.bits.tolist()})

    def group_of(self, start: int, stop: int) -> Tensor:
        """Group of the rows ``start`` to ``stop``, int64."""
        if self.group is not None:
            return self.group[start:stop].cpu().long()
        return torch.bucketize(torch.arange(start, stop), self.bounds[1:-1], right=True)

    def bits_of(self, start: int, stop: int) -> Tensor:
        """Width of the rows ``start`` to ``stop``, uint8."""
        return self.bits[self.group_of(start, stop)]

    def codes(self, values: Tensor, width: int) -> Tensor:
        """Integers :math:`k + 2^{b-1}` from 0 to :math:`2^b - 1` of values ``(n, D)``, uint8."""
        half = 2 ** (width - 1)
        scaled = (values.float() - self.offset.to(values.device)) / self.steps[width]
        return (scaled.round().clamp(-half, half - 1) + half).to(torch.uint8)

    def decode(self, codes: Tensor, width: int) -> Tensor:
        """Values of the integers of :meth:`codes`, float32."""
        return (codes.float() - 2 ** (width - 1)) * self.steps[width] + self.offset.to(codes.device)

    def round(self, values: Tensor, start: int) -> Tensor:
        """Rounded values of consecutive rows.

        Args:
            values: Full-width rows from ``start`` on, ``(n, D)``.
            start: First row.

        Returns:
            float32 tensor of the same shape.
        """
        bits = self.bits_of(start, start + values.shape[0]).to(values.device)
        rounded = torch.zeros(values.shape, dtype=torch.float32, device=values.device)
        for width in self.widths():
            mine = bits == width
            if width == FULL_WIDTH:
                rounded[mine] = values[mine].float()
            elif width:
                rounded[mine] = self.decode(self.codes(values[mine], width), width)
        return rounded

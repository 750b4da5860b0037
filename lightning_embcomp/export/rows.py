"""Rows as FBGEMM's integer tables hold them: scale and bias in float16, then the values, lowest bits first."""

from __future__ import annotations

from dataclasses import dataclass

import fbgemm_gpu  # noqa: F401 - registers the quantiser
import torch
from torch import Tensor

from lightning_embcomp.engine.layout import Columns
from lightning_embcomp.export.errors import ExportError

HEADER_BYTES = 4
"""Scale and bias of an integer row, float16 each."""
PRECISIONS = (2, 4, 8, 16, 32)
"""Bits of a value in a served table, rising; 16 and 32 are floats."""
_PAD = 4
"""Integer rows are filled up to a multiple of this many columns, as FBGEMM needs it."""
_QUANTISER_PAD = 8  # FBGEMM's quantiser wants whole pairs of bytes


@dataclass(frozen=True, kw_only=True, order=True)
class RowFormat:
    """Rows of one kind, which share a table when they are served.

    Args:
        dim: Columns of the logical rows.
        columns: Columns that the rows keep.
        bits: Bits of a value: 1 to 8, 16 or 32.
        shared: Whether step and offset belong to the logical table instead of to each row.

    Example:
        >>> rows = RowFormat(dim=16, columns=((0, 8),), bits=3, shared=True)
        >>> rows.width, rows.container, rows.row_bytes(1), rows.row_bytes(16)
        (8, 4, 8, 16)
    """

    dim: int
    columns: Columns
    bits: int
    shared: bool

    @property
    def width(self) -> int:
        """Columns kept."""
        return sum(length for _, length in self.columns)

    @property
    def container(self) -> int:
        """Bits of a value when it is served."""
        return next(bits for bits in PRECISIONS if self.bits <= bits)

    def row_bytes(self, alignment: int) -> int:
        """Bytes of a served row."""
        if self.container >= 16:
            size = self.width * self.container // 8
        else:
            size = HEADER_BYTES + -(-self.width // _PAD) * _PAD * self.container // 8
        return -(-size // alignment) * alignment


def quantize_rows(values: Tensor, bits: int) -> Tensor:
    """Round every row for itself, as FBGEMM does: from its minimum to its maximum in :math:`2^b - 1` steps.

    Args:
        values: float32 ``(n, w)``; 16 and 32 bits keep floats.
        bits: 2, 4, 8, 16 or 32.

    Returns:
        Served rows, uint8 ``(n, bytes)``, not aligned.

    Raises:
        ExportError: If a value is not finite or too large for float16.

    Example:
        >>> rows = quantize_rows(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), 2)
        >>> rows.shape, f"{int(rows[0, 4]):08b}"  # the last byte holds 3, 2, 1 and 0
        (torch.Size([1, 5]), '11100100')
    """
    if not bool(torch.isfinite(values).all()):
        raise ExportError("holds NaN or infinite weights: export an earlier checkpoint, from before the run diverged")
    if bits == 32:
        return values.float().contiguous().view(torch.uint8)
    if bits == 16:
        half = values.half().contiguous()
        _check_half(half)
        return half.view(torch.uint8)
    packed = -(-values.shape[1] // _PAD) * _PAD * bits // 8
    if values.shape[0] == 0:
        return torch.empty(0, HEADER_BYTES + packed, dtype=torch.uint8)
    missing = -values.shape[1] % _QUANTISER_PAD
    if missing:  # copies of a column move neither minimum nor maximum
        values = torch.cat([values, values[:, -1:].expand(-1, missing)], 1)
    fused = torch.ops.fbgemm.FloatOrHalfToFusedNBitRowwiseQuantizedSBHalf(values.float().contiguous(), bits)
    header = fused[:, -HEADER_BYTES:].contiguous()
    _check_half(header.view(torch.float16))
    return torch.cat([header, fused[:, :packed]], 1)


def shared_rows(codes: Tensor, bits: int, step: float) -> Tensor:
    r"""Served rows of integers that share a step: scale is the step, bias :math:`-2^{b-1}` steps.

    Args:
        codes: uint8 ``(n, w)``, below :math:`2^b`.
        bits: b, 1 to 8.
        step: The step, a number of float16.

    Returns:
        uint8 ``(n, bytes)``, not aligned. The rows hold no offset.
    """
    container = next(size for size in PRECISIONS if bits <= size)
    missing = -codes.shape[1] % _PAD
    if missing:
        codes = torch.cat([codes, codes.new_zeros(codes.shape[0], missing)], 1)
    header = torch.tensor([step, -step * 2 ** (bits - 1)], dtype=torch.float64).half()
    if (
        not bool(torch.isfinite(header).all())
        or float(header[0]) != step
        or float(header[1]) != -step * 2 ** (bits - 1)
    ):
        raise ExportError(f"has step {step} for {bits} bits, which float16 does not hold exactly")
    per_byte = 8 // container
    shifts = torch.arange(per_byte, dtype=torch.uint8) * container
    packed = (codes.view(codes.shape[0], -1, per_byte) << shifts).sum(2, dtype=torch.uint8)
    return torch.cat([header.view(torch.uint8).expand(codes.shape[0], -1), packed], 1)


def _check_half(numbers: Tensor) -> None:
    if not bool(torch.isfinite(numbers).all()):
        raise ExportError("holds weights beyond 65504, which float16 does not hold: export it with 32 bits")

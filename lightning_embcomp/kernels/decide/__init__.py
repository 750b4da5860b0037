"""Read decisions for rows out of a table over their present state and utility; count rows by the same key.

A *state* is the present code of a row (``prefix``: one part per row), or whether a part of the row is live (layout
``chunks``: bit ``p`` of the code belongs to part ``p``). Utilities are keyed by their bfloat16 bit pattern.
"""

from __future__ import annotations

from torch import Tensor

from lightning_embcomp.kernels.decide import cpu, reference
from lightning_embcomp.kernels.dispatch import choose

__all__ = ["count_cells", "decide"]


def count_cells(codes: Tensor, utility: Tensor, counts: Tensor, *, prefix: bool) -> None:
    """Add the rows of a slab to a histogram.

    Args:
        codes: Present codes, uint8 ``(n,)``.
        utility: Non-negative bfloat16 ``(n, parts)``.
        counts: int64 ``(parts, states, 32768)`` on the device of the rows or in host memory, changed in place.
        prefix: Whether the state is the code itself.
    """
    kernel = choose(codes.device, cpu.count_cells, reference.count_cells)
    kernel(codes, utility, counts, prefix=prefix)


def decide(
    codes: Tensor,
    utility: Tensor,
    keep: Tensor,
    partial: tuple[int, int, int, int],
    seen: int,
    *,
    prefix: bool,
) -> tuple[Tensor, int]:
    """Give every row of a slab its new code.

    Args:
        codes: Present codes, uint8 ``(n,)``.
        utility: Non-negative bfloat16 ``(n, parts)``.
        keep: Chunks to keep per cell, uint8 ``(parts, states, 32768)``, wherever it is; 0 or 1 per part unless
            ``prefix``.
        partial: ``(part, state, bin, rows)``: the first so many rows of that cell keep one more; part -1 for none.
        seen: Rows of the partial cell in earlier slabs.
        prefix: Whether the state is the code itself.

    Returns:
        New codes, uint8 ``(n,)``, and the rows of the partial cell seen so far.
    """
    kernel = choose(codes.device, cpu.decide, reference.decide)
    return kernel(codes, utility, keep, partial, seen, prefix=prefix)

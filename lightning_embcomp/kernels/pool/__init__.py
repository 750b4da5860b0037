"""Pool rows straight from the class tables into the padded output: no class lists, no class outputs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_embcomp.kernels.dispatch import choose
from lightning_embcomp.kernels.pool import cpu, reference
from lightning_embcomp.kernels.types import BagLayout, ClassColumns, IdRoutes

__all__ = ["pool"]


def pool(
    tables: Sequence[Tensor],
    routes: IdRoutes,
    offsets: Tensor,
    weights: Tensor | None,
    layout: BagLayout,
    columns: ClassColumns,
) -> Tensor:
    """Sum or average the rows of every bag, columns without storage reading as zero.

    Args:
        tables: Weights of each class, float32 ``(rows, width)``.
        routes: Class and slot of every id.
        offsets: Bag boundaries, ``(bags + 1,)``.
        weights: Per-sample weights, float32 ``(N,)``, or None.
        layout: Output position of each bag.
        columns: Columns that each class stores.

    Returns:
        float32 tensor of ``layout.shape``.
    """
    kernel = choose(offsets.device, cpu.pool, reference.pool)
    return kernel(tables, routes, offsets, weights, layout, columns)

"""Look rows up in served tables: route every id, turn integers back into values, pool; one pass over the bags."""

from __future__ import annotations

from torch import Tensor

from lightning_embcomp.kernels.dequantize import cpu, reference
from lightning_embcomp.kernels.dequantize.types import ServedClasses, ServedRouter
from lightning_embcomp.kernels.dispatch import choose
from lightning_embcomp.kernels.types import BagLayout

__all__ = ["ServedClasses", "ServedRouter", "pool_served"]


def pool_served(
    indices: Tensor,
    offsets: Tensor,
    weights: Tensor | None,
    layout: BagLayout,
    router: ServedRouter,
    classes: ServedClasses,
) -> Tensor:
    """Sum or average the rows of every bag; columns and rows without storage read as zero.

    Args:
        indices: Logical ids of all features, int32 or int64 ``(N,)``, feature by feature.
        offsets: Bag boundaries, int32 or int64 ``(bags + 1,)``.
        weights: Per-sample weights, float32 ``(N,)``, or None.
        layout: Output position of each bag.
        router: Class and slot of every logical row.
        classes: The rows.

    Returns:
        float32 tensor of ``layout.shape``.

    Raises:
        IdOutOfRangeError: If an id is negative or not below the rows of its table.
    """
    kernel = choose(indices.device, cpu.pool_served, reference.pool_served)
    return kernel(indices, offsets, weights, layout, router, classes)

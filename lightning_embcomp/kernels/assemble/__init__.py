"""Assemble the pooled rows of the classes into the padded output, and take their gradients apart again."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_embcomp.kernels.assemble import cpu, reference
from lightning_embcomp.kernels.dispatch import choose
from lightning_embcomp.kernels.types import BagLayout, ClassColumns, RoutedBatch

__all__ = ["assemble", "bag_norms", "disassemble"]


def assemble(
    pooled: Sequence[Tensor | None], offsets: Tensor, batch: RoutedBatch, layout: BagLayout, columns: ClassColumns
) -> Tensor:
    """Add the pooled rows of all classes up into zero-padded logical rows.

    Args:
        pooled: Per class the pooled rows ``(bags in the class, class width)``, float32, or None where it has no bag.
        offsets: Bag boundaries of the original batch, ``(bags + 1,)``; MEAN features divide by these lengths.
        batch: The routed batch that the rows belong to.
        layout: Output position of each bag.
        columns: Columns that each class stores.

    Returns:
        float32 tensor of ``layout.shape``. Columns that no live class of a bag stores are zero.
    """
    device = offsets.device
    kernel = choose(device, cpu.assemble, reference.assemble)
    return kernel(pooled, offsets, batch, layout, columns)


def disassemble(
    grad: Tensor, offsets: Tensor, batch: RoutedBatch, layout: BagLayout, columns: ClassColumns
) -> list[Tensor | None]:
    """Gradient of :func:`assemble`: the rows and columns of ``grad`` that each class sees.

    Args:
        grad: Gradient of the output, float32 of ``layout.shape``.
        offsets: As in :func:`assemble`.
        batch: As in :func:`assemble`.
        layout: As in :func:`assemble`.
        columns: As in :func:`assemble`.

    Returns:
        Per class the gradient of its pooled rows, None for a class without bags.
    """
    kernel = choose(grad.device, cpu.disassemble, reference.disassemble)
    return kernel(grad, offsets, batch, layout, columns)


def bag_norms(grad: Tensor, offsets: Tensor, layout: BagLayout, parts: int) -> Tensor:
    r"""Euclidean norm of the gradient that one id of each bag receives, by column part.

    For SUM pooling every id of a bag receives the bag's gradient, for MEAN pooling the gradient over the length.

    Args:
        grad: Gradient of the output, float32 of ``layout.shape``.
        offsets: Bag boundaries, ``(bags + 1,)``.
        layout: Output position of each bag.
        parts: Equal column parts :math:`G` that each feature's width is cut into.

    Returns:
        float32 tensor of shape ``(bags, parts)``; zero for empty bags.
    """
    kernel = choose(grad.device, cpu.bag_norms, reference.bag_norms)
    return kernel(grad, offsets, layout, parts)

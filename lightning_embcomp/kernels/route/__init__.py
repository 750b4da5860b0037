"""Route the ids of a batch to row classes: ``(table, id)`` to ``(class, slot)``, one bag list per class."""

from __future__ import annotations

from torch import Tensor

from lightning_embcomp.kernels.dispatch import backend_for
from lightning_embcomp.kernels.route import cpu, reference
from lightning_embcomp.kernels.types import BagLayout, IdRoutes, RoutedBatch, RouterTensors

__all__ = ["IdOutOfRangeError", "find", "route"]

IdOutOfRangeError = reference.IdOutOfRangeError


def find(indices: Tensor, offsets: Tensor, layout: BagLayout, router: RouterTensors, classes: int) -> IdRoutes:
    """Look the row class and slot of every id up, in the order of the batch.

    Args:
        indices: As in :func:`route`.
        offsets: As in :func:`route`.
        layout: As in :func:`route`.
        router: As in :func:`route`.
        classes: As in :func:`route`.

    Returns:
        Class and slot per id.

    Raises:
        IdOutOfRangeError: If an id is negative or not below the rows of its table.
    """
    kernel = cpu.find if backend_for(indices.device) == "cpu" else reference.find
    return kernel(indices, offsets, layout, router, classes)


def route(indices: Tensor, offsets: Tensor, layout: BagLayout, router: RouterTensors, classes: int) -> RoutedBatch:
    """Send every id to the slot of its row class and list the non-empty bags of each class.

    Args:
        indices: Logical ids of all features, int32 or int64 tensor of shape ``(N,)``, feature by feature.
        offsets: Bag boundaries, int32 or int64 tensor of shape ``(bags + 1,)``.
        layout: Features of the bags.
        router: Packed routers of the tables.
        classes: Number of row classes ``C``.

    Returns:
        The routed batch; ids whose row has no storage are left out.

    Raises:
        IdOutOfRangeError: If an id is negative or not below the rows of its table.
    """
    kernel = cpu.route if backend_for(indices.device) == "cpu" else reference.route
    return kernel(indices, offsets, layout, router, classes)

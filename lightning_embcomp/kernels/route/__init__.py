"""Route the ids of a batch to row classes: ``(table, id)`` to ``(class, slot)``, one bag list per class."""

from __future__ import annotations

from torch import Tensor

from lightning_embcomp.kernels.dispatch import choose
from lightning_embcomp.kernels.route import cpu, reference
from lightning_embcomp.kernels.route.types import ClassLists
from lightning_embcomp.kernels.types import BagLayout, IdRoutes, RoutedBatch, RouterTensors

__all__ = ["ClassLists", "IdOutOfRangeError", "find", "list_by_class", "route"]

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
        IdOutOfRangeError: If an id is negative or not below the rows of its table. On a GPU the answer is not waited
            for: a later call raises, and ids outside of their table have no class.
    """
    kernel = choose(indices.device, cpu.find, reference.find)
    return kernel(indices, offsets, layout, router, classes)


def route(indices: Tensor, offsets: Tensor, layout: BagLayout, router: RouterTensors, classes: int) -> RoutedBatch:
    """Send every id to the slot of its row class and list the non-empty bags of each class.

    The lengths of the lists are known to the host, which has to wait for a GPU to know them; :func:`list_by_class` does
    not wait.

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
    kernel = choose(indices.device, cpu.route, reference.route)
    return kernel(indices, offsets, layout, router, classes)


def list_by_class(
    indices: Tensor, offsets: Tensor, layout: BagLayout, router: RouterTensors, classes: int
) -> ClassLists:
    """Send every id to the slot of its row class, in lists whose sizes do not depend on the ids.

    Args:
        indices: As in :func:`route`.
        offsets: As in :func:`route`.
        layout: As in :func:`route`.
        router: As in :func:`route`.
        classes: As in :func:`route`.

    Returns:
        All ids, class by class; those without storage last.

    Raises:
        IdOutOfRangeError: As in :func:`find`.
    """
    kernel = choose(indices.device, reference.list_by_class, reference.list_by_class)  # only GPUs profit from it
    return kernel(indices, offsets, layout, router, classes)

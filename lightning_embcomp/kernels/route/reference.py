"""Routing in plain PyTorch: the definition that the fast paths are tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_embcomp.kernels.route.types import ClassLists
from lightning_embcomp.kernels.types import NO_CLASS, BagLayout, IdRoutes, RoutedBatch, RouterTensors


class IdOutOfRangeError(IndexError):
    """An id lies outside its logical table.

    Args:
        position: Position of the id in the batch.
        feature: Index of the feature.
        value: The id.
        rows: Rows of the feature's table.
    """

    def __init__(self, position: int, feature: int, value: int, rows: int) -> None:
        super().__init__(f"id {value} of feature {feature} at position {position} is outside 0..{rows - 1}")
        self.position, self.feature, self.value, self.rows = position, feature, value, rows


def count_ones(words: Tensor) -> Tensor:
    """Count the set bits of every int64.

    Example:
        >>> count_ones(torch.tensor([0, 7, -1]))
        tensor([ 0,  3, 64])
    """
    pairs = words - ((words >> 1) & 0x5555555555555555)
    nibbles = (pairs & 0x3333333333333333) + ((pairs >> 2) & 0x3333333333333333)
    octets = (nibbles + (nibbles >> 4)) & 0x0F0F0F0F0F0F0F0F
    return torch.stack([(octets >> shift) & 0xFF for shift in range(0, 64, 8)]).sum(0)


def lookup(ids: Tensor, table: Tensor, router: RouterTensors) -> tuple[Tensor, Tensor]:
    """Read code and slot of logical rows.

    Args:
        ids: Logical rows, int64 ``(N,)``, in range.
        table: Table of each id, int64 ``(N,)``.
        router: Packed routers.

    Returns:
        Codes, int64 ``(N,)``, and slots, int64 ``(N,)``; a slot is meaningless where the code is 0.
    """
    words32 = router.words.view(torch.int32)
    block = router.start[table] + (ids >> 6) * router.stride[table]
    bit = ids & 63
    planes = router.planes[table]
    code = torch.zeros_like(ids)
    same = torch.full_like(ids, -1)
    for plane in range(int(router.planes.max())):
        present = plane < planes
        word = router.words[torch.where(present, block + plane, block)]
        is_set = (((word >> bit) & 1) == 1) & present
        code |= is_set.long() << plane
        same &= torch.where(is_set, word, torch.where(present, ~word, -1))
    rank = count_ones(same & ((torch.ones_like(ids) << bit) - 1))
    base = words32[2 * (block + planes) + (code - 1).clamp(min=0)]
    return code, base.long() + rank


def find(indices: Tensor, offsets: Tensor, layout: BagLayout, router: RouterTensors, classes: int) -> IdRoutes:
    """Plain twin of :func:`lightning_embcomp.kernels.route.find`."""
    ids, offsets = indices.long(), offsets.long()
    bag = torch.repeat_interleave(torch.arange(offsets.numel() - 1, device=ids.device), offsets.diff())
    feature = torch.searchsorted(layout.bag_start[1:], bag, right=True)
    table = layout.table[feature]
    outside = (ids < 0) | (ids >= router.rows[table])
    if bool(outside.any()):
        at = int(outside.nonzero()[0])
        raise IdOutOfRangeError(at, int(feature[at]), int(ids[at]), int(router.rows[table[at]]))
    code, slot = lookup(ids, table, router)
    row_class = router.class_of_code[table, code]
    return IdRoutes(row_class=torch.where(row_class < 0, NO_CLASS, row_class).to(torch.uint8), slot=slot.int())


def route(indices: Tensor, offsets: Tensor, layout: BagLayout, router: RouterTensors, classes: int) -> RoutedBatch:
    """Plain twin of :func:`lightning_embcomp.kernels.route.route`."""
    routes = find(indices, offsets, layout, router, classes)
    row_class, slot = routes.row_class, routes.slot
    bags = offsets.numel() - 1
    bag = torch.repeat_interleave(torch.arange(bags, device=indices.device), offsets.long().diff())

    slots, positions, all_offsets, all_bags = [], [], [], []
    id_start, bag_start = [0], [0]
    for c in range(classes):
        mine = (row_class == c).nonzero().flatten()
        slots.append(slot[mine])
        positions.append(mine)
        present, lengths = torch.unique_consecutive(bag[mine], return_counts=True)
        all_bags.append(present)
        all_offsets.append(torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]))
        id_start.append(id_start[-1] + mine.numel())
        bag_start.append(bag_start[-1] + present.numel())
    return RoutedBatch(
        slots=torch.cat(slots).int(),
        positions=torch.cat(positions).int(),
        offsets=torch.cat(all_offsets).int(),
        bags=torch.cat(all_bags).int(),
        id_start=tuple(id_start),
        bag_start=tuple(bag_start),
        chunk_bag=torch.tensor([0, bags]),
        chunk_class_bag=torch.tensor([bag_start[:-1], bag_start[1:]]),
    )


def list_by_class(
    indices: Tensor, offsets: Tensor, layout: BagLayout, router: RouterTensors, classes: int
) -> ClassLists:
    """Plain twin of :func:`lightning_embcomp.kernels.route.list_by_class`."""
    routes = find(indices, offsets, layout, router, classes)
    row_class = torch.where(routes.row_class == NO_CLASS, classes, routes.row_class.long())
    bags = offsets.numel() - 1
    bag = torch.repeat_interleave(torch.arange(bags, device=indices.device), offsets.long().diff())
    counts = torch.bincount(row_class * bags + bag, minlength=(classes + 1) * bags)
    order = row_class.sort(stable=True).indices
    return ClassLists(
        slots=torch.where(row_class == classes, 0, routes.slot)[order],
        positions=order.int(),
        offsets=torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
    )

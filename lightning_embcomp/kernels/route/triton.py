"""Routing on CUDA: a lane per id finds class and slot; a lane per bag writes the class lists.

``find`` moves per id 4 or 8 bytes in, 5 out, and one or two 32-byte sectors of the packed router at a random place
(planes and base of a block lie side by side). Those sectors bound it: by memory for large tables, by the L2 for tables
below 1 byte per row times its size. The lists add 8 bytes per id and 24 per bag and class.
"""
# ruff: noqa: ANN001, ANN202 - Triton has types of its own

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_embcomp.kernels.route.types import ClassLists
from lightning_embcomp.kernels.route.watch import NEVER, Findings, report
from lightning_embcomp.kernels.triton import count_at_most, read_code, steps_for
from lightning_embcomp.kernels.types import NO_CLASS, BagLayout, IdRoutes, RoutedBatch, RouterTensors

_IDS = 512
_BAGS = 128
_NO_CLASS: tl.constexpr = tl.constexpr(NO_CLASS)
_NEVER: tl.constexpr = tl.constexpr(NEVER)


@triton.jit
def _find(
    ids,
    bounds,
    table_of,
    words,
    words32,
    start,
    stride,
    planes,
    rows,
    class_of_code,
    id_class,
    id_slot,
    first_bad,
    bad_value,
    n,
    features,
    codes,
    steps: tl.constexpr,
    block: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    there = i < n
    feature = count_at_most(bounds + 1, features, i, steps)
    table = tl.load(table_of + feature, there, other=0)
    row = tl.load(ids + i, there, other=0).to(tl.int64)
    inside = there & (row >= 0) & (row < tl.load(rows + table, there, other=0))
    first_word = tl.load(start + table, inside, other=0) + (row >> 6) * tl.load(stride + table, inside, other=0)
    code, slot = read_code(words, words32, first_word, tl.load(planes + table, inside, other=0), row & 63, inside)
    row_class = tl.load(class_of_code + table * codes + code, inside, other=-1)
    tl.store(id_class + i, tl.where(row_class < 0, _NO_CLASS, row_class).to(tl.uint8), there)
    tl.store(id_slot + i, tl.where(row_class < 0, 0, slot).to(tl.int32), there)
    wrong = tl.min(tl.where(there & (inside == 0), i, _NEVER), 0)
    if wrong < _NEVER:
        tl.atomic_min(first_bad, wrong)
        tl.store(bad_value + tl.program_id(0), tl.sum(tl.where(i == wrong, row, 0), 0))


@triton.jit
def _count(offsets, id_class, counts, bags, classes, block: tl.constexpr):
    bag = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    first = tl.load(offsets + bag, bag < bags, other=0).to(tl.int64)
    length = tl.load(offsets + bag + 1, bag < bags, other=0) - first
    for k in range(tl.max(length, 0)):
        row_class = tl.load(id_class + first + k, k < length, other=0).to(tl.int64)
        row_class = tl.where(row_class == _NO_CLASS, classes, row_class)
        tl.atomic_add(counts + row_class * bags + bag, 1, mask=k < length)


@triton.jit
def _fill(offsets, id_class, id_slot, next_entry, slots, positions, bags, classes, block: tl.constexpr):
    # A lane owns a bag and goes through its ids in order: nobody else touches its entries, the result is always the
    # same. The atomic add only keeps the read behind the write of the round before.
    bag = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    first = tl.load(offsets + bag, bag < bags, other=0).to(tl.int64)
    length = tl.load(offsets + bag + 1, bag < bags, other=0) - first
    for k in range(tl.max(length, 0)):
        here = k < length
        row_class = tl.load(id_class + first + k, here, other=0).to(tl.int64)
        row_class = tl.where(row_class == _NO_CLASS, classes, row_class)
        at = tl.atomic_add(next_entry + row_class * bags + bag, 1, mask=here)
        tl.store(slots + at, tl.load(id_slot + first + k, here, other=0), here)
        tl.store(positions + at, (first + k).to(tl.int32), here)


@triton.jit
def _compact(offsets, entry, id_start, out_bags, out_offsets, bags, pairs, block: tl.constexpr):
    pair = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    there = pair < pairs
    row_class = pair // bags
    bag = pair - row_class * bags
    origin = tl.load(id_start + row_class, there, other=0)
    first = tl.load(offsets + pair, there, other=0)
    end = tl.load(offsets + pair + 1, there, other=0)
    at = tl.load(entry + pair, there, other=0)  # non-empty pairs up to this one
    used = there & (end > first)
    tl.store(out_bags + at - 1, bag.to(tl.int32), used)
    tl.store(out_offsets + at - 1 + row_class, (first - origin).to(tl.int32), used)
    tl.store(out_offsets + at + row_class, (end - origin).to(tl.int32), there & (bag == bags - 1))


def find(indices: Tensor, offsets: Tensor, layout: BagLayout, router: RouterTensors, classes: int) -> IdRoutes:
    """Triton twin of :func:`lightning_embcomp.kernels.route.reference.find`; a GPU reports bad ids in a later call."""
    ids, device = indices.contiguous(), indices.device
    routes = IdRoutes(
        row_class=torch.empty(ids.numel(), dtype=torch.uint8, device=device),
        slot=torch.empty(ids.numel(), dtype=torch.int32, device=device),
    )
    if not ids.numel():
        return routes
    programs, features = triton.cdiv(ids.numel(), _IDS), layout.table.numel()
    findings = Findings.prepare(programs, _IDS, offsets, layout, router)
    _find[(programs,)](
        ids,
        findings.bounds,
        layout.table,
        router.words,
        router.words.view(torch.int32),
        router.start,
        router.stride,
        router.planes,
        router.rows,
        router.class_of_code,
        routes.row_class,
        routes.slot,
        findings.first,
        findings.values,
        ids.numel(),
        features,
        router.class_of_code.shape[1],
        steps_for(features),
        _IDS,
    )
    report(findings)
    return routes


def list_by_class(
    indices: Tensor, offsets: Tensor, layout: BagLayout, router: RouterTensors, classes: int
) -> ClassLists:
    """Triton twin of :func:`lightning_embcomp.kernels.route.reference.list_by_class`."""
    routes = find(indices, offsets, layout, router, classes)
    offsets, bags, device = offsets.contiguous(), offsets.numel() - 1, indices.device
    lists = ClassLists(
        slots=torch.empty_like(routes.slot),
        positions=torch.empty_like(routes.slot),
        offsets=torch.zeros((classes + 1) * bags + 1, dtype=torch.int64, device=device),
    )
    if bags <= 0:
        return lists
    grid = (triton.cdiv(bags, _BAGS),)
    counts = torch.zeros((classes + 1) * bags, dtype=torch.int32, device=device)
    _count[grid](offsets, routes.row_class, counts, bags, classes, _BAGS)
    torch.cumsum(counts, 0, out=lists.offsets[1:])
    next_entry = lists.offsets[:-1].clone()
    _fill[grid](offsets, routes.row_class, routes.slot, next_entry, lists.slots, lists.positions, bags, classes, _BAGS)
    return lists


def route(indices: Tensor, offsets: Tensor, layout: BagLayout, router: RouterTensors, classes: int) -> RoutedBatch:
    """Triton twin of :func:`lightning_embcomp.kernels.route.reference.route`.

    The lengths of the lists are part of the result, so the host waits for them, once; :func:`list_by_class` does not.
    """
    lists = list_by_class(indices, offsets, layout, router, classes)
    bags, device = offsets.numel() - 1, indices.device
    pairs = classes * bags
    entry = lists.offsets[: pairs + 1].diff().gt(0).cumsum(0)
    id_start, bag_start = [0] * (classes + 1), [0] * (classes + 1)
    if pairs:
        first_entry = torch.cat([entry.new_zeros(1), entry])
        id_start, bag_start = torch.stack([lists.offsets[: pairs + 1 : bags], first_entry[::bags]]).tolist()
    out_bags = torch.empty(bag_start[-1], dtype=torch.int32, device=device)
    out_offsets = torch.zeros(bag_start[-1] + classes, dtype=torch.int32, device=device)
    if pairs:
        grid = (triton.cdiv(pairs, _IDS),)
        starts = lists.offsets[: pairs + 1 : bags].contiguous()
        _compact[grid](lists.offsets, entry, starts, out_bags, out_offsets, bags, pairs, _IDS)
    return RoutedBatch(
        slots=lists.slots[: id_start[-1]],
        positions=lists.positions[: id_start[-1]],
        offsets=out_offsets,
        bags=out_bags,
        id_start=tuple(id_start),
        bag_start=tuple(bag_start),
        chunk_bag=torch.tensor([0, bags]),
        chunk_class_bag=torch.tensor([bag_start[:-1], bag_start[1:]]),
    )

"""Lookups in served tables in plain PyTorch: the definition that the fast path is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_embcomp.kernels.assemble.reference import place, runs_of
from lightning_embcomp.kernels.dequantize.types import ServedClasses, ServedRouter
from lightning_embcomp.kernels.route.reference import IdOutOfRangeError, lookup
from lightning_embcomp.kernels.types import NO_CLASS, BagLayout

_HEADER = 4


def locate(ids: Tensor, table: Tensor, router: ServedRouter) -> tuple[Tensor, Tensor]:
    """Class (``NO_CLASS`` for none) and slot of logical rows.

    Args:
        ids: Logical rows, int64 ``(N,)``, in range.
        table: Table of each, int64 ``(N,)``.
        router: Where rows are.
    """
    row_class, slot = torch.full_like(ids, NO_CLASS), torch.zeros_like(ids)
    for t in table.unique().tolist():
        mine = table == t
        first, last = int(router.first_run[t]), int(router.first_run[t + 1])
        if last > first:
            run = first + torch.searchsorted(router.run_end[first:last].long(), ids[mine], right=True)
            row_class[mine] = router.run_class[run].long()
            slot[mine] = router.run_base[run] + ids[mine]
        else:
            code, found = lookup(ids[mine], table[mine], router.packed)
            row_class[mine] = router.class_of_code[t, code].long()
            slot[mine] = found
    return row_class, slot


def values_of(rows: Tensor, bits: int, width: int) -> Tensor:
    """Float32 values ``(n, width)`` of served rows, without offset."""
    if bits >= 16:
        dtype = torch.float16 if bits == 16 else torch.float32
        return _packed(rows[:, : width * bits // 8]).view(dtype).float()
    header = _packed(rows[:, :_HEADER]).view(torch.float16).float()
    per_byte = 8 // bits
    packed = rows[:, _HEADER : _HEADER + -(-width // per_byte)].int().unsqueeze(2)
    shifts = torch.arange(per_byte, device=rows.device, dtype=torch.int32) * bits
    codes = (packed >> shifts) & (2**bits - 1)
    return codes.reshape(rows.shape[0], -1)[:, :width].float() * header[:, :1] + header[:, 1:]


def _packed(part: Tensor) -> Tensor:
    """Copy without gaps; ``contiguous`` leaves the gap of a single row."""
    return part.clone(memory_format=torch.contiguous_format)


def pool_served(
    indices: Tensor,
    offsets: Tensor,
    weights: Tensor | None,
    layout: BagLayout,
    router: ServedRouter,
    classes: ServedClasses,
) -> Tensor:
    """Plain twin of :func:`lightning_embcomp.kernels.dequantize.pool_served`."""
    ids, offsets = indices.long(), offsets.long()
    out = torch.zeros(layout.shape, dtype=torch.float32, device=ids.device)
    bag = torch.repeat_interleave(torch.arange(offsets.numel() - 1, device=ids.device), offsets.diff())
    id_table = layout.table[torch.searchsorted(layout.bag_start[1:], bag, right=True)]
    limit = router.packed.rows[id_table]
    outside = (ids < 0) | (ids >= limit)
    if bool(outside.any()):
        at = int(outside.nonzero()[0])
        bad = int(torch.searchsorted(layout.bag_start[1:], bag[at], right=True))
        raise IdOutOfRangeError(at, bad, int(ids[at]), int(limit[at]))
    row_class, slot = locate(ids, id_table, router)
    for c, rows in enumerate(classes.rows):
        mine = (row_class == c).nonzero().flatten()
        if mine.numel() == 0:
            continue
        feature, row, scale = place(bag[mine], offsets, layout)
        if weights is not None:
            scale = scale * weights[mine]
        values = values_of(rows[slot[mine]], int(classes.bits[c]), int(classes.columns.width[c]))
        first = classes.first_offset[id_table[mine]]
        for stored, column, length in runs_of(classes.columns, c):
            part = values[:, stored : stored + length]
            lanes = torch.arange(length, device=out.device)
            if bool(classes.shifted[c]) and bool((first >= 0).any()):
                shift = classes.offsets[first.clamp(min=0).unsqueeze(1) + column + lanes]
                part = part + torch.where(first.unsqueeze(1) >= 0, shift, 0.0)
            span = layout.column[feature].unsqueeze(1) + column + lanes
            target = (row.unsqueeze(1).expand_as(span), span)
            out.index_put_(target, part * scale.unsqueeze(1), accumulate=True)
    return out

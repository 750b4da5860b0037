"""Relocation in plain PyTorch: the definition that the fast paths are tested against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_embcomp.kernels.route.reference import lookup
from lightning_embcomp.kernels.types import ClassColumns, RouterTensors


def unpack(router: RouterTensors, table: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Plain twin of :func:`lightning_embcomp.kernels.relocate.unpack`."""
    rows = torch.arange(start, stop, device=router.words.device)
    code, slot = lookup(rows, torch.full_like(rows, table), router)
    return code.to(torch.uint8), torch.where(code > 0, slot, -1).int()


def pack(router: RouterTensors, table: int, start: int, codes: Tensor, next_slot: Tensor) -> Tensor:
    """Plain twin of :func:`lightning_embcomp.kernels.relocate.pack`."""
    planes, stride = int(router.planes[table]), int(router.stride[table])
    blocks = -(-codes.numel() // 64)
    padded = codes.new_zeros(blocks * 64).long()
    padded[: codes.numel()] = codes.long()
    first = int(router.start[table]) + (start // 64) * stride
    view = router.words[first : first + blocks * stride].view(blocks, stride)
    view.zero_()
    bit = torch.arange(64, device=codes.device)
    for plane in range(planes):
        view[:, plane] = (((padded >> plane) & 1).view(blocks, 64) << bit).sum(1)
    bases = view.view(torch.int32)[:, 2 * planes :]
    slots = torch.full_like(padded, -1)
    for code in range(1, router.class_of_code.shape[1]):
        row_class = int(router.class_of_code[table, code])
        if row_class < 0:
            continue
        mine = padded == code
        rank = mine.long().cumsum(0) - mine.long()
        base = int(next_slot[row_class])
        bases[:, code - 1] = (rank.view(blocks, 64)[:, 0] + base).int()
        slots[mine] = rank[mine] + base
        next_slot[row_class] += int(mine.sum())
    return slots[: codes.numel()].int()


def _stored_columns(columns: ClassColumns, row_class: int) -> Tensor:
    runs = range(int(columns.first_run[row_class]), int(columns.first_run[row_class + 1]))
    return torch.cat([torch.arange(int(columns.length[r])) + int(columns.column[r]) for r in runs])


def move_rows(
    old: tuple[Tensor, Tensor],
    new: tuple[Tensor, Tensor],
    class_of_code: Tensor,
    columns: ClassColumns,
    source: Sequence[Tensor | None],
    target: Sequence[Tensor | None],
    *,
    rowwise: bool,
) -> None:
    """Plain twin of :func:`lightning_embcomp.kernels.relocate.move_rows`."""
    (old_code, old_slot), (new_code, new_slot) = old, new
    for after in range(1, class_of_code.numel()):
        to_class = int(class_of_code[after])
        destination = target[to_class] if to_class >= 0 else None
        if destination is None:
            continue
        for before in range(class_of_code.numel()):
            mine = (old_code == before) & (new_code == after)
            if not bool(mine.any()):
                continue
            rows = new_slot[mine].long()
            destination[rows] = 0
            origin = source[int(class_of_code[before])] if before > 0 else None
            if origin is None:
                continue
            values = origin[old_slot[mine].long()]
            if rowwise:
                destination[rows] = values
                continue
            had = _stored_columns(columns, int(class_of_code[before]))
            has = _stored_columns(columns, to_class)
            shared, at_old, at_new = [], {int(c): i for i, c in enumerate(had)}, {int(c): i for i, c in enumerate(has)}
            shared = [c for c in at_new if c in at_old]
            if shared:
                into = torch.tensor([at_new[c] for c in shared], device=rows.device)
                out_of = torch.tensor([at_old[c] for c in shared], device=rows.device)
                destination[rows.unsqueeze(1), into] = values[:, out_of]

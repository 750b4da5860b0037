"""Move rows between classes: read and write packed routers, copy weights and row state to their new slots."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_embcomp.kernels.dispatch import choose
from lightning_embcomp.kernels.relocate import cpu, reference
from lightning_embcomp.kernels.types import ClassColumns, RouterTensors

__all__ = ["move_rows", "pack", "unpack"]


def unpack(router: RouterTensors, table: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Read code and slot of the logical rows ``start`` to ``stop`` of a table.

    Args:
        router: Packed routers.
        table: Logical table.
        start: First row, a multiple of 64.
        stop: Row after the last.

    Returns:
        Codes, uint8 ``(n,)``, and slots, int32 ``(n,)``; -1 where the code is 0.
    """
    kernel = choose(router.words.device, cpu.unpack, reference.unpack)
    return kernel(router, table, start, stop)


def pack(router: RouterTensors, table: int, start: int, codes: Tensor, next_slot: Tensor) -> Tensor:
    """Write the codes of consecutive logical rows and give each row the next free slot of its class.

    Args:
        router: Packed routers; the blocks of these rows are overwritten.
        table: Logical table.
        start: First row, a multiple of 64.
        codes: New codes, uint8 ``(n,)``; ``n`` is a multiple of 64 unless the table ends there.
        next_slot: Next free slot of each class, int64 ``(C,)``; advanced in place.

    Returns:
        Slots, int32 ``(n,)``; -1 where the code is 0.
    """
    kernel = choose(router.words.device, cpu.pack, reference.pack)
    return kernel(router, table, start, codes, next_slot)


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
    """Copy rows from their old to their new class; columns that were not stored before become zero.

    Args:
        old: Codes and slots before, as :func:`unpack` returns them.
        new: Codes and slots after, as :func:`pack` returns them.
        class_of_code: Row class of each code of this table, int32 ``(codes,)``.
        columns: Columns that each class stores.
        source: Old storage of each class: ``(rows, width)``, or ``(rows,)`` if ``rowwise``; None without rows.
        target: New storage of each class, same kind and dtype; changed in place.
        rowwise: Whether the storage holds one number per row (row-wise optimizer state) instead of columns.
    """
    kernel = choose(old[0].device, cpu.move_rows, reference.move_rows)
    kernel(old, new, class_of_code, columns, source, target, rowwise=rowwise)

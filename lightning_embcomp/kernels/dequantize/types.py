"""What a lookup in served tables needs to know, as the kernels read it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_embcomp.kernels.types import ClassColumns, RouterTensors


@dataclass(frozen=True, kw_only=True)
class ServedRouter:
    """Class and slot of the rows of several logical tables.

    A table is a few runs of rows of one class, or has a code per row in ``packed``.

    Attributes:
        first_run: First run of each table, int64 ``(T + 1,)``; a table without runs is looked up in ``packed``.
        run_end: Row after each run, int32 or int64 ``(N,)``.
        run_class: Class of each run, uint8 ``(N,)``; :data:`~lightning_embcomp.kernels.types.NO_CLASS` for rows without
            storage.
        run_base: What is added to a row to give its slot, like ``run_end``.
        hint: Run of the first of every :math:`2^k` rows, counted from the table's first, int16.
        first_hint: Where the hints of each table begin, int64 ``(T,)``.
        hint_shift: The exponent k of each table, int64 ``(T,)``.
        class_of_code: Class of each code of the tables without runs, uint8 ``(T, codes)``.
        packed: Codes and slots of the tables without runs; ``rows`` counts those of every table.
    """

    first_run: Tensor
    run_end: Tensor
    run_class: Tensor
    run_base: Tensor
    hint: Tensor
    first_hint: Tensor
    hint_shift: Tensor
    class_of_code: Tensor
    packed: RouterTensors


@dataclass(frozen=True, kw_only=True)
class ServedClasses:
    """The classes of served rows.

    A row of 2, 4 or 8 bits is scale and bias in float16, then its values, lowest bits first; a row of 16 or 32 bits is
    its values.

    Attributes:
        rows: Rows of each class, uint8 ``(n, bytes)``.
        address: Address of each, int64 ``(C,)``.
        bits: Bits of a value, int64 ``(C,)``.
        stride: Bytes of a row, int64 ``(C,)``.
        shifted: Whether rows of the class take the offset of their table, int64 0/1 ``(C,)``.
        whole: Whether rows of the class keep every column of their table, int64 0/1 ``(C,)``.
        columns: Columns that each class keeps.
        first_offset: Where the offset of each logical table begins in ``offsets``, int64 ``(T,)``; -1 without one.
        offsets: Offsets of the logical tables, float32.
    """

    rows: tuple[Tensor, ...]
    address: Tensor
    bits: Tensor
    stride: Tensor
    shifted: Tensor
    whole: Tensor
    columns: ClassColumns
    first_offset: Tensor
    offsets: Tensor

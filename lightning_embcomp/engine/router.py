"""The router: for every logical row its code and slot, in about one byte per row.

Rows come in blocks of 64. A block holds one 64-bit plane per bit of the code and, for each code, the slot of the
block's first row with that code; a row's slot is that base plus the population count of equal codes before it. One
lookup touches one block, which is padded to stay inside one cache line where it can: a table with four chunks costs
1 byte per row, one with three 0.5, an uncut one 0.25.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_embcomp.engine.layout import ClassMap, LogicalTable
from lightning_embcomp.kernels.relocate import pack, unpack
from lightning_embcomp.kernels.types import RouterTensors

BLOCK = 64
SLAB = 1 << 17
"""Rows handled at a time where a whole table is read or rewritten; a multiple of the block.

A move holds the rows of one slab twice.
"""
_LINE = 8  # int64 words of a cache line
_MAX_SLOTS = 2**31 - 1


def words_per_block(codes: int) -> int:
    """Words of 8 bytes that a block of 64 rows takes when a table has that many codes.

    Example:
        >>> [words_per_block(codes) for codes in (2, 4, 5, 16)]
        [2, 4, 8, 16]
    """
    planes = max(1, (codes - 1).bit_length())
    words = planes + -(-(codes - 1) // 2)
    size = 2
    while size < min(words, _LINE):
        size *= 2
    return size if words <= _LINE else -(-words // _LINE) * _LINE


class Router:
    """Codes and slots of the rows of several logical tables, packed.

    A new router sends every row to code 0.

    Args:
        tables: Logical tables.
        classes: Their row classes.
        device: Where the packed words live.
    """

    def __init__(self, tables: Sequence[LogicalTable], classes: ClassMap, device: torch.device) -> None:
        self.tables = tuple(tables)
        self.classes = classes
        blocks = [-(-table.rows // BLOCK) for table in tables]
        strides = [words_per_block(table.codes) for table in tables]
        sizes = [count * stride for count, stride in zip(blocks, strides, strict=True)]
        starts = [sum(sizes[:t]) for t in range(len(sizes))]
        most_codes = max(table.codes for table in tables)
        class_of_code = [[*row, *[-1] * (most_codes - len(row))] for row in classes.class_of_code]

        def as_tensor(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        self.tensors = RouterTensors(
            words=torch.zeros(sum(sizes), dtype=torch.int64, device=device),
            start=as_tensor(starts),
            stride=as_tensor(strides),
            planes=as_tensor([max(1, (table.codes - 1).bit_length()) for table in tables]),
            rows=as_tensor([table.rows for table in tables]),
            class_of_code=torch.tensor(class_of_code, dtype=torch.int32, device=device),
        )
        self._bytes = tuple(size * 8 for size in sizes)

    def table_bytes(self, table: int) -> int:
        """Bytes of the packed words of a table."""
        return self._bytes[table]

    def read(self, table: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Codes (uint8) and slots (int32, -1 without storage) of rows ``start`` (a multiple of 64) to ``stop``."""
        return unpack(self.tensors, table, start, stop)

    def write(self, table: int, start: int, codes: Tensor, next_slot: Tensor) -> Tensor:
        """Set codes from row ``start`` on and hand out slots; see :mod:`lightning_embcomp.kernels.relocate`."""
        return pack(self.tensors, table, start, codes, next_slot)

    def check_sizes(self, class_rows: Sequence[int]) -> None:
        """Raise if a class has more rows than a slot can number.

        Raises:
            ValueError: If a class would hold 2³¹ rows or more.
        """
        for row_class, rows in enumerate(class_rows):
            if rows > _MAX_SLOTS:
                raise ValueError(
                    f"row class {row_class} would hold {rows} rows, more than {_MAX_SLOTS}: put the tables into several"
                    " embedding collections"
                )


def slabs(rows: int) -> Iterator[tuple[int, int]]:
    """Cut ``rows`` into ranges of at most :data:`SLAB` rows.

    Example:
        >>> list(slabs(SLAB + 1))
        [(0, 131072), (131072, 131073)]
    """
    for start in range(0, rows, SLAB):
        yield start, min(start + SLAB, rows)

"""Logical tables, and the row classes that can store their rows.

A *code* says which columns of a logical row are stored; code 0 stores none. Codes of different tables that store the
same columns share one *row class*, hence one FBGEMM table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from lightning_embcomp.kernels.types import ClassColumns

ChunkLayout = Literal["prefix", "chunks"]
Columns = tuple[tuple[int, int], ...]
"""Stored columns as runs of (first column, number of columns)."""

LANES = 4
"""FBGEMM tables have widths that are a multiple of this."""
MAX_CLASSES = 255
"""Row classes are numbered in one byte; the last number means none."""
PLAIN_TABLE = "table"
"""Name of the table inside the engine of a stand-alone embedding."""
_MAX_CODES = 33  # keeps the router within 3 bytes per row


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Which part of a table an engine holds.

    Args:
        rows: Rows of the whole table.
        dim: Columns of the whole table.
        first_row: First row of the part.
        first_column: First column of the part.
        uncut: Whether rows of the whole table are stored as a whole, so that parts need not line up with chunks.
        number: Number of the part's first row among all rows of all tables of its collection, which seeds random bits:
            they are the same however tables are sharded.
    """

    rows: int
    dim: int
    first_row: int = 0
    first_column: int = 0
    uncut: bool = False
    number: int = 0


@dataclass(frozen=True, kw_only=True)
class LogicalTable:
    """One embedding table as the user configured it, and how finely its rows may be cut.

    Of a part of a table that starts at column chunk k, code c stands for code c + k of the whole table: what the whole
    table stores before the part is left out, and codes beyond the part store all of it.

    Args:
        name: Unique name within the engine.
        rows: Logical rows R.
        dim: Columns D.
        chunks: Equal column chunks that a row is cut into; 1 keeps rows whole.
        layout: ``prefix`` keeps leading chunks only, ``chunks`` any subset.
        shard: Which part of a table this is; None for all of it.
        path: What messages call it where ``name`` does not tell it from tables of other engines.

    Raises:
        ValueError: If ``dim`` does not split into chunks of a multiple of 4 columns, or the layout has too many codes.

    Example:
        >>> table = LogicalTable(name="user", rows=1000, dim=16, chunks=4)
        >>> table.chunk_width, table.columns_of(2)
        (4, ((0, 8),))
    """

    name: str
    rows: int
    dim: int
    chunks: int = 1
    layout: ChunkLayout = "prefix"
    shard: Shard | None = None
    path: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if self.rows < (0 if self.shard else 1):
            raise ValueError(f"table {self.label!r} has {self.rows} rows; at least one is needed")
        if self.chunks < 1 or self.dim % self.chunks or (self.dim // self.chunks) % LANES:
            fitting = [k for k in range(1, self.dim + 1) if self.dim % k == 0 and (self.dim // k) % LANES == 0]
            mend = (
                f"use one of chunks={fitting}"
                if fitting
                else f"its dim must be a multiple of {LANES}: pad it, or leave the table out"
            )
            raise ValueError(
                f"table {self.label!r} of dim {self.dim} cannot be cut into {self.chunks} chunks: FBGEMM needs chunk"
                f" widths that are a multiple of {LANES}; {mend}"
            )
        if self.codes > _MAX_CODES:
            raise ValueError(
                f"layout {self.layout!r} with {self.chunks} chunks needs {self.codes} codes for table {self.label!r}:"
                f" at most {_MAX_CODES} are supported: use fewer chunks"
                + (" or layout 'prefix'" if self.layout == "chunks" else "")
            )
        if self.layout == "chunks" and self.shard is not None and self.shard.dim != self.dim:
            raise ValueError(f"table {self.label!r} is sharded by columns, which layout 'chunks' cannot follow")

    @property
    def label(self) -> str:
        """What messages call the table."""
        return self.path or self.name

    @property
    def chunk_width(self) -> int:
        """Columns of a chunk."""
        return self.dim // self.chunks

    @property
    def first_chunk(self) -> int:
        """Chunks of the whole table before this part."""
        return 0 if self.shard is None or self.shard.uncut else self.shard.first_column // self.chunk_width

    @property
    def whole_chunks(self) -> int:
        """Chunks of the whole table."""
        return self.chunks if self.shard is None or self.shard.uncut else self.shard.dim // self.chunk_width

    @property
    def codes(self) -> int:
        """Number of codes, code 0 included."""
        return self.whole_chunks - self.first_chunk + 1 if self.layout == "prefix" else 2**self.chunks

    @property
    def full_code(self) -> int:
        """Code of a row that stores every column."""
        return self.codes - 1

    def live_chunks(self, code: int) -> tuple[int, ...]:
        """Chunks that a row of ``code`` stores."""
        if self.layout == "prefix":
            return tuple(range(min(code, self.chunks)))
        return tuple(chunk for chunk in range(self.chunks) if code >> chunk & 1)

    def columns_of(self, code: int) -> Columns:
        """Columns that a row of ``code`` stores, neighbours merged."""
        runs: list[tuple[int, int]] = []
        for chunk in self.live_chunks(code):
            first = chunk * self.chunk_width
            if runs and sum(runs[-1]) == first:
                runs[-1] = (runs[-1][0], runs[-1][1] + self.chunk_width)
            else:
                runs.append((first, self.chunk_width))
        return tuple(runs)

    def share(self, code: int) -> tuple[int, int]:
        """Columns that the whole table stores of a row of ``code``, and all its columns."""
        if self.layout == "prefix":
            return (self.first_chunk + code) * self.chunk_width if code else 0, self.whole_chunks * self.chunk_width
        return len(self.live_chunks(code)) * self.chunk_width, self.dim


def fitting_chunks(dim: int, most: int) -> int:
    """The largest number of chunks, up to ``most``, whose width is a multiple of 4 columns.

    Args:
        dim: Columns of a table.
        most: Upper bound.

    Returns:
        The number; ``most`` where none fits, so that :class:`LogicalTable` says why.

    Example:
        >>> [fitting_chunks(dim, 4) for dim in (8, 16, 20, 24, 64)]
        [2, 4, 1, 3, 4]
    """
    return next((count for count in range(most, 0, -1) if dim % (count * LANES) == 0), most)


def row_numbers(tables: Sequence[LogicalTable]) -> list[int]:
    """Number of each table's first row among the rows of a collection."""
    before = [sum(table.rows for table in tables[:t]) for t in range(len(tables))]
    return [number if t.shard is None else t.shard.number for t, number in zip(tables, before, strict=True)]


@dataclass(frozen=True, kw_only=True)
class ClassMap:
    """The row classes of an engine, narrowest first, and the class of every code of every table.

    Args:
        dims: Columns of the logical rows that each class stores; tables of different dim share no class.
        columns: Stored columns of each class.
        shares: Of how many columns of the whole table each class stores how many, in this part and in others.
        class_of_code: Per table the class of each code; -1 for code 0.
    """

    dims: tuple[int, ...]
    columns: tuple[Columns, ...]
    shares: tuple[tuple[int, int], ...]
    class_of_code: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, tables: Sequence[LogicalTable]) -> ClassMap:
        """Collect the classes of the given tables.

        Example:
            >>> wide = LogicalTable(name="a", rows=1, dim=8, chunks=2)
            >>> flat = LogicalTable(name="b", rows=1, dim=8)
            >>> ClassMap.of([wide, flat]).class_of_code
            ((-1, 0, 1), (-1, 1))
        """
        needed = {
            (table.dim, table.columns_of(code), table.share(code)) for table in tables for code in range(1, table.codes)
        }
        classes = sorted(needed, key=lambda key: (sum(length for _, length in key[1]), key))
        if len(classes) > MAX_CLASSES:
            raise ValueError(
                f"tables of one collection need {len(classes)} row classes, more than {MAX_CLASSES}: use fewer chunks"
                " or layout 'prefix', or put tables of different dim into collections of their own"
            )
        index = {key: i for i, key in enumerate(classes)}
        class_of_code = tuple(
            tuple(
                -1 if code == 0 else index[table.dim, table.columns_of(code), table.share(code)]
                for code in range(table.codes)
            )
            for table in tables
        )
        return cls(
            dims=tuple(dim for dim, _, _ in classes),
            columns=tuple(runs for _, runs, _ in classes),
            shares=tuple(share for _, _, share in classes),
            class_of_code=class_of_code,
        )

    def width(self, row_class: int) -> int:
        """Stored columns of a class."""
        return sum(length for _, length in self.columns[row_class])

    def share(self, row_class: int) -> float:
        """Stored over logical columns of a class, over the whole table."""
        stored, all_columns = self.shares[row_class]
        return stored / all_columns

    def tensors(self, device: torch.device) -> ClassColumns:
        """The same facts as the kernels read them."""
        runs = [run for columns in self.columns for run in columns]
        first = [0]
        for columns in self.columns:
            first.append(first[-1] + len(columns))

        def as_tensor(values: Sequence[int]) -> torch.Tensor:
            return torch.tensor(list(values), dtype=torch.int64, device=device)

        return ClassColumns(
            width=as_tensor([self.width(c) for c in range(len(self.columns))]),
            first_run=as_tensor(first),
            column=as_tensor([column for column, _ in runs]),
            length=as_tensor([length for _, length in runs]),
        )

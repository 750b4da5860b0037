"""What an export is made from: tables, wherever they come from, seen through one small record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_embcomp.engine.layout import Columns
from lightning_embcomp.engine.precision import TablePrecision
from lightning_embcomp.export.errors import ExportError

HostKind = Literal["bag_collection", "collection", "embedding_bag", "embedding", "unknown"]
"""Kind of the module that holds tables; ``unknown`` where only a state dict was seen."""
DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}
"""Dtypes that weights may have before the export, by name."""


@dataclass(frozen=True, kw_only=True)
class ExportTable:
    """One embedding table to export.

    Args:
        name: Its name inside the module that holds it; empty for a stand-alone embedding.
        rows: Logical rows R.
        dim: Columns D.
        read_rows: Maps (start, stop) to the float rows ``(stop - start, D)``; start is a multiple of 64.
        mean: Whether bags are averaged.
        features: Feature names; empty for a stand-alone embedding.
        columns: Columns that rows of each code keep; code 0 keeps none. By default every row keeps every column.
        read_codes: Maps (start, stop) to the codes of those rows, uint8; None if every row has the last code.
        precision: How the table was rounded in training, if it was.
        dtype: Dtype of the weights in the source; rows are read as float32 whatever it is.

    Raises:
        ExportError: If the table has no rows or columns, or its weights are no floats.

    Example:
        >>> weight = torch.ones(3, 4)
        >>> table = ExportTable(name="t", rows=3, dim=4, read_rows=lambda start, stop: weight[start:stop])
        >>> table.kept
        ((), ((0, 4),))
    """

    name: str
    rows: int
    dim: int
    read_rows: Callable[[int, int], Tensor]
    mean: bool = False
    features: tuple[str, ...] = ()
    columns: tuple[Columns, ...] = ()
    read_codes: Callable[[int, int], Tensor] | None = None
    precision: TablePrecision | None = None
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if self.rows < 1 or self.dim < 1:
            raise ExportError(f"table {self.name!r} has {self.rows} rows of {self.dim} columns: nothing to export")
        if self.dtype not in DTYPES.values():
            raise ExportError(f"table {self.name!r} holds {self.dtype}; only {', '.join(DTYPES)} are exported")

    @property
    def kept(self) -> tuple[Columns, ...]:
        """Columns of every code."""
        return self.columns or ((), ((0, self.dim),))


@dataclass(frozen=True, kw_only=True)
class ExportHost:
    """A module that holds tables.

    Args:
        path: Its path from the root module; empty for the root itself.
        kind: What it is.
        tables: Its tables in order.
        is_weighted: Whether batches carry per-sample weights.
        need_indices: Whether outputs of an ``EmbeddingCollection`` carry their ids.
        include_last_offset: As in ``nn.EmbeddingBag``.
        padding_idx: Id that is left out of bags, or reads as zero in an ``nn.Embedding``; None for none.
    """

    path: str
    kind: HostKind
    tables: tuple[ExportTable, ...]
    is_weighted: bool = False
    need_indices: bool = False
    include_last_offset: bool = False
    padding_idx: int | None = None

    def full_name(self, table: ExportTable) -> str:
        """Unique name of one of its tables: path of the module, and the table's own name in a collection."""
        return full_name(self.path, table.name)


def full_name(path: str, name: str) -> str:
    """Join the path of a module and the name of a table.

    Example:
        >>> full_name("model.bags", "t_user"), full_name("user", "")
        ('model.bags.t_user', 'user')
    """
    return ".".join(part for part in (path, name) if part)

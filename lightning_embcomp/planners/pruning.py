"""Footprints of tables whose column chunks are pruned under one budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_embcomp.engine.layout import ChunkLayout, fitting_chunks
from lightning_embcomp.engine.optimizer import FusedOptimizerSpec
from lightning_embcomp.planners.footprint import TableFootprint, most_used
from lightning_embcomp.planners.router import in_engine
from lightning_embcomp.tables import TableView, in_backward_optimizer

UTILITY_BYTES = 2.0
"""A utility is a bfloat16 number."""


@dataclass(frozen=True, kw_only=True)
class PrunedTable:
    """A table that competes for bytes.

    Args:
        name: Unique name.
        rows: Logical rows.
        dim: Columns.
        itemsize: Bytes of a weight.
        row_state: Bytes of optimizer state per stored row.
        weight_state: Bytes of optimizer state per stored weight.
        chunks: Column chunks of a row; None for as many as the dim allows.
    """

    name: str
    rows: int
    dim: int
    itemsize: int = 4
    row_state: int = 0
    weight_state: int = 0
    chunks: int | None = None

    @classmethod
    def of(cls, table: TableView, chunks: int | None = None) -> PrunedTable:
        """Read a table of a model, with an optimizer that ``apply_optimizer_in_backward`` gave it."""
        itemsize = table.weight.element_size() if isinstance(table.weight, Tensor) else 4
        fused = in_backward_optimizer(table.weight)
        spec = None if fused is None else FusedOptimizerSpec.from_torch(fused[0], {}, table.name)
        return cls(
            name=table.name,
            rows=table.rows,
            dim=table.dim,
            itemsize=itemsize,
            row_state=0 if spec is None else 4 * spec.per_row,
            weight_state=0 if spec is None else 4 * spec.per_weight,
            chunks=chunks,
        )

    @property
    def plain(self) -> int:
        """Bytes of the plain weights."""
        return self.rows * self.dim * self.itemsize


def pruned_footprints(
    tables: Sequence[PrunedTable],
    *,
    target: float | None = None,
    budget: int | None = None,
    chunks: int = 4,
    layout: ChunkLayout = "prefix",
    falloff: float = 0.3,
    shared: bool = True,
) -> dict[str, TableFootprint]:
    """What tables keep when their most used column chunks are stored, rows ranked by Zipf's law.

    That is how a run starts; later, rows are ranked by what was measured, and with ``shared`` bytes move between
    tables. The router is not part of it.

    Args:
        tables: The tables.
        target: Fraction of weight bytes to remove; give this or ``budget``.
        budget: Bytes for the tables with optimizer state, router and utilities.
        chunks: Column chunks of a row, at most; of tables that do not say how many.
        layout: Which chunks a row may store.
        falloff: Worth of a chunk over that of the one before, layout ``prefix``.
        shared: Whether all tables share one budget; otherwise each has its part.

    Returns:
        Footprints by name.

    Raises:
        ValueError: If neither or both of target and budget are given, or the budget is below what router and
            utilities take.

    Example:
        >>> table = PrunedTable(name="user", rows=1000, dim=16)
        >>> round(pruned_footprints([table], target=0.5)["user"].kept, 3)
        0.5
    """
    if (target is None) == (budget is None):
        raise ValueError("give either target (fraction of bytes to remove) or budget (bytes)")
    cuts = [table.chunks or fitting_chunks(table.dim, chunks) for table in tables]
    row_bytes = [UTILITY_BYTES * (cut if layout == "chunks" else 1) for cut in cuts]
    plain = [table.plain for table in tables]
    allowed = [(1 - (target or 0.0)) * size for size in plain]
    if budget is not None:
        held_anyway = [
            in_engine(TableFootprint(row_bytes=of_row), cut, layout).row_bytes
            for of_row, cut in zip(row_bytes, cuts, strict=True)
        ]
        left = budget - sum(held * table.rows for held, table in zip(held_anyway, tables, strict=True))
        if left <= 0:
            raise ValueError(
                f"a budget of {budget:,} bytes is not above the {round(budget - left):,} bytes that router and"
                f" utilities of the {len(tables)} tables take before any weight is stored: raise it, or select fewer"
            )
        allowed = [left * size / sum(plain) for size in plain]
    costs = [_chunk_bytes(table, cut, with_state=budget is not None) for table, cut in zip(tables, cuts, strict=True)]
    live: dict[str, tuple[float, ...]] = {}
    for group in [list(range(len(tables)))] if shared else [[t] for t in range(len(tables))]:
        shares = most_used(
            [tables[t].rows for t in group],
            [costs[t] for t in group],
            sum(allowed[t] for t in group),
            falloff if layout == "prefix" else 1.0,
        )
        live |= {tables[t].name: of_table for t, of_table in zip(group, shares, strict=True)}
    return {
        table.name: TableFootprint(live=live[table.name], row_bytes=of_row)
        for table, of_row in zip(tables, row_bytes, strict=True)
    }


def _chunk_bytes(table: PrunedTable, chunks: int, *, with_state: bool) -> tuple[float, ...]:
    """Bytes of each chunk of a row; state per row is paid with the first."""
    per_weight = table.itemsize + (table.weight_state if with_state else 0)
    chunk = table.dim / chunks * per_weight
    first = chunk + (table.row_state if with_state else 0)
    return (first, *[chunk] * (chunks - 1))

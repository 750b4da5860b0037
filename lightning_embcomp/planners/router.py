"""What every table in an engine takes beside what methods keep of it."""

from __future__ import annotations

from dataclasses import replace

from lightning_embcomp.engine.layout import ChunkLayout, LogicalTable
from lightning_embcomp.engine.router import BLOCK, words_per_block
from lightning_embcomp.planners.footprint import TableFootprint

_WORD_BYTES = 8


def in_engine(footprint: TableFootprint, chunks: int, layout: ChunkLayout) -> TableFootprint:
    """Add the router, and what follows from the chunks that rows are cut into.

    Args:
        footprint: What methods keep of the table.
        chunks: Column chunks of a row.
        layout: Which chunks a row may store.

    Returns:
        The whole footprint. Column parts of a table need a somewhat smaller router than is charged.

    Example:
        >>> in_engine(TableFootprint(row_bytes=2.0), 4, "prefix").row_bytes
        3.0
    """
    codes = LogicalTable(name="table", rows=1, dim=4 * chunks, chunks=chunks, layout=layout).codes
    block = words_per_block(codes) * _WORD_BYTES
    return replace(
        footprint,
        # A shard must not cut through chunks, even if all of them stay.
        live=footprint.live if len(footprint.live) == chunks else (footprint.kept,) * chunks,
        row_bytes=footprint.row_bytes + block / BLOCK,
        lookup_bytes=footprint.lookup_bytes + block,
        prefix=footprint.prefix and layout == "prefix",
    )

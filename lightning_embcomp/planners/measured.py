"""Footprints of tables as they are: measured on an engine, or read from a checkpoint."""

from __future__ import annotations

import os

import torch

from lightning_embcomp.engine.layout import ChunkLayout
from lightning_embcomp.engine.memory import TableMemory, table_memory
from lightning_embcomp.engine.routed import RoutedEmbeddings
from lightning_embcomp.engine.router import slabs
from lightning_embcomp.planners.footprint import TableFootprint
from lightning_embcomp.planners.router import in_engine
from lightning_embcomp.report.reading import read_report


def engine_footprint(engine: RoutedEmbeddings, table: int) -> TableFootprint:
    """What a table of a live engine takes now.

    Args:
        engine: The engine; it holds the whole table.
        table: Index of the table.

    Returns:
        The footprint.

    Raises:
        ValueError: If the engine holds a part of the table only.
    """
    logical = engine.tables[table]
    if logical.shard is not None:
        raise ValueError(f"table {logical.name!r} is sharded: read its footprint from a checkpoint of the run")
    counts = torch.zeros(logical.codes, dtype=torch.int64)
    for start, stop in slabs(logical.rows):
        counts += torch.bincount(engine.router.read(table, start, stop)[0].long(), minlength=logical.codes)
    stored = [0] * logical.chunks
    for code, count in enumerate(counts.tolist()):
        for chunk in logical.live_chunks(code):
            stored[chunk] += count
    return _footprint(
        table_memory(engine, table), tuple(count / logical.rows for count in stored), logical.layout == "chunks"
    )


def checkpoint_footprints(path: str | os.PathLike[str]) -> dict[str, TableFootprint]:
    """What the tables of a checkpoint take in training.

    Args:
        path: A Lightning checkpoint of one process.

    Returns:
        Footprints of its compressed tables by unique name; plain tables have none.

    Raises:
        CheckpointError: If it cannot be read, or holds no tables.
    """
    return {
        table.name: _footprint(table.memory, table.live, table.layout == "chunks")
        for table in read_report(path).tables
        if table.layout != "plain"
    }


def _footprint(memory: TableMemory, live: tuple[float, ...], any_subset: bool) -> TableFootprint:
    layout: ChunkLayout = "chunks" if any_subset else "prefix"
    stored_rows = max(live) * memory.rows
    # The plain optimizer's state is the planner's to count; what is here without it was added by a method.
    added = memory.optimizer_state if memory.plain_optimizer_state == 0 else 0
    return TableFootprint(
        live=live,
        row_bytes=(memory.router + memory.statistics) / memory.rows,
        state_bytes=added / stored_rows if stored_rows else 0.0,
        lookup_bytes=in_engine(TableFootprint(), len(live), layout).lookup_bytes,
        prefix=not any_subset,
    )

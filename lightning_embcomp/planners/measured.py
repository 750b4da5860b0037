"""Footprints of tables as they are: measured on an engine, or read from a checkpoint."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

import torch

from lightning_embcomp.checkpoints import COMPRESSED, CheckpointReader, is_checkpoint
from lightning_embcomp.engine.layout import ChunkLayout, LogicalTable
from lightning_embcomp.engine.memory import TableMemory, table_memory
from lightning_embcomp.engine.routed import RoutedEmbeddings
from lightning_embcomp.engine.router import slabs
from lightning_embcomp.engine.state import LAYOUTS
from lightning_embcomp.planners.footprint import TableFootprint
from lightning_embcomp.planners.router import in_engine
from lightning_embcomp.report.reading import read_report

_COUNTER_STATE, _COUNTER_SGD_BYTES = "row_counter", 12.0  # FBGEMM's COUNTER_SGD: three float32 per stored row


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
        path: A Lightning checkpoint, of one process or of several.

    Returns:
        Footprints of its compressed tables by unique name; plain tables have none.

    Raises:
        CheckpointError: If it cannot be read, or holds no tables.
    """
    if Path(path).is_dir() or is_checkpoint(path):
        return _of_directory(CheckpointReader(path))
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


def _of_directory(reader: CheckpointReader) -> dict[str, TableFootprint]:
    """Footprints from the shapes of saved tensors; see :mod:`lightning_embcomp.engine.sharded.storage`."""
    found = {}
    for key in sorted(reader.keys()):  # noqa: SIM118 - not a mapping
        path = key.removeprefix(COMPRESSED)
        match = re.fullmatch(r"(?:(?P<host>.*)[/.])?engine\.tables\.(?P<name>[^.]+)\.shape", path)
        if match is None:
            continue
        numbers = torch.empty(reader.shape(key), dtype=reader.dtype(key))
        reader.read_into({key: numbers})
        _, rows, dim, chunks, layout = numbers.tolist()
        table = LogicalTable(name=match["name"], rows=rows, dim=dim, chunks=chunks, layout=LAYOUTS[layout])  # type: ignore[arg-type]
        name = ".".join(part for part in (match["host"], table.name) if part)
        found[name] = _of_saved_table(reader, key.removesuffix("shape"), table)
    return found


def _of_saved_table(reader: CheckpointReader, prefix: str, table: LogicalTable) -> TableFootprint:
    mine = {key[len(prefix) :] for key in reader.keys() if key.startswith(prefix)}  # noqa: SIM118 - not a mapping
    stored = [0] * table.chunks
    for code in range(1, table.codes):
        name = f"rows.{code}.weight"
        for chunk in table.live_chunks(code) if name in mine else ():
            stored[chunk] += reader.shape(prefix + name)[0]
    per_row = 0.0
    for name in mine - {"shape", "row_codes"}:
        shape = reader.shape(prefix + name)
        if not name.startswith("rows.") and shape[:1] == (table.rows,):
            per_row += math.prod(shape[1:]) * reader.dtype(prefix + name).itemsize
    counting = any(name.endswith(f".{_COUNTER_STATE}") for name in mine)
    footprint = TableFootprint(
        live=tuple(count / table.rows for count in stored),
        row_bytes=per_row,
        state_bytes=_COUNTER_SGD_BYTES if counting else 0.0,
    )
    return in_engine(footprint, table.chunks, table.layout)

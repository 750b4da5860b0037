"""Footprints of a model's tables under the callbacks of a trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from lightning_embcomp.composition import Property
from lightning_embcomp.engine.layout import ChunkLayout
from lightning_embcomp.engine.placement import RowPlacement
from lightning_embcomp.planners.footprint import TableFootprint
from lightning_embcomp.planners.router import in_engine
from lightning_embcomp.tables import HostView, TableView, select_tables


class FootprintCallback(Protocol):
    """What a planner asks of a compression callback."""

    patterns: tuple[str, ...]

    @property
    def owns(self) -> Property:
        """What the method owns of its tables."""

    @property
    def state_key(self) -> str:
        """Name for messages."""

    @property
    def row_placement(self) -> RowPlacement:
        """Where the rows of its tables live on a GPU."""

    def footprints(self, tables: Sequence[TableView]) -> Mapping[str, TableFootprint]:
        """What the method keeps of its tables, without the router."""

    def table_cuts(self, tables: Sequence[TableView]) -> Mapping[str, tuple[int, ChunkLayout]]:
        """Chunks and layout; asked of the owner of the width only."""


def callback_footprints(hosts: Sequence[HostView], callbacks: Sequence[FootprintCallback]) -> dict[str, TableFootprint]:
    """What tables will take in training, from the callbacks' settings alone.

    All tables of a collection go into one engine as soon as a callback works on one of them: those that no callback
    works on stay whole, but have a router, and utilities where others are pruned.

    Args:
        hosts: Modules that hold the tables, possibly on the meta device.
        callbacks: Compression callbacks.

    Returns:
        Footprints by unique table name; tables that stay as they are have none.

    Raises:
        UnknownTableError: If a callback's globs match no table.
        ValueError: If a table cannot be cut as asked, or a budget cannot be met.
    """
    found: dict[str, TableFootprint] = {}
    cuts: dict[str, tuple[int, ChunkLayout]] = {}
    measured: dict[str, float] = {}  # bytes per row of utilities, by table
    for callback in callbacks:
        tables = select_tables(hosts, callback.patterns, callback.state_key)
        mine = callback.footprints(tables)
        for name, footprint in mine.items():
            found[name] = footprint.beside(found[name]) if name in found else footprint
        if callback.owns == "width":
            cuts.update(callback.table_cuts(tables))
            measured.update({name: footprint.row_bytes for name, footprint in mine.items()})
    whole: dict[str, TableFootprint] = {}
    for host in hosts:
        names = [table.name for table in host.tables]
        if not any(name in found for name in names):
            continue
        shared = max((measured[name] for name in names if name in measured), default=0.0)
        for name in names:
            footprint = found.get(name, TableFootprint())
            if name not in measured:
                footprint = footprint.beside(TableFootprint(row_bytes=shared))
            whole[name] = in_engine(footprint, *cuts.get(name, (1, "prefix")))
    return whole

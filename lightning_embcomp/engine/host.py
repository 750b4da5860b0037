"""What methods see of a module that stores its tables in engines, whether it holds all of each table or shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_embcomp.engine.group import Group
from lightning_embcomp.engine.layout import LogicalTable

if TYPE_CHECKING:
    from lightning_embcomp.engine.routed import RoutedEmbeddings, RoutedOptions


@dataclass(frozen=True)
class TableShard:
    """What this process holds of a table.

    Args:
        engine: The engine that holds it.
        index: Its index there.
        primary: Whether it speaks for its rows: of several column parts or copies of the same rows, one does.
    """

    engine: RoutedEmbeddings
    index: int
    primary: bool = True

    @property
    def logical(self) -> LogicalTable:
        """The part as the engine knows it."""
        return self.engine.tables[self.index]

    @property
    def first_row(self) -> int:
        """Its first row in the whole table."""
        shard = self.logical.shard
        return 0 if shard is None else shard.first_row


class EngineHost:
    """Base of the modules that store their tables in engines."""

    group: Group = Group()
    """Processes that hold parts of the tables."""

    @property
    def logical_tables(self) -> Sequence[LogicalTable]:
        """The whole tables."""
        raise NotImplementedError

    @property
    def engines(self) -> Sequence[RoutedEmbeddings]:
        """Engines of this process."""
        raise NotImplementedError

    @property
    def options(self) -> RoutedOptions:
        """How all rows are stored and trained."""
        raise NotImplementedError

    def use_options(self, options: RoutedOptions) -> None:
        """Take over options that the rows of all engines follow already.

        Args:
            options: The options.
        """
        for engine in self.engines:
            engine.options = options

    def shards(self, table: int) -> tuple[TableShard, ...]:
        """What this process holds of a table; it may be nothing.

        Args:
            table: Index in :attr:`logical_tables`.
        """
        raise NotImplementedError

    def row_owners(self, table: int) -> tuple[int, ...]:
        """Ranks of the primary shards of a table, by rising first row."""
        return (0,)

    def is_cut_by_columns(self, table: int) -> bool:
        """Whether shards of a table hold some of its columns only."""
        return False

    def want_gradient_norms(self) -> None:
        """Have tables that are cut by columns see the norms of whole gradients."""


class OneEngine(EngineHost):
    """A host with all of its tables in one engine.

    Args:
        engine: The engine.
    """

    engine: RoutedEmbeddings

    def __init__(self, engine: RoutedEmbeddings) -> None:
        self.engine = engine

    @property
    def logical_tables(self) -> Sequence[LogicalTable]:
        """See :attr:`EngineHost.logical_tables`."""
        return self.engine.tables

    @property
    def engines(self) -> Sequence[RoutedEmbeddings]:
        """The engine."""
        return (self.engine,)

    @property
    def options(self) -> RoutedOptions:
        """Options of the engine."""
        return self.engine.options

    def shards(self, table: int) -> tuple[TableShard, ...]:
        """All of the table."""
        return (TableShard(self.engine, table),)


@dataclass(frozen=True)
class HeldTable:
    """A whole table, wherever its rows are.

    Args:
        host: Module that holds it.
        index: Its index there.
        name: Its unique name in the model.
    """

    host: EngineHost
    index: int
    name: str

    @property
    def logical(self) -> LogicalTable:
        """The whole table."""
        return self.host.logical_tables[self.index]

    @property
    def shards(self) -> tuple[TableShard, ...]:
        """What this process holds of it."""
        return self.host.shards(self.index)

    @property
    def primary_shards(self) -> tuple[TableShard, ...]:
        """Shards of this process that speak for their rows; over all processes they are every row once."""
        return tuple(shard for shard in self.shards if shard.primary)

    @property
    def counted_shards(self) -> tuple[TableShard, ...]:
        """Shards of this process whose bytes count: of copies, one does."""
        return self.shards if self.host.is_cut_by_columns(self.index) else self.primary_shards

    @property
    def group(self) -> Group:
        """Processes that hold parts of it."""
        return self.host.group


def group_of(tables: Sequence[HeldTable]) -> Group:
    """The processes that hold some tables.

    Raises:
        ValueError: If some of the tables are spread over processes and others are not.
    """
    sizes = {table.group.size: table for table in tables}
    if len(sizes) > 1:
        alone, spread = sizes[min(sizes)].name, sizes[max(sizes)].name
        raise ValueError(f"table {spread!r} is sharded, table {alone!r} is not: give each a callback of its own")
    return tables[0].group

"""What a report says about every table and about all of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from lightning_embcomp.engine.memory import TableMemory
from lightning_embcomp.report.popularity import BitsByRank

KINDS = ("weights", "optimizer_state", "router", "statistics")
"""Kinds of bytes, as attributes of :class:`~lightning_embcomp.engine.memory.TableMemory`."""


@dataclass(frozen=True, kw_only=True)
class TableReport:
    """One embedding table of a checkpoint.

    Args:
        host: Path of the module that holds the table, from the root of the LightningModule.
        memory: Bytes of the table, and of the plain table that it stands for.
        live: Share of the rows that store each column chunk, first chunk first; ``(1.0,)`` for a plain table.
        layout: ``prefix`` or ``chunks`` for a compressed table, ``plain`` for an ordinary one.
        bits: Bits that the rows are rounded to; None if they are not.

    Example:
        >>> memory = TableMemory(name="t", rows=100, dim=8, weights=800, optimizer_state=0, router=100, statistics=100,
        ...     plain_weights=3200, plain_optimizer_state=0)
        >>> table = TableReport(host="bags", memory=memory, live=(0.4, 0.1), layout="prefix")
        >>> table.name, table.memory.ratio, table.nominal_ratio
        ('bags.t', 3.2, 4.0)
    """

    host: str
    memory: TableMemory
    live: tuple[float, ...]
    layout: str
    bits: BitsByRank | None = None

    @property
    def name(self) -> str:
        """Unique name: path of the module, and the table's own name in a collection."""
        return ".".join(part for part in (self.host, self.memory.name) if part)

    @property
    def nominal_ratio(self) -> float | None:
        """Plain over stored bytes of the weights alone; None where no weight is stored."""
        return _nominal_ratio(self.memory.plain_weights, self.memory.weights)

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            **self.memory.as_dict(),
            "name": self.name,
            "layout": self.layout,
            "live_ratio": list(self.live),
            "nominal_ratio": self.nominal_ratio,
            **({} if self.bits is None else {"bits": asdict(self.bits)}),
        }


@dataclass(frozen=True, kw_only=True)
class MemoryReport:
    """All embedding tables of a checkpoint.

    Args:
        checkpoint: The file.
        epoch: Epoch that the checkpoint was written in; None if it does not say.
        global_step: Optimizer steps so far; None if it does not say.
        tables: The tables, in the order of the module.
        notes: What a reader must know to read the numbers right.
    """

    checkpoint: str
    epoch: int | None
    global_step: int | None
    tables: tuple[TableReport, ...]
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> TableMemory:
        """Bytes of all tables together; ``dim`` is 0, since tables may differ in it."""
        return total_memory(table.memory for table in self.tables)

    @property
    def nominal_ratio(self) -> float | None:
        """Plain over stored bytes of all weights; None where no weight is stored."""
        return _nominal_ratio(self.total.plain_weights, self.total.weights)

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        total = self.total.as_dict()
        del total["name"], total["dim"]
        return {
            "checkpoint": self.checkpoint,
            "epoch": self.epoch,
            "global_step": self.global_step,
            "tables": [table.as_dict() for table in self.tables],
            "total": {**total, "nominal_ratio": self.nominal_ratio},
            "notes": list(self.notes),
        }


def total_memory(memories: Iterable[TableMemory]) -> TableMemory:
    """Add up the bytes and rows of several tables.

    Args:
        memories: Bytes of each table.

    Returns:
        Their sum, called ``total``, with ``dim`` 0.
    """
    listed = list(memories)
    fields = ("rows", *KINDS, "plain_weights", "plain_optimizer_state")
    sums = {field: sum(int(getattr(memory, field)) for memory in listed) for field in fields}
    return TableMemory(name="total", dim=0, **sums)


def _nominal_ratio(plain_weights: int, weights: int) -> float | None:
    return plain_weights / weights if weights else None

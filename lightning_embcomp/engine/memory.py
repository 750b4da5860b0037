"""Account for every byte of an engine, from the storages themselves."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

from lightning_embcomp.engine.layout import LogicalTable
from lightning_embcomp.engine.row_class import WEIGHT

if TYPE_CHECKING:
    from lightning_embcomp.engine.routed import RoutedEmbeddings


@dataclass(frozen=True, kw_only=True)
class TableMemory:
    """Bytes of one logical table in training.

    Args:
        name: Table name.
        rows: Logical rows.
        dim: Columns.
        weights: Stored weights.
        optimizer_state: Optimizer state that the engine holds (fused optimizers).
        router: Packed codes and slots.
        statistics: Utilities, counters, and the steps and groups of rounded rows.
        plain_weights: Weights of the plain table.
        plain_optimizer_state: State of the same optimizer over the plain table.
    """

    name: str
    rows: int
    dim: int
    weights: int
    optimizer_state: int
    router: int
    statistics: int
    plain_weights: int
    plain_optimizer_state: int

    @property
    def total(self) -> int:
        """All bytes held."""
        return self.weights + self.optimizer_state + self.router + self.statistics

    @property
    def plain_total(self) -> int:
        """Bytes of the plain table with its optimizer state."""
        return self.plain_weights + self.plain_optimizer_state

    @property
    def ratio(self) -> float:
        """Plain bytes over bytes held: the true compression ratio."""
        return self.plain_total / max(1, self.total)

    def as_dict(self) -> dict[str, int | str | float]:
        """Fields and totals, for JSON."""
        return {**asdict(self), "total": self.total, "plain_total": self.plain_total, "ratio": self.ratio}


def plain_weight_bytes(table: LogicalTable, dtype: torch.dtype) -> int:
    """Bytes of the plain table's weights."""
    return table.rows * table.dim * dtype.itemsize


def table_memory(engine: RoutedEmbeddings, table: int) -> TableMemory:
    """Bytes of one table; over all tables they add up to :func:`engine_bytes`."""
    logical = engine.tables[table]
    weights = state = 0
    for c, rows in enumerate(engine.classes):
        first, last = engine.class_span(table, c)
        for name, storage in rows.storages().items():
            size = (last - first) * (1 if storage.rowwise else rows.width) * storage.tensor.element_size()
            if name == WEIGHT:
                weights += size
            else:
                state += size
    optimizer = engine.options.optimizer
    utility = engine.utility
    return TableMemory(
        name=logical.name,
        rows=logical.rows,
        dim=logical.dim,
        weights=weights,
        optimizer_state=state,
        router=engine.router.table_bytes(table),
        statistics=(utility.table_bytes(table) if utility is not None else 0)
        + sum(table_state.table_bytes(table) for table_state in engine.attached.values()),
        plain_weights=plain_weight_bytes(logical, engine.options.dtype),
        plain_optimizer_state=4 * logical.rows * optimizer.plain_state_columns(logical.dim) if optimizer else 0,
    )


def engine_bytes(engine: RoutedEmbeddings) -> int:
    """Bytes of all storages of the engine, as PyTorch reports them."""
    tensors = [storage.tensor for rows in engine.classes for storage in rows.storages().values()]
    tensors.append(engine.router.tensors.words)
    if engine.utility is not None:
        tensors += [engine.utility.values, engine.utility.gain]
    for table_state in engine.attached.values():
        tensors += table_state.held(len(engine.tables))
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
    return sum(storages.values())

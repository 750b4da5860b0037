"""Rows of an engine, read and written from outside: by logical row, or class by class."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_embcomp.engine.layout import ClassMap, LogicalTable
from lightning_embcomp.engine.optimizer import MOMENT_KINDS
from lightning_embcomp.engine.optimizer_state import attach, detach
from lightning_embcomp.engine.router import Router
from lightning_embcomp.engine.row_class import WEIGHT, FusedRows, RowClass, TrainedRows

if TYPE_CHECKING:
    from lightning_embcomp.engine.routed import RoutedOptions


class RowAccess:
    """The part of an engine that reads and writes its rows; none of it runs in a training step.

    Attributes:
        tables: Logical tables.
        class_map: Their row classes.
        router: Where each row is.
        classes: The storages.
        table_rows: Rows per table and class, int64.
        options: Storage and optimizer.
    """

    tables: tuple[LogicalTable, ...]
    class_map: ClassMap
    router: Router
    classes: list[RowClass]
    table_rows: Tensor
    options: RoutedOptions

    def class_span(self, table: int, row_class: int) -> tuple[int, int]:
        """First slot and slot after the last of a table's rows in a class."""
        first = int(self.table_rows[:table, row_class].sum())
        return first, first + int(self.table_rows[table, row_class])

    @torch.no_grad()
    def load_rows(self, table: int, start: int, values: Tensor) -> None:
        """Set consecutive logical rows from full-width values; columns without storage are ignored.

        Args:
            table: Table index.
            start: First row, a multiple of 64.
            values: ``(n, D)``.
        """
        codes, slots = self.router.read(table, start, start + values.shape[0])
        values = values.to(codes.device)
        for mine, storage, spans in self._stored(table, codes):
            kept = torch.cat([values[mine][:, first : first + n] for first, n in spans], 1)
            storage[slots[mine].long()] = kept.to(storage.dtype)

    @torch.no_grad()
    def read_rows(self, table: int, start: int, stop: int) -> Tensor:
        """Full-width values of consecutive logical rows; columns without storage are zero.

        Args:
            table: Table index.
            start: First row, a multiple of 64.
            stop: Row after the last.

        Returns:
            Tensor of shape ``(stop - start, D)`` in the dtype of the classes.
        """
        codes, slots = self.router.read(table, start, stop)
        values = torch.zeros(stop - start, self.tables[table].dim, dtype=self.options.dtype, device=codes.device)
        for mine, storage, spans in self._stored(table, codes):
            rows, stored = storage[slots[mine].long()], 0
            for first, n in spans:
                values[mine, first : first + n] = rows[:, stored : stored + n]
                stored += n
        return values

    def _stored(self, table: int, codes: Tensor) -> Iterator[tuple[Tensor, Tensor, Sequence[tuple[int, int]]]]:
        """Rows of each code that has any: their positions, the weights of their class, the columns that they store."""
        for code in range(1, self.tables[table].codes):
            mine = (codes == code).nonzero().flatten()
            if mine.numel():
                storage = self.classes[self.class_map.class_of_code[table][code]].storages()[WEIGHT].tensor
                yield mine, storage, self.tables[table].columns_of(code)

    @torch.no_grad()
    def initialise(self, table: int, init: Callable[[Tensor], Any]) -> None:
        """Fill the live weights of a table, class by class, with an in-place initialiser that ignores shape."""
        for c, rows in enumerate(self.classes):
            first, last = self.class_span(table, c)
            if last > first:
                init(rows.storages()[WEIGHT].tensor[first:last])

    @torch.no_grad()
    def clear_row_state(self, table: int | None = None, optimizers: Sequence[torch.optim.Optimizer] = ()) -> None:
        """Zero the optimizer state of the rows of a table, or of all rows.

        Args:
            table: Table index; None for all tables.
            optimizers: The user's optimizers, which hold state of rows that are not fused.
        """
        trained = [rows for rows in self.classes if isinstance(rows, TrainedRows)]
        if table is None:  # counts of steps start anew as well
            for optimizer in optimizers:
                for rows in trained:
                    optimizer.state.pop(rows.parameter, None)
            for fused in self.classes:
                if isinstance(fused, FusedRows) and fused.optimizer.kind in MOMENT_KINDS:
                    fused.restore_step(0)
        attach(trained, optimizers)
        for c, row_class in enumerate(self.classes):
            first, last = (0, row_class.rows) if table is None else self.class_span(table, c)
            for name, storage in row_class.storages().items():
                if name != WEIGHT:
                    storage.tensor[first:last].zero_()
        detach(trained, optimizers)

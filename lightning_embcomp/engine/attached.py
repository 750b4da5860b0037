"""What methods hang on an engine: state of its tables that is saved, counted and restored with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from lightning_embcomp.engine.precision import TablePrecision


class TableState(Protocol):
    """State per table.

    An engine saves it under ``tables.T.<name>.<tensor>`` and restores it by copying into the same tensors.
    """

    def tensors(self, table: int) -> dict[str, Tensor]:
        """Live tensors of a table, views where tables share storage; empty if the table has none."""

    def table_bytes(self, table: int) -> int:
        """Bytes held for a table."""

    def restored(self) -> None:
        """Called when the tensors were read from a checkpoint."""


class RowValues(TableState, Protocol):
    """What stands between the stored rows and their use: rounding."""

    def apply(self, rows: Tensor, indices: Tensor, ids_per_feature: Sequence[int]) -> Tensor:
        """Values of single rows, differentiable.

        Args:
            rows: Stored rows, float32 ``(N, D)``, feature by feature; columns beyond a table's dim are zero.
            indices: Their logical ids ``(N,)``.
            ids_per_feature: How many of them belong to each feature.

        Returns:
            float32 tensor of the same shape.
        """

    def precision(self, table: int) -> TablePrecision | None:
        """How the rows of a table are rounded once training ends; None if they are not."""

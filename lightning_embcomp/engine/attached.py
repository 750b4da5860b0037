"""What methods hang on an engine: state of its tables that is saved, counted and restored with them."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from lightning_embcomp.engine.precision import TablePrecision
from lightning_embcomp.kernels.types import BagLayout


class TableState:
    """State per table.

    An engine saves it under ``tables.T.<name>.<tensor>`` and restores it by copying into the same tensors.
    """

    movable = False
    """Whether an engine that holds it can be moved to another device, by :meth:`carry`."""

    def carry(self, device: torch.device) -> None:
        """Move what lookups and training steps read to another device; a second call does nothing."""
        raise NotImplementedError

    def tensors(self, table: int) -> dict[str, Tensor]:
        """Live tensors of a table, views where tables share storage; empty if the table has none."""
        raise NotImplementedError

    def table_bytes(self, table: int) -> int:
        """Bytes held for a table."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors(table).values())

    def held(self, tables: int) -> list[Tensor]:
        """All tensors, saved or not.

        Args:
            tables: Tables of the engine.
        """
        return [tensor for t in range(tables) for tensor in self.tensors(t).values()]

    def row_tensors(self, table: int) -> frozenset[str]:
        """Names of the tensors of a table that hold one value per row; the others belong to the table as a whole."""
        return frozenset()

    def names(self, table: int, saved: Collection[str]) -> set[str]:
        """Tensors that a checkpoint must hold of a table, given those that it holds."""
        return set(self.tensors(table))

    def misfit(self, table: int, saved: Mapping[str, Tensor]) -> str | None:
        """What is wrong with the tensors of a checkpoint, of which none is missing; None if they fit."""
        for name, tensor in self.tensors(table).items():
            if saved[name].shape != tensor.shape:
                return f"{name} has shape {tuple(saved[name].shape)} instead of {tuple(tensor.shape)}"
        return None

    def prepare(self, table: int, saved: Mapping[str, Tensor]) -> None:
        """Make room for tensors that fit, where sizes depend on the data; nothing to do by default."""

    def restored(self) -> None:
        """Called when the tensors were read from a checkpoint; nothing to do by default."""


class RowValues(TableState):
    """What stands between the stored rows and their use: rounding."""

    def apply(self, rows: Tensor, indices: Tensor, layout: BagLayout, *, bags: int, training: bool) -> Tensor:
        """Values of single rows, differentiable.

        Args:
            rows: Stored rows, float32 ``(N, D)``, feature by feature; columns beyond a table's dim may be anything.
            indices: Their logical ids ``(N,)``.
            layout: Features of the rows, each row a bag.
            bags: Bags per feature: samples of the batch.
            training: Whether the backward pass may move state.

        Returns:
            float32 tensor of the same shape.
        """
        raise NotImplementedError

    def precision(self, table: int) -> TablePrecision | None:
        """How the rows of a table are rounded once training ends; None if they are not."""
        raise NotImplementedError

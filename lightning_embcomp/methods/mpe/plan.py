"""Which rows need no storage once widths are chosen."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_embcomp.engine.routed import RoutedEmbeddings


class ZeroWidthPlan:
    """Rows of width 0 store nothing; the others stay as they are.

    Args:
        engine: Engine whose rows are rounded.
    """

    def __init__(self, engine: RoutedEmbeddings) -> None:
        self._precision = [engine.precision(t) for t in range(len(engine.tables))]

    def begin(self) -> None:
        """Nothing to reset."""

    def codes(self, table: int, start: int, stop: int, current: Tensor) -> Tensor:
        """New codes of the rows, uint8."""
        precision = self._precision[table]
        if precision is None:
            return current
        return torch.where(precision.bits_of(start, stop) == 0, 0, current).to(torch.uint8)

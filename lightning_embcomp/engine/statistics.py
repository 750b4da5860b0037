"""Statistics of logical rows that methods share: one utility tensor per engine, moved only by training steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_embcomp.engine.layout import LogicalTable, row_numbers
from lightning_embcomp.kernels.assemble import bag_norms
from lightning_embcomp.kernels.types import BagLayout
from lightning_embcomp.kernels.utility import UtilityKind, accumulate_utility, decay_utility

GAIN_BYTES = 16
"""Bytes of a table's running mean gain: a sum and a count."""
_GAIN_MEMORY = 0.99  # share of the running mean that a step keeps
# Keep the random bits of decays apart from each other and from those of observed steps.
_DECAY_STEP = 0x9E3779B9
_DECAY_ROWS = 0x7FEB352D


class RowUtility:
    """Utility of every logical row (or row part) in bfloat16: 2 bytes per row and part.

    Args:
        tables: Logical tables of the engine.
        parts: Equal column parts with a utility of their own; 1 keeps one number per row.
        kind: What an occurrence of an id adds; see :func:`lightning_embcomp.kernels.utility.accumulate_utility`.
        every_n_steps: Sample one backward pass in this many.
        device: Where the tensor lives.
    """

    def __init__(
        self,
        tables: Sequence[LogicalTable],
        *,
        parts: int = 1,
        kind: UtilityKind = "gradient",
        every_n_steps: int = 1,
        device: torch.device,
    ) -> None:
        rows = [table.rows for table in tables]
        self.parts = parts
        self.kind: UtilityKind = kind
        self.every_n_steps = every_n_steps
        self.step = 0
        self.row_start = torch.tensor([sum(rows[:t]) for t in range(len(rows))], device=device)
        self.values = torch.zeros(sum(rows), parts, dtype=torch.bfloat16, device=device)
        self.gain = torch.zeros(len(rows), 2, dtype=torch.float64, device=device)
        self._rows = rows
        self._number = torch.tensor(row_numbers(tables), device=device)

    def carry(self, device: torch.device) -> None:
        """Move the utilities to another device."""
        for name in ("row_start", "values", "gain", "_number"):
            setattr(self, name, getattr(self, name).to(device))

    def table_bytes(self, table: int) -> int:
        """Bytes held for a table."""
        return self.of_table(table).numel() * self.values.element_size() + GAIN_BYTES

    def measures_like(self, other: RowUtility) -> bool:
        """Whether both would hold the same numbers."""
        return (self.parts, self.kind, self.every_n_steps) == (other.parts, other.kind, other.every_n_steps)

    def of_table(self, table: int) -> Tensor:
        """Utilities of a table, a view of shape ``(rows, parts)``."""
        start = int(self.row_start[table])
        return self.values[start : start + self._rows[table]]

    def observe(
        self,
        grad: Tensor,
        indices: Tensor,
        offsets: Tensor,
        layout: BagLayout,
        weights: Tensor | None,
        norms: Tensor | None = None,
    ) -> None:
        """Account for one backward pass.

        Args:
            grad: Gradient of the pooled output.
            indices: Logical ids.
            offsets: Bag boundaries.
            layout: Output position of each bag.
            weights: Per-sample weights, or None.
            norms: Norms ``(bags, 1)`` of the gradient of the whole table where the engine holds some columns only.
        """
        self.step += 1
        if self.step % self.every_n_steps:
            return
        if norms is None:
            norms = bag_norms(grad, offsets, layout, self.parts)
        self._track_gain(norms, offsets, layout, weights)
        accumulate_utility(
            self.values, self.row_start, indices, offsets, layout, norms, weights, self.kind, self.step, self._number
        )

    def decay(self, table: int, factor: float) -> None:
        """Multiply the utilities of a table by a factor from 0 to 1, rounded so that the mean is right.

        The rounding depends on the step and the number of the row alone, so that a resumed run repeats it bit for bit;
        decays of a table are expected to have an observed step between them.
        """
        seed = self.step * _DECAY_STEP + _DECAY_ROWS
        first = int(self._number[table]) * self.parts
        decay_utility(self.of_table(table), factor, seed & 0xFFFFFFFF, first)

    def _track_gain(self, norms: Tensor, offsets: Tensor, layout: BagLayout, weights: Tensor | None) -> None:
        lengths = offsets.long().diff().double()
        if self.kind == "frequency":
            per_bag = lengths
        else:
            scale = lengths if weights is None else _bag_sums(weights.detach().double().abs(), offsets)
            per_bag = norms.double().mean(1) * scale
        ends = layout.bag_start
        self.gain *= _GAIN_MEMORY
        for column, values in enumerate((per_bag, lengths)):
            self.gain.select(1, column).index_add_(0, layout.table, _bag_sums(values, ends))


def _bag_sums(values: Tensor, ends: Tensor) -> Tensor:
    """Sums of the values between consecutive boundaries."""
    sums = torch.cat([values.new_zeros(1), values.cumsum(0)])
    return sums.index_select(0, ends.long()).diff()

"""What a method tells the engine: the new code of every logical row, a slab at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lightning_embcomp.engine.precision import TablePrecision


class RowPlan(Protocol):
    """New codes of all rows of an engine.

    The engine reads a plan twice, to count and to move, each time table by table and slab by slab in rising order. A
    plan must return the same codes both times; it may look at the present codes of the slab that it is asked for.
    """

    def begin(self) -> None:
        """Start (again) at the first row."""

    def codes(self, table: int, start: int, stop: int, current: Tensor) -> Tensor:
        """New codes of rows ``start`` to ``stop``, uint8; ``current`` are the present ones."""


class FixedPlan:
    """The same code for every row of a table.

    Args:
        codes: Code per table.

    Example:
        >>> FixedPlan([2]).codes(0, 0, 3, torch.zeros(3, dtype=torch.uint8))
        tensor([2, 2, 2], dtype=torch.uint8)
    """

    def __init__(self, codes: Sequence[int]) -> None:
        self._codes = list(codes)

    def begin(self) -> None:
        """Nothing to reset."""

    def codes(self, table: int, start: int, stop: int, current: Tensor) -> Tensor:
        """The table's code, repeated."""
        return torch.full((stop - start,), self._codes[table], dtype=torch.uint8, device=current.device)


class SamePlan:
    """Every row keeps its code."""

    def begin(self) -> None:
        """Nothing to reset."""

    def codes(self, table: int, start: int, stop: int, current: Tensor) -> Tensor:
        """The present codes."""
        return current


class WithoutZeroWidths:
    """Another plan, but rows that are rounded to 0 bits store nothing.

    Args:
        plan: The other plan.
        precision: How the rows of each table are rounded; None where they are not.
    """

    def __init__(self, plan: RowPlan, precision: Sequence[TablePrecision | None]) -> None:
        self._plan, self._precision = plan, list(precision)

    def begin(self) -> None:
        """Start at the first row."""
        self._plan.begin()

    def codes(self, table: int, start: int, stop: int, current: Tensor) -> Tensor:
        """The codes of the other plan, or 0."""
        codes, precision = self._plan.codes(table, start, stop, current), self._precision[table]
        if precision is None:
            return codes
        dropped = (precision.bits_of(start, stop) == 0).to(codes.device)
        return torch.where(dropped, 0, codes).to(torch.uint8)


@dataclass
class ReadPlan:
    """Codes that are read from somewhere, for example a checkpoint.

    Args:
        read: Maps (table, start, stop) to uint8 codes.
    """

    read: Callable[[int, int, int], Tensor]

    def begin(self) -> None:
        """Nothing to reset."""

    def codes(self, table: int, start: int, stop: int, current: Tensor) -> Tensor:
        """The codes read."""
        return self.read(table, start, stop).to(current.device)


@dataclass(frozen=True, kw_only=True)
class MoveSummary:
    """What a move did.

    Args:
        changed_rows: Rows whose code changed.
        grown_rows: Of these, rows that store more columns than before.
        revived_rows: Of these, rows that stored nothing before.
        dropped_rows: Rows that store nothing any more.
        rows: All logical rows.
    """

    changed_rows: int
    grown_rows: int
    revived_rows: int
    dropped_rows: int
    rows: int

    @property
    def churn(self) -> float:
        """Share of all rows that changed."""
        return self.changed_rows / max(1, self.rows)

    def __add__(self, other: MoveSummary) -> MoveSummary:
        """Add up the moves of several engines."""
        return MoveSummary(
            changed_rows=self.changed_rows + other.changed_rows,
            grown_rows=self.grown_rows + other.grown_rows,
            revived_rows=self.revived_rows + other.revived_rows,
            dropped_rows=self.dropped_rows + other.dropped_rows,
            rows=self.rows + other.rows,
        )

"""Settings of dimension pruning."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lightning_embcomp.engine.layout import ChunkLayout
from lightning_embcomp.kernels.utility import UtilityKind

Scope = Literal["global", "table"]


@dataclass(frozen=True, kw_only=True)
class PruningSchedule:
    """When pruning events happen, in optimizer steps.

    Args:
        every_n_steps: Steps between events.
        early_steps: Extra events before the first regular one, while utilities are still rough.
        last_step: No events after this step; None for no end.
        decay: Factor on all utilities at each event; below 1 forgets the past, so that the tables follow drift.
    """

    every_n_steps: int = 100
    early_steps: tuple[int, ...] = (3, 6, 9, 30, 60, 90)
    last_step: int | None = None
    decay: float = 0.98

    def __post_init__(self) -> None:
        if self.every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, not {self.every_n_steps}")
        if any(step < 1 for step in self.early_steps):
            raise ValueError(f"early_steps must be positive, not {self.early_steps}")
        if self.last_step is not None and self.last_step < 1:
            raise ValueError(f"last_step must be at least 1, or None for no end, not {self.last_step}")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay must be over 0 and at most 1, not {self.decay}")

    def is_event(self, step: int) -> bool:
        """Whether an event happens after optimizer step ``step``, counted from 1.

        Example:
            >>> schedule = PruningSchedule(every_n_steps=100)
            >>> [step for step in range(1, 250) if schedule.is_event(step)]
            [3, 6, 9, 30, 60, 90, 100, 200]
        """
        if step < 1 or (self.last_step is not None and step > self.last_step):
            return False
        return step % self.every_n_steps == 0 or (step < self.every_n_steps and step in self.early_steps)


@dataclass(frozen=True, kw_only=True)
class Granularity:
    """What lives or dies, and how its worth is measured.

    Args:
        chunks: Equal column chunks per row, at most: a table gets the largest number up to this whose width is a
            multiple of 4 (dim 8: 2 chunks of 4). 1 prunes whole rows.
        layout: ``prefix`` keeps leading chunks of a row and one utility per row; ``chunks`` keeps any subset and one
            utility per chunk.
        utility: What an occurrence of an id adds: ``gradient`` its gradient norm (frequency times mean gradient),
            ``frequency`` one, ``peak_gradient`` keeps the largest norm.
        falloff: ``prefix`` only: ratio between the worth of neighbouring chunks of a row.
        prior_occurrences: Average occurrences that every row is credited with beside what was measured, so that rows
            not seen yet do not lose everything to further columns of rows seen once.
        rate_power: Exponent p of the factor :math:`(D/w)^p` on the fused rate of rows that store w of D columns.
            1 lets a narrow row move the model's output as far per update as a full one, 0 keeps one rate for all. Has
            no effect on tables that an optimizer of ``configure_optimizers`` trains.
        hysteresis: Relative gain that a dead chunk must show over a live one to take its place.
        sample_every_n_steps: Measure utilities in one backward pass of this many.
    """

    chunks: int = 4
    layout: ChunkLayout = "prefix"
    utility: UtilityKind = "gradient"
    falloff: float = 0.3
    prior_occurrences: float = 0.5
    rate_power: float = 1.0
    hysteresis: float = 0.1
    sample_every_n_steps: int = 1

    def __post_init__(self) -> None:
        if self.chunks < 1:
            raise ValueError(f"chunks must be at least 1, not {self.chunks}")
        if self.layout not in ("prefix", "chunks"):
            raise ValueError(f"layout must be 'prefix' or 'chunks', not {self.layout!r}")
        if self.utility not in ("gradient", "frequency", "peak_gradient"):
            raise ValueError(f"utility must be 'gradient', 'frequency' or 'peak_gradient', not {self.utility!r}")
        if not 0 < self.falloff <= 1:
            raise ValueError(f"falloff must be over 0 and at most 1, not {self.falloff}")
        if not 0 <= self.prior_occurrences < math.inf:
            raise ValueError(f"prior_occurrences must be a number that is not negative, not {self.prior_occurrences}")
        if not 0 <= self.rate_power <= 2:
            raise ValueError(f"rate_power must be from 0 to 2, not {self.rate_power}")
        if not 0 <= self.hysteresis < math.inf:
            raise ValueError(f"hysteresis must be a number that is not negative, not {self.hysteresis}")
        if self.sample_every_n_steps < 1:
            raise ValueError(f"sample_every_n_steps must be at least 1, not {self.sample_every_n_steps}")


def check_target(target: float) -> float:
    """Return the target if it is a fraction from 0 to below 1.

    Raises:
        ValueError: Otherwise.
    """
    if not 0.0 <= target < 1.0:
        raise ValueError(
            f"target is the fraction of embedding weight bytes to remove, from 0 to below 1, not {target}"
            + (f"; for {target} % write {target / 100}" if 1 <= target <= 100 else "")
        )
    return target

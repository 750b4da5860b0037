"""Settings of the budget controller."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

BudgetOf = Literal["serving", "training"]


@dataclass(frozen=True, kw_only=True)
class BudgetControl:
    """How the price of a byte moves, and how far a step goes.

    Args:
        every_n_steps: Optimizer steps between control events. A step is on probation until the next event, so they
            should be far enough apart for the model to recover from one.
        warmup_steps: No step before this many optimizer steps, nor before the search of widths is over.
        step: Largest step, as the natural logarithm of bytes before over bytes after; 0.25 removes 22 %.
        tolerance: A size from ``(1 - tolerance)`` of the budget up to the budget is left as it is.
        price_rate: Relative change of the price at an event.
        recovery: Share of the immediate loss of a step that training until the next event is trusted to make up for. 0
            tries only steps that stay inside the guard at once; with more, further steps are tried and rolled back.
        window: Events whose lowest NE is the reference; null for all. A limit lets the reference follow drift, and lets
            NE creep up by as much as the guard allows in every window.
        validation_batches: Batches that NE is measured on; null for all that the trainer validates on.
        patience: Events outside the guard, or without a new low after a fresh start, before bytes are given back. By
            default three, and without a window those of an epoch on top: NE rises and falls within an epoch.
        keep_good: Whether a run that would end outside the guard goes back to the last state that an event found
            inside, or to the smallest while none is inside the budget. It is held in memory. Without effect with a
            window, and without the guard.
    """

    every_n_steps: int = 200
    warmup_steps: int = 0
    step: float = 0.25
    tolerance: float = 0.02
    price_rate: float = 0.5
    recovery: float = 0.5
    window: int | None = None
    validation_batches: int | None = None
    patience: int | None = None
    keep_good: bool = True

    def __post_init__(self) -> None:
        for name in ("every_n_steps", "window", "validation_batches", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative, not {self.warmup_steps}")
        if not 0.01 <= self.step <= 10:
            raise ValueError(f"step is a logarithm of a ratio of bytes, from 0.01 to 10, not {self.step}")
        if not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance is a share of the budget, over 0 and below 1, not {self.tolerance}")
        if not 0 <= self.recovery < 1:
            raise ValueError(f"recovery is a share of a loss, from 0 to below 1, not {self.recovery}")
        if not self.price_rate > 0:
            raise ValueError(f"price_rate must be positive, not {self.price_rate}")


def check_budget(memory: object, ratio: float | None, max_ne_loss: float | None, reference_ne: float | None) -> None:
    """Refuse settings of a budget that contradict each other or are out of range.

    Raises:
        ValueError: With what to change.
    """
    if (memory is None) == (ratio is None):
        raise ValueError("CompressionBudget: give either memory (bytes, like 2GB) or ratio (how much smaller)")
    if ratio is not None and not ratio > 1:
        raise ValueError(f"CompressionBudget: ratio is plain bytes over those of the budget, above 1, not {ratio}")
    if max_ne_loss is not None and not max_ne_loss > 0:
        raise ValueError(
            f"CompressionBudget: max_ne_loss is a relative increase of NE and must be positive, not {max_ne_loss}; null"
            " switches the guard off"
        )
    if reference_ne is not None and max_ne_loss is None:
        raise ValueError("CompressionBudget: reference_ne has no effect without the guard: give max_ne_loss")
    if reference_ne is not None and not 0 < reference_ne:
        raise ValueError(f"CompressionBudget: reference_ne is a normalised entropy, above 0, not {reference_ne}")


def check_start(start: float) -> float:
    """Return the share of weights that a run starts with, if it is one.

    Raises:
        ValueError: If it is not over 0 and at most 1.
    """
    if not 0 < start <= 1:
        raise ValueError(f"CompressionBudget: start is a share of the weights, over 0 and at most 1, not {start}")
    return start

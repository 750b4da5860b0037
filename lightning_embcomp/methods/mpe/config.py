"""Settings of mixed precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_embcomp.engine.precision import FULL_WIDTH, MAX_WIDTH

MAX_GROUPS = 30_000
"""Groups are numbered by int16, and tables have a few more than their share."""
SearchMethod = Literal["sensitivity", "softmax"]
FrequencySource = Literal["data", "rank"]


@dataclass(frozen=True, kw_only=True)
class PrecisionSearch:
    """How widths are searched.

    Args:
        epochs: Epochs of the search phase; give this or ``steps``.
        steps: Optimizer steps of the search phase, instead of epochs.
        method: ``sensitivity`` trains at the largest width, adds up by how much rounding to every other width would
            move the loss of each sample, squared, and solves for the byte budget; ``softmax`` trains a mixture of all
            widths and its logits, as in the paper.
        widths: Candidate bits per value, from 0 (the row is dropped) to 8; 32 leaves values as they are.
        groups: Row groups of equal size that all rows are cut into, by falling frequency; the most frequent rows of a
            table are in smaller ones.
        frequency: Where the frequency of ids comes from: ``data`` asks the data module (``id_counts``), ``rank`` takes
            ids as numbered by falling frequency.
        reset: Whether tables start the retrain phase from fresh initial values, as in the paper.
        temperature: ``softmax`` only: divisor of the logits.
        learning_rate: ``softmax`` only: Adam's rate for the logits.
    """

    epochs: int = 1
    steps: int | None = None
    method: SearchMethod = "sensitivity"
    widths: tuple[int, ...] = (0, 2, 4, 8)
    groups: int = 128
    frequency: FrequencySource = "data"
    reset: bool = True
    temperature: float = 3e-3
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", check_widths(self.widths))
        if self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, not {self.epochs}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1, or None to count epochs, not {self.steps}")
        if self.method not in ("sensitivity", "softmax"):
            raise ValueError(f"method must be 'sensitivity' or 'softmax', not {self.method!r}")
        if not 1 <= self.groups <= MAX_GROUPS:
            raise ValueError(f"groups must be from 1 to {MAX_GROUPS}, not {self.groups}")
        if self.frequency not in ("data", "rank"):
            raise ValueError(f"frequency must be 'data' or 'rank', not {self.frequency!r}")
        for name in ("temperature", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class RowQuantization:
    """How values are rounded.

    Args:
        learning_rate: Adam's rate for the logarithms of the steps.
        offset: Whether every column of a table has a trained offset, as in the paper. Columns that dimension pruning
            cuts read as zero, so that tables with both methods are refused.
        offset_learning_rate: Adam's rate for the offsets.
    """

    learning_rate: float = 5e-2
    offset: bool = False
    offset_learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("learning_rate", "offset_learning_rate"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")


def check_widths(widths: Sequence[int]) -> tuple[int, ...]:
    """Return the candidate widths, rising.

    Raises:
        ValueError: If there are none above 0, or one is neither a whole number of bits from 0 to 8 nor 32.
    """
    chosen = tuple(sorted(set(widths)))
    wrong = [width for width in chosen if width not in (*range(MAX_WIDTH + 1), FULL_WIDTH)]
    if wrong or not chosen or chosen[-1] == 0:
        raise ValueError(
            f"widths are bits per value from 0 to {MAX_WIDTH}, or {FULL_WIDTH} for unrounded values, at least one above"
            f" 0; not {tuple(widths)}"
        )
    return chosen


def check_bits(bits: int) -> int:
    """Return a fixed width if it is 1 to 8, or 32.

    Raises:
        ValueError: Otherwise.
    """
    if bits not in (*range(1, MAX_WIDTH + 1), FULL_WIDTH):
        raise ValueError(f"bits is the width of every value, from 1 to {MAX_WIDTH}, or {FULL_WIDTH}, not {bits}")
    return bits


def check_ratio(ratio: float, widths: Sequence[int]) -> float:
    """Return a target ratio if it is above 1 and within reach.

    Raises:
        ValueError: Otherwise.
    """
    if not ratio > 1:
        raise ValueError(f"ratio is the size of the float32 tables over that of the rounded ones, above 1, not {ratio}")
    if widths[0] * ratio > FULL_WIDTH:
        raise ValueError(
            f"ratio {ratio:g} cannot be reached with widths {list(widths)}: {widths[0]} bits are"
            f" {FULL_WIDTH / widths[0]:g} times smaller than float32. Add a smaller width, or lower the ratio"
        )
    return ratio

"""Dividing rows into training, validation and test rows."""

from typing import Literal

import numpy as np

from lightning_embcomp.data.schema import Split

Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = ("train", "validation", "test")


def part_sizes(num_rows: int, split: Split) -> tuple[int, int, int]:
    """Rows of every part.

    Args:
        num_rows: Rows in all.
        split: The fractions. A part with a fraction above 0 is rounded to the nearest row.

    Returns:
        Training, validation and test rows; they add up to ``num_rows``.

    Raises:
        ValueError: If there would be no training rows, or none in a part that was asked for.

    Example:
        >>> part_sizes(25, Split(validation=0.1, test=0.2))
        (18, 2, 5)
    """
    validation, test = round(num_rows * split.validation), round(num_rows * split.test)
    train = num_rows - validation - test
    if train < 1 or (split.validation > 0) != (validation > 0) or (split.test > 0) != (test > 0):
        raise ValueError(
            f"{num_rows} rows are too few for a split into training, {split.validation:g} validation and "
            f"{split.test:g} test; use more rows or set a fraction to 0"
        )
    return train, validation, test


def assign_parts(num_rows: int, split: Split, timestamps: np.ndarray | None = None) -> np.ndarray:
    """Assign every row to a part.

    Args:
        num_rows: Rows in all.
        split: How to divide them.
        timestamps: Time of every row, float64 of shape ``(num_rows,)``; ``None``: rows are in time order. Rows of
            the same time are in order. A random split does not use it.

    Returns:
        Index into ``PARTS`` per row, uint8 of shape ``(num_rows,)``.

    Example:
        >>> assign_parts(4, Split(validation=0.25, test=0.25), np.array([3.0, 1.0, 4.0, 2.0]))
        array([1, 0, 2, 0], dtype=uint8)
    """
    in_order = np.repeat(np.arange(3, dtype=np.uint8), part_sizes(num_rows, split))
    if split.kind == "random":
        ranking = np.random.Generator(np.random.Philox(split.seed)).permutation(num_rows)
    elif timestamps is None or is_sorted(timestamps):
        return in_order
    else:
        ranking = np.argsort(timestamps, kind="stable")
    parts = np.empty(num_rows, dtype=np.uint8)
    parts[ranking] = in_order
    return parts


def is_sorted(timestamps: np.ndarray) -> bool:
    """Whether no row is earlier than the row before it."""
    return bool((timestamps[1:] >= timestamps[:-1]).all())

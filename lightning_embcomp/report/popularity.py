"""Who keeps memory: rows by how often they are looked up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lightning_embcomp.engine.precision import SEARCHED


@dataclass(frozen=True, kw_only=True)
class PopularityGroups:
    """Rows in equal groups, the most popular first.

    Args:
        live: Mean share of their columns that the rows of a group store.
        lookups: Share of all lookups that go to the group.
    """

    live: tuple[float, ...]
    lookups: tuple[float, ...]


def by_popularity(live: np.ndarray, counts: np.ndarray, groups: int = 10) -> PopularityGroups:
    """Divide rows into groups of equal size by falling popularity.

    Rows of equal popularity count with their mean, so that their order in the table says nothing.

    Args:
        live: Share of its columns that each row stores, ``(R,)``.
        counts: How often each row is looked up, ``(R,)``.
        groups: Number of groups; 10 gives deciles.

    Returns:
        The groups.

    Raises:
        ValueError: If the shapes differ, or there are fewer rows than groups.

    Example:
        >>> by_popularity(np.array([0.0, 1.0, 0.5, 0.0]), np.array([1, 8, 1, 0]), groups=2)
        PopularityGroups(live=(0.625, 0.125), lookups=(0.9, 0.1))
    """
    if live.shape != counts.shape or live.ndim != 1:
        raise ValueError(f"live and counts must be vectors of one length, got shapes {live.shape} and {counts.shape}")
    if len(live) < groups:
        raise ValueError(f"{len(live)} rows cannot be divided into {groups} groups")
    levels, level = np.unique(counts, return_inverse=True)
    mean = np.bincount(level, weights=live) / np.bincount(level)
    order = np.argsort(-levels[level], kind="stable")
    total = max(1, int(counts.sum()))
    parts = np.array_split(order, groups)
    return PopularityGroups(
        live=tuple(float(mean[level[part]].mean()) for part in parts),
        lookups=tuple(float(counts[part].sum() / total) for part in parts),
    )


@dataclass(frozen=True, kw_only=True)
class BitsByRank:
    """Bits per value of the rows of a table, against how popular they are.

    Args:
        average: Mean over the rows; None while widths are searched.
        rows: Rows of each width.
        tenths: Mean bits of each tenth of the rows, the most popular first.
    """

    average: float | None
    rows: dict[int, int]
    tenths: tuple[float, ...]

    @classmethod
    def of(cls, bits: Sequence[int], sizes: Sequence[int]) -> BitsByRank:
        """Summarise row groups.

        Args:
            bits: Width of each group, the most popular first; 255 while it is searched.
            sizes: Rows of each group.

        Example:
            >>> BitsByRank.of([8, 2, 0], [1, 4, 5])
            BitsByRank(average=1.6, rows={0: 5, 2: 4, 8: 1}, tenths=(8.0, 2.0, 2.0, 2.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0))
        """
        if SEARCHED in bits:
            return cls(average=None, rows={}, tenths=())
        ends = np.cumsum([0, *sizes]).astype(np.float64)
        spent = np.concatenate([[0.0], np.cumsum(np.array(bits, np.float64) * np.array(sizes))])
        marks = np.interp(np.linspace(0, ends[-1], 11), ends, spent)
        rows = {width: sum(n for b, n in zip(bits, sizes, strict=True) if b == width) for width in sorted(set(bits))}
        return cls(
            average=float(spent[-1] / ends[-1]),
            rows=rows,
            tenths=tuple(float(x) for x in np.diff(marks) / (ends[-1] / 10)),
        )

"""Vocabularies: which value of a feature has which id."""

import itertools
from dataclasses import dataclass, field

import numpy as np
import polars as pl

_COMPACT_AT = 1 << 20


class ValueCounter:
    """Counts values of one feature over many blocks, in memory proportional to the number of distinct values.

    Example:
        >>> counter = ValueCounter()
        >>> counter.add(pl.Series(["b", "a", None]))
        >>> counter.add(pl.Series(["b", "c"]))
        >>> vocabulary = counter.vocabulary(min_count=1)
        >>> vocabulary.values.to_list(), vocabulary.counts.tolist()
        (['b', 'a', 'c'], [1, 2, 1, 1])
    """

    def __init__(self) -> None:
        """Start with no values."""
        self._counted = _counts(pl.Series([], dtype=pl.String))
        self._new: list[pl.DataFrame] = []
        self._new_rows = 0

    def add(self, values: pl.Series) -> None:
        """Count the texts of ``values``; null is counted as missing."""
        counts = _counts(values)
        self._new.append(counts)
        self._new_rows += counts.height
        if self._new_rows > max(_COMPACT_AT, self._counted.height):
            self._compact()

    def _compact(self) -> None:
        merged = pl.concat([self._counted, *self._new])
        self._counted = merged.group_by("value").agg(pl.col("count").sum())
        self._new, self._new_rows = [], 0

    def vocabulary(self, min_count: int) -> "Vocabulary":
        """Number the values that occur at least ``min_count`` times by falling frequency.

        Equally frequent values are in the order of their text, so that ids do not depend on the order of rows.
        """
        self._compact()
        kept = self._counted.filter(pl.col("value").is_not_null() & (pl.col("count") >= min_count))
        kept = kept.sort("count", "value", descending=[True, False])
        left = int(self._counted["count"].sum()) - int(kept["count"].sum())
        counts = np.concatenate([[left], kept["count"].to_numpy()]).astype(np.int64)
        return Vocabulary(values=kept["value"], counts=counts)


def _counts(values: pl.Series) -> pl.DataFrame:
    counts = values.alias("value").value_counts(name="count")
    return counts.with_columns(pl.col("count").cast(pl.Int64))


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Ids of the values of one feature: id 0 is everything unknown or missing, ids from 1 fall in frequency.

    Args:
        values: Values by id, from id 1; text without repetition.
        counts: How often each id occurs in the training rows, from id 0; int64 of shape ``(len(values) + 1,)``.

    Example:
        >>> vocabulary = Vocabulary(values=pl.Series(["b", "a"]), counts=np.array([0, 2, 1]))
        >>> vocabulary.encode(pl.Series(["a", "b", "z", None])).tolist()
        [2, 1, 0, 0]
    """

    values: pl.Series
    counts: np.ndarray
    _seed: int = field(init=False, repr=False, compare=False)
    _hashes: np.ndarray = field(init=False, repr=False, compare=False)
    _positions: np.ndarray = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Index the values."""
        # Sorted hashes are searched per block at no set-up cost; a hash join would hash the vocabulary every time.
        for seed in itertools.count():
            hashes = self.values.hash(seed=seed).to_numpy()
            positions = np.argsort(hashes, kind="stable")
            hashes = hashes[positions]
            if not (hashes[1:] == hashes[:-1]).any():  # two values with one 64-bit hash: practically never
                break
        object.__setattr__(self, "_seed", seed)
        object.__setattr__(self, "_hashes", hashes)
        object.__setattr__(self, "_positions", positions)

    def __len__(self) -> int:
        """Number of ids, id 0 included."""
        return len(self.values) + 1

    def encode(self, values: pl.Series) -> np.ndarray:
        """Look up the ids of texts.

        Args:
            values: Texts; null means missing.

        Returns:
            Ids, int32, of the same length.
        """
        if not len(self.values):
            return np.zeros(len(values), dtype=np.int32)
        found = np.minimum(
            np.searchsorted(self._hashes, values.hash(seed=self._seed).to_numpy()), len(self._hashes) - 1
        )
        positions = self._positions[found]
        same = (self.values.gather(positions) == values).fill_null(False).to_numpy()
        return np.where(same, positions + 1, 0).astype(np.int32)

"""What a compressed table takes in training, as far as a sharding plan depends on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

EULER = 0.5772156649015329


@dataclass(frozen=True, kw_only=True)
class TableFootprint:
    """What a compressed table takes in training, relative to the plain one. The default is the plain table.

    Rows that store anything carry their optimizer state, which follows them: per row for row-wise optimizers, per
    stored weight for others. Values stay in the table's own dtype while they train, whatever they are rounded to, and
    pooled rows travel between ranks in full width.

    Args:
        live: Share of the rows that store each column chunk, first chunk first; the chunks are equally wide.
        row_bytes: Bytes per logical row beside weights and optimizer state: router, utilities, counters. They are held
            for every row and every column part of it, stored or not.
        state_bytes: Bytes of optimizer state per stored row that a method adds.
        lookup_bytes: Bytes that a lookup reads beside the row: a block of the router.
        serving_bits: Bits per stored value that the exported table is to have.
        prefix: Whether rows store leading chunks only; a table of other subsets cannot be cut by columns.

    Raises:
        ValueError: If a share is not from 0 to 1, or a size is negative.

    Example:
        >>> pruned = TableFootprint(live=(0.9, 0.3, 0.1, 0.1), row_bytes=3.0)
        >>> round(pruned.kept, 3), pruned.is_plain, TableFootprint().is_plain
        (0.35, False, True)
    """

    live: tuple[float, ...] = (1.0,)
    row_bytes: float = 0.0
    state_bytes: float = 0.0
    lookup_bytes: float = 0.0
    serving_bits: float = 32.0
    prefix: bool = True

    def __post_init__(self) -> None:
        if not self.live or any(not 0.0 <= share <= 1.0 for share in self.live):
            raise ValueError(f"live holds a share of rows from 0 to 1 for each column chunk, not {self.live}")
        for name in ("row_bytes", "state_bytes", "lookup_bytes", "serving_bits"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number that is not negative, not {getattr(self, name)}")

    @property
    def kept(self) -> float:
        """Stored over plain weight bytes."""
        return sum(self.live) / len(self.live)

    @property
    def is_plain(self) -> bool:
        """Whether an ordinary table would do."""
        return self == TableFootprint()

    def chunks_of(self, dim: int, first: int, columns: int) -> slice | None:
        """Chunks of a column part; None if there can be no such part.

        Args:
            dim: Columns of the table.
            first: First column of the part.
            columns: Columns of the part.

        Example:
            >>> TableFootprint(live=(1.0, 0.5)).chunks_of(dim=8, first=4, columns=4)
            slice(1, 2, None)
        """
        if len(self.live) == 1 and self.prefix:
            return slice(0, 1)  # a table that is not cut into chunks may be sharded between any columns
        width = dim // len(self.live)
        if first % width or columns % width or (columns < dim and not self.prefix):
            return None
        return slice(first // width, (first + columns) // width)

    def stored(self, rows: int, first_row: int, part_rows: int, chunks: slice) -> tuple[float, ...]:
        """Share of the rows of a part that store each of its chunks, at most.

        A run starts with the rows that come first, as if ids were numbered by falling frequency, and where they are,
        it stays so: a part of the first rows then holds the wide ones. Elsewhere stored rows spread evenly. The larger
        of both is returned, so that either fits. Likewise for parts of the columns: as many rows as can store the
        part's last chunk are taken to store it.

        Args:
            rows: Rows of the table.
            first_row: First row of the part.
            part_rows: Rows of the part.
            chunks: From :meth:`chunks_of`.

        Example:
            >>> halved = TableFootprint(live=(0.5,))
            >>> halved.stored(100, 0, 50, slice(0, 1)), halved.stored(100, 50, 50, slice(0, 1))
            ((1.0,), (0.5,))
        """
        if part_rows == 0:
            return tuple(0.0 for _ in self.live[chunks])
        shares = self.live[chunks]
        if len(shares) < len(self.live):
            shares = tuple(max(share, min(1.0, sum(self.live) / chunks.stop)) for share in shares)
        return tuple(max(share, min(1.0, max(0.0, (share * rows - first_row) / part_rows))) for share in shares)

    def read(self, rows: int, chunks: slice) -> float:
        """Share of the columns of a part that a lookup finds stored, on average under Zipf's law.

        Pruning keeps frequent rows wide, so that lookups read far more than :attr:`kept` of a plain table's bytes.

        Args:
            rows: Rows of the table.
            chunks: From :meth:`chunks_of`.

        Example:
            >>> footprint = TableFootprint(live=(0.9, 0.3, 0.1, 0.1))
            >>> round(footprint.read(1_000_000, slice(0, 4)), 2)
            0.9
        """
        shares = self.live[chunks]
        return sum(harmonic(share * rows) for share in shares) / (len(shares) * harmonic(rows))

    def beside(self, other: TableFootprint) -> TableFootprint:
        """The footprint of a table on which two methods work, of which at most one removes weights.

        Raises:
            ValueError: If both remove weights.

        Example:
            >>> TableFootprint(live=(0.5,), row_bytes=2).beside(TableFootprint(row_bytes=1)).row_bytes
            3.0
        """
        if self.kept < 1 and other.kept < 1:
            raise ValueError("two methods remove weights of the same table, which cannot be planned")
        owner = self if self.kept < 1 or len(self.live) > 1 else other
        return replace(
            owner,
            row_bytes=float(self.row_bytes + other.row_bytes),
            state_bytes=float(self.state_bytes + other.state_bytes),
            lookup_bytes=float(self.lookup_bytes + other.lookup_bytes),
            serving_bits=min(self.serving_bits, other.serving_bits),
            prefix=self.prefix and other.prefix,
        )


def harmonic(n: float) -> float:
    """Harmonic number, extended to what is not whole; linear below 1.

    Example:
        >>> round(harmonic(4), 3), harmonic(0)
        (2.083, 0.0)
    """
    if n < 1:
        return max(0.0, float(n))
    return math.log(n) + EULER + 1 / (2 * n) - 1 / (12 * n * n)


def most_used(
    rows: Sequence[int], chunk_bytes: Sequence[Sequence[float]], budget: float, falloff: float
) -> list[tuple[float, ...]]:
    r"""Shares of rows that store each chunk when the most used chunks of all tables are kept.

    Chunk c of the row of rank r in a table of R rows is worth :math:`f^c / (r H_R)`: Zipf's law, one lookup per
    sample and table, each further chunk worth f times the one before. One threshold serves all tables.

    Args:
        rows: Rows of each table.
        chunk_bytes: Bytes that each chunk of a row costs, per table.
        budget: Bytes to spend.
        falloff: The factor f, over 0 and at most 1.

    Returns:
        Shares per table, first chunk first.

    Example:
        >>> [(first, second)] = most_used([1000], [(16, 16)], budget=16_000, falloff=0.25)
        >>> round(first, 3), round(second, 3)
        (0.8, 0.2)
        >>> most_used([10], [(4,)], budget=100, falloff=1.0)
        [(1.0,)]
    """
    scale = [1 / harmonic(n) for n in rows]

    def shares(log_threshold: float) -> list[tuple[float, ...]]:
        threshold = math.exp(log_threshold)
        return [
            tuple(min(1.0, falloff**c * s / (threshold * n)) for c in range(len(costs)))
            for n, s, costs in zip(rows, scale, chunk_bytes, strict=True)
        ]

    def cost(kept: list[tuple[float, ...]]) -> float:
        return sum(
            n * sum(share * size for share, size in zip(table, costs, strict=True))
            for n, table, costs in zip(rows, kept, chunk_bytes, strict=True)
        )

    everything = [tuple(1.0 for _ in costs) for costs in chunk_bytes]
    if cost(everything) <= budget:
        return everything
    low, high = -100.0, 10.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(shares(middle)) > budget else (low, middle)
    return shares(high)

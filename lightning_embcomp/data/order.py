"""The order in which an epoch goes through the rows, a function of seed and epoch alone."""

import numpy as np


class RowOrder:
    """Order of the rows in one epoch.

    With ``shuffle``, blocks of neighbouring rows are put in random order and rows are then mixed within windows of
    several blocks. So reading stays local, and memory stays small, however many rows there are; up to
    ``window_rows`` rows the order is a uniformly random permutation.

    Args:
        num_rows: Rows in all.
        seed: Seed of the order.
        epoch: Epoch, from 0.
        shuffle: Whether to shuffle; otherwise rows come in the order of the data, every epoch the same.
        block_rows: Rows of a block.
        window_rows: Rows to mix, rounded down to whole blocks.

    Example:
        >>> order = RowOrder(5, seed=0, epoch=0, shuffle=True)
        >>> sorted(order.rows(0, 5).tolist())
        [0, 1, 2, 3, 4]
    """

    def __init__(
        self,
        num_rows: int,
        *,
        seed: int,
        epoch: int,
        shuffle: bool,
        block_rows: int = 4096,
        window_rows: int = 1 << 20,
    ) -> None:
        """Draw the order of the blocks."""
        self._num_rows = num_rows
        self._shuffle = shuffle
        if not shuffle:
            return
        self._seed = (seed, epoch)
        self._block_rows = block_rows
        self._blocks = np.random.default_rng((*self._seed, 0)).permutation(-(-num_rows // block_rows))
        sizes = np.minimum(block_rows, num_rows - self._blocks * block_rows)
        self._per_window = max(1, window_rows // block_rows)
        # The short last block of the data can be anywhere, so that windows differ in size.
        self._starts = np.concatenate([[0], np.cumsum(sizes)])[:: self._per_window]
        if (len(self._blocks)) % self._per_window:
            self._starts = np.append(self._starts, num_rows)
        self._cached: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def rows(self, begin: int, end: int) -> np.ndarray:
        """Rows at the places ``begin`` to ``end`` (exclusive) of the epoch, int64."""
        if not self._shuffle:
            return np.arange(begin, end, dtype=np.int64)
        parts = []
        window = int(np.searchsorted(self._starts, begin, side="right")) - 1
        while begin < end:
            start, stop = int(self._starts[window]), int(self._starts[window + 1])
            parts.append(self._window(window)[begin - start : min(end, stop) - start])
            begin = min(end, stop)
            window += 1
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def _window(self, index: int) -> np.ndarray:
        if self._cached[0] != index:
            blocks = self._blocks[index * self._per_window : (index + 1) * self._per_window].astype(np.int64)
            rows = (blocks[:, None] * self._block_rows + np.arange(self._block_rows)).reshape(-1)
            rows = rows[rows < self._num_rows]
            np.random.default_rng((*self._seed, 1 + index)).shuffle(rows)
            self._cached = (index, rows)
        return self._cached[1]

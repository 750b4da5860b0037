"""Frequency-aware SGD in NumPy, on one dense table, written from the formulas alone."""

from collections.abc import Sequence

import numpy as np


class NumpySGD:
    """One table of rows, float64.

    Args:
        weight: ``(R, D)``.
        lr: Rate before multipliers.
        form: ``running``, ``horizon`` or ``known``.
        counted: ``presence`` or ``occurrence``.
        half_life: Steps, or None.
        horizon: Steps of the run.
        frequency: Lookups per step of each row, for ``known``.
        cap: Largest rate.
    """

    def __init__(
        self,
        weight: np.ndarray,
        *,
        lr: float,
        form: str = "running",
        counted: str = "presence",
        half_life: float | None = None,
        horizon: float = 1.0,
        frequency: np.ndarray | None = None,
        cap: float = np.inf,
    ) -> None:
        self.weight = weight.astype(np.float64).copy()
        self.lr, self.form, self.counted, self.half_life = lr, form, counted, half_life
        self.horizon, self.frequency, self.cap = horizon, frequency, cap
        self.count = np.zeros(len(weight))
        self.t = 0

    def step(self, ids: Sequence[int], grads: np.ndarray) -> None:
        """Update with one gradient per occurrence."""
        self.t += 1
        if self.half_life is not None:
            self.count *= 0.5 ** (1 / self.half_life)
        for row in sorted(set(ids)):
            self.count[row] += list(ids).count(row) if self.counted == "occurrence" else 1
            summed = sum(grads[i] for i in range(len(ids)) if ids[i] == row)
            if self.form == "running":
                multiplier = 1 / np.sqrt(self.count[row])
            elif self.form == "horizon":
                multiplier = np.sqrt(self.t / (self.horizon * self.count[row]))
            else:
                assert self.frequency is not None
                multiplier = 1 / np.sqrt(self.horizon * self.frequency[row])
            self.weight[row] -= min(self.cap, self.lr * multiplier) * summed

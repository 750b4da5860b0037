"""EC, EF21 and EControl written down in NumPy for all workers at once, with the exact largest entries as compressor."""

from __future__ import annotations

import numpy as np


def top(message: np.ndarray, count: int) -> np.ndarray:
    """Message with all but its largest entries set to zero."""
    kept = np.zeros_like(message)
    chosen = np.argsort(-np.abs(message), kind="stable")[:count]
    kept[chosen] = message[chosen]
    return kept


class NumpyFeedback:
    """Error feedback of all workers for one parameter, in float64.

    Args:
        workers: How many.
        numel: Entries of the parameter.
        kind: Kind of error feedback.
        count: Entries that each sends.
        eta: Of EControl.
        momentum: Of EF21 and EControl: what is kept of the running mean of gradients, once that has as many.
    """

    def __init__(self, workers: int, numel: int, kind: str, count: int, eta: float, momentum: float = 0.0) -> None:
        self.kind, self.count, self.eta, self.momentum = kind, count, eta, momentum
        self.seen = 0
        self.v = np.zeros((workers, numel))
        self.e = np.zeros((workers, numel))
        self.h = np.zeros((workers, numel))

    def step(self, gradients: np.ndarray) -> np.ndarray:
        """Direction of a step from the gradients of all workers, ``(workers, numel)``."""
        sent = np.empty_like(gradients)
        if self.kind in ("ef21", "econtrol"):
            self.seen += 1
            new = max(1.0 - self.momentum, 1.0 / self.seen)
            self.v = (1.0 - new) * self.v + new * gradients
            gradients = self.v
        for i, g in enumerate(gradients):
            if self.kind == "none":
                sent[i] = top(g, self.count)
            elif self.kind == "ec":
                f = g + self.e[i]
                sent[i] = top(f, self.count)
                self.e[i] = f - sent[i]
            elif self.kind == "ef21":
                sent[i] = top(g - self.h[i], self.count)
                self.h[i] += sent[i]
            else:
                delta = top(self.eta * self.e[i] + g - self.h[i], self.count)
                self.e[i] += g - self.h[i] - delta
                self.h[i] += delta
        return self.h.mean(0) if self.kind in ("ef21", "econtrol") else sent.mean(0)

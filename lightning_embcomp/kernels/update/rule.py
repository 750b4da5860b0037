"""The optimizers that the kernels know, with their rates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class UpdateRule:
    """An optimizer and its rates.

    Args:
        kind: ``sgd``, ``rowwise_adagrad`` or ``adagrad``.
        learning_rate: Step size.
        eps: Added to the root of the state.
    """

    kind: Literal["sgd", "rowwise_adagrad", "adagrad"]
    learning_rate: float
    eps: float = 1e-8

"""The optimizers that the kernels know, with their rates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

UpdateKind = Literal[
    "sgd", "rowwise_adagrad", "adagrad", "adam", "lamb", "partial_rowwise_adam", "partial_rowwise_lamb"
]
KIND_NUMBERS = {kind: number for number, kind in enumerate(get_args(UpdateKind))}
"""What the kernels call the optimizers; those from 3 on have two moments, those from 5 on the second one per row."""
FIRST_WITH_MOMENTS, FIRST_BY_ROW = 3, 5


@dataclass(frozen=True, kw_only=True)
class UpdateRule:
    """An optimizer and its rates.

    Args:
        kind: ``sgd``, ``rowwise_adagrad``, ``adagrad``, ``adam``, ``lamb``, ``partial_rowwise_adam`` or
            ``partial_rowwise_lamb``.
        learning_rate: Step size.
        eps: Added to the root of the state.
        beta1: Share of the first moment that a step keeps.
        beta2: Share of the second moment that a step keeps.
        weight_decay: Share of a weight that is added to its step; for optimizers with two moments.
        stochastic_rounding: Whether float16 weights are rounded up or down at random, so that the expectation is exact.

    Example:
        >>> UpdateRule(kind="adam", learning_rate=0.1, beta1=0.5, beta2=0.75).corrections(2)
        (0.75, 0.4375)
    """

    kind: UpdateKind
    learning_rate: float
    eps: float = 1e-8
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0
    stochastic_rounding: bool = False

    @property
    def number(self) -> int:
        """What the kernels call the optimizer."""
        return KIND_NUMBERS[self.kind]

    @property
    def has_moments(self) -> bool:
        """Whether it keeps a first and a second moment."""
        return self.number >= FIRST_WITH_MOMENTS

    def corrections(self, step: int) -> tuple[float, float]:
        """What moments that began at zero are divided by after so many steps."""
        return 1.0 - self.beta1**step, 1.0 - self.beta2**step

    def numbers(self, step: int) -> tuple[float, ...]:
        """What the kernels need in a step: eps, shares kept and added of both moments, factors of both, decay."""
        first, second = self.corrections(step)
        shares = (self.beta1, 1.0 - self.beta1, self.beta2, 1.0 - self.beta2)
        return self.eps, *shares, 1.0 / first, 1.0 / second, self.weight_decay

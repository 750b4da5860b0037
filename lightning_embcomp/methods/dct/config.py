"""Settings of gradient thresholding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

FeedbackKind = Literal["ec", "ef21", "econtrol", "none"]
ValueType = Literal["fp32", "fp16", "bf16"]
FEEDBACK_KINDS: tuple[str, ...] = get_args(FeedbackKind)
_WITH_ESTIMATE = ("ef21", "econtrol")
VALUE_TYPES: tuple[str, ...] = get_args(ValueType)


@dataclass(frozen=True, kw_only=True)
class ErrorFeedback:
    """What becomes of the gradient entries that are not sent.

    Args:
        kind: ``ec`` adds them to the next gradient. ``ef21`` sends changes of the gradient instead, which the receivers
            add up. ``econtrol`` does both, for workers whose data differ. ``none`` drops them.
        momentum: ``ef21`` and ``econtrol`` only: what takes the place of the gradient is a running mean in which each
            step keeps this share of the old one [1]_. An entry of the estimate stays for about 1 / density steps, and
            with it the noise of the batch that it was taken from; by default the mean is over as many, 1 - density. 0
            takes the gradient itself.
        eta: ``econtrol`` only: share of the residual that is sent per step; a quarter of the density by default.
        allow_large_eta: Take an ``eta`` above the density, with which residuals can grow without end.

    References:
        .. [1] Momentum provably improves error feedback, https://arxiv.org/abs/2305.15155
    """

    kind: FeedbackKind = "ec"
    momentum: float | None = None
    eta: float | None = None
    allow_large_eta: bool = False

    def __post_init__(self) -> None:
        if self.kind not in FEEDBACK_KINDS:
            raise ValueError(f"kind must be one of {', '.join(map(repr, FEEDBACK_KINDS))}, not {self.kind!r}")
        if self.momentum is not None:
            if self.kind not in _WITH_ESTIMATE:
                raise ValueError(
                    f"momentum has no effect with kind={self.kind!r}: leave it out, or use kind='ef21' or 'econtrol'"
                )
            if not 0 <= self.momentum < 1:
                raise ValueError(f"momentum must be at least 0 and below 1, not {self.momentum}")
        if self.eta is not None:
            if self.kind != "econtrol":
                raise ValueError(f"eta has no effect with kind={self.kind!r}: leave it out, or use kind='econtrol'")
            if not 0 < self.eta <= 1:
                raise ValueError(f"eta must be over 0 and at most 1, not {self.eta}")
        elif self.allow_large_eta:
            raise ValueError("allow_large_eta has no effect without eta")

    def kept(self, density: float) -> float:
        """Share that each step keeps of the running mean of gradients.

        Args:
            density: Share of the entries that is sent.

        Returns:
            ``momentum``, 0 for kinds without an estimate.

        Example:
            >>> ErrorFeedback(kind="ef21").kept(density=0.01), ErrorFeedback(kind="ec").kept(density=0.01)
            (0.99, 0.0)
        """
        if self.kind not in _WITH_ESTIMATE:
            return 0.0
        return 1.0 - density if self.momentum is None else self.momentum

    def gain(self, density: float) -> float:
        """Share of the residual in a message.

        Args:
            density: Share of the entries that is sent.

        Returns:
            ``eta`` for ``econtrol``, otherwise 1.

        Raises:
            ValueError: If ``eta`` is above the density and that was not asked for.

        Example:
            >>> ErrorFeedback(kind="econtrol").gain(density=0.01)
            0.0025
        """
        if self.kind != "econtrol":
            return 1.0
        if self.eta is None:
            return density / 4
        if self.eta > density and not self.allow_large_eta:
            raise ValueError(
                f"eta={self.eta:g} is above the density {density:g}: residuals can grow without end. Use about"
                f" {density / 4:g}, or set allow_large_eta=True"
            )
        return self.eta


@dataclass(frozen=True, kw_only=True)
class ThresholdSettings:
    """When thresholds are computed, and what happens when they no longer fit.

    Args:
        life_span: Steps for which a threshold is kept at most.
        samples: Entries of a parameter that a threshold is estimated from; smaller parameters are taken whole.
        drift: A threshold that selects more than this many times the wanted entries, or fewer than the wanted entries
            divided by it, is replaced before its life span ends.
        max_overshoot: By default, of more entries than wanted the largest are sent, exactly as many as wanted. With a
            number, all of them are, up to this many times the wanted ones; where there are more on any worker, that
            step is exchanged densely.
    """

    life_span: int = 1000
    samples: int = 100_000
    drift: float = 1.5
    max_overshoot: float | None = None

    def __post_init__(self) -> None:
        if self.life_span < 1:
            raise ValueError(f"life_span must be at least 1 step, not {self.life_span}")
        if self.samples < 1000:
            raise ValueError(f"samples must be at least 1000 for a usable estimate, not {self.samples}")
        if not self.drift > 1:
            raise ValueError(f"drift must be over 1, not {self.drift}")
        if self.max_overshoot is not None and not self.max_overshoot > 1:
            raise ValueError(f"max_overshoot must be over 1, or None for no overshoot, not {self.max_overshoot}")


def check_density(density: float) -> None:
    """Raise unless the density is a share of entries.

    Raises:
        ValueError: With what to write instead.

    Example:
        >>> check_density(5)
        Traceback (most recent call last):
            ...
        ValueError: density must be over 0 and at most 1, not 5; for 5 % write 0.05
    """
    if not 0 < density <= 1:
        hint = f"; for {density:g} % write {density / 100:g}" if 1 < density <= 100 else ""
        raise ValueError(f"density must be over 0 and at most 1, not {density}{hint}")

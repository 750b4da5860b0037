"""Settings of frequency-aware learning rates."""

from __future__ import annotations

from typing import Literal

Form = Literal["running", "horizon", "known"]
Backend = Literal["lean", "fbgemm"]
FORMS = ("running", "horizon", "known")
BACKENDS = ("lean", "fbgemm")

FROM_DATAMODULE = "datamodule"
"""Value of ``frequencies`` that asks the trainer's data module."""


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise unless the value is one of the choices.

    Raises:
        ValueError: With the choices.
    """
    if value not in choices:
        raise ValueError(f"FrequencyAwareLR: {name} must be one of {', '.join(map(repr, choices))}, not {value!r}")


def check_positive(name: str, value: float | None) -> None:
    """Raise unless the value is positive or None.

    Raises:
        ValueError: Otherwise.
    """
    if value is not None and not value > 0:
        raise ValueError(f"FrequencyAwareLR: {name} must be positive, not {value}")

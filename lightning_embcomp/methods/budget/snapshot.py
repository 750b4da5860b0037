"""A copy of everything that a step may spoil, in host memory, and the way back to it."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, Protocol

import torch
from torch import Tensor, nn

_RATE = "engine.rate"


class RoundingState(Protocol):
    """Widths of some tables."""

    bits: Tensor

    def fix(self, bits: Tensor) -> None:
        """Settle the width of every group."""


class RoundingTraining(Protocol):
    """What trains the steps of rounded tables."""

    @property
    def states(self) -> Sequence[Any]:
        """State of each collection."""

    @property
    def searching(self) -> bool:
        """Whether widths are still to be chosen."""

    def state_dict(self) -> dict[str, Any]:
        """State of its optimizers."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take such a state."""


def take(
    module: nn.Module, optimizers: Sequence[torch.optim.Optimizer], training: RoundingTraining | None
) -> dict[str, Any]:
    """Copy tables with their fused optimizer state, utilities and counters, the dense part, and all optimizer state.

    Args:
        module: The model.
        optimizers: Optimizers of its parameters.
        training: What trains the rounding of its tables; None for none.

    Returns:
        The copy, of tensors and plain values only, so that a checkpoint can hold it.
    """
    return {
        "module": {key: _copied(value) for key, value in module.state_dict().items()},
        "optimizers": [_copied(optimizer.state_dict()) for optimizer in optimizers],
        "bits": [] if training is None else [_copied(state.bits) for state in training.states],
        "rounding": None if training is None else _copied(training.state_dict()),
    }


def put_back(
    module: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    training: RoundingTraining | None,
    saved: dict[str, Any],
) -> None:
    """Bring all that :func:`take` copied back; learning rates and other settings of optimizers stay as they are now.

    Args:
        module: The model.
        optimizers: Optimizers of its parameters.
        training: What trains the rounding of its tables.
        saved: What :func:`take` returned; it may be put back again.
    """
    if training is not None:
        # Before rows move: those of groups without bits would be refused their storage.
        for state, bits in zip(training.states, saved["bits"], strict=True):
            state.fix(bits)
    rates = {key: value for key, value in module.state_dict().items() if key.endswith(_RATE)}
    # Loading marks what it has read in the dict that it is given.
    module.load_state_dict({**saved["module"], **{key: value.clone() for key, value in rates.items()}})
    for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict({**_copied(state), "param_groups": optimizer.state_dict()["param_groups"]})
    if training is not None:
        training.load_state_dict(_copied(saved["rounding"]))


def nbytes(saved: object) -> int:
    """Bytes of the tensors of a copy.

    Example:
        >>> nbytes({"a": torch.zeros(4), "b": [torch.zeros(2, dtype=torch.int64)]})
        32
    """
    if isinstance(saved, Tensor):
        return saved.nbytes
    if isinstance(saved, dict):
        return sum(nbytes(value) for value in saved.values())
    return sum(nbytes(value) for value in saved) if isinstance(saved, list | tuple) else 0


def _copied(value: Any) -> Any:  # noqa: ANN401 - any part of a state dict
    if isinstance(value, Tensor):
        return value.detach().clone() if value.device.type == "cpu" else value.detach().cpu()
    if isinstance(value, dict):
        return {key: _copied(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(entry) for entry in value)
    return deepcopy(value)

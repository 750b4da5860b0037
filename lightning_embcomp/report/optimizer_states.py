"""Find the state of embedding parameters among the optimizer states of a checkpoint.

A checkpoint numbers the parameters of an optimizer and does not name them, but state tensors have the shape of their
parameter, or one number per row of it. Two parameters of one shape in one optimizer have equally many bytes of state,
so that it does not matter which is which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class StateSize:
    """Optimizer state of one parameter of shape ``(rows, width)``, single numbers such as ``step`` left out.

    Args:
        per_row: Bytes that a row has, whatever its width.
        per_weight: Bytes that a weight has.

    Example:
        >>> StateSize(per_row=4, per_weight=8).bytes(rows=10, width=16)
        1320
    """

    per_row: int = 0
    per_weight: int = 0

    def bytes(self, rows: int, width: int) -> int:
        """Bytes of the state of that many rows."""
        return rows * self.per_row + rows * width * self.per_weight


def state_size(tensors: Sequence[Tensor], shape: tuple[int, int]) -> StateSize | None:
    """Size per row and per weight of state tensors, None if they belong to a parameter of another shape.

    Args:
        tensors: State of one parameter; tensors without dimensions are ignored.
        shape: Rows and width of the parameter.

    Returns:
        The size; None also if nothing is left.
    """
    per_row = per_weight = 0
    for tensor in tensors:
        if tensor.dim() == 0:
            continue
        if tuple(tensor.shape) == shape:
            per_weight += tensor.element_size()
        elif tuple(tensor.shape) in ((shape[0],), (shape[0], 1)):
            per_row += tensor.element_size()
        else:
            return None
    return StateSize(per_row, per_weight) if per_row or per_weight else None


class OptimizerStates:
    """The states of all parameters in the optimizers of a checkpoint; each can be given out once.

    Args:
        saved: ``optimizer_states`` of a Lightning checkpoint, or None.

    Example:
        >>> import torch
        >>> adam = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(5, 4), "exp_avg_sq": torch.zeros(5, 4)}
        >>> OptimizerStates([{"state": {0: adam}, "param_groups": []}]).take([(5, 4)])
        [StateSize(per_row=0, per_weight=8)]
    """

    def __init__(self, saved: Any) -> None:  # noqa: ANN401 - whatever a checkpoint holds
        self._states: list[list[Tensor]] = []
        for optimizer in saved if isinstance(saved, list) else []:
            states = optimizer.get("state") if isinstance(optimizer, Mapping) else None
            for state in states.values() if isinstance(states, Mapping) else []:
                if isinstance(state, Mapping):
                    self._states.append([value for value in state.values() if isinstance(value, Tensor)])

    def take(self, shapes: Sequence[tuple[int, int]]) -> list[StateSize] | None:
        """Give out the states of parameters that are trained together.

        Args:
            shapes: Rows and width of each parameter; those without rows have no bytes of state.

        Returns:
            State of each parameter; None if any of them with rows has none, so that the parameters are not trained by
            these optimizers, or are trained without state.
        """
        left = list(self._states)
        sizes: list[StateSize] = []
        for shape in shapes:
            if 0 in shape:
                sizes.append(StateSize())
                continue
            for i, tensors in enumerate(left):
                size = state_size(tensors, shape)
                if size is not None:
                    sizes.append(size)
                    del left[i]
                    break
            else:
                return None
        self._states = left
        return sizes

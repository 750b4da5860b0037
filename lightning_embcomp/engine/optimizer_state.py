"""Carry the state of the user's optimizers along when rows of a parameter move."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from lightning_embcomp.engine.row_class import Storage, TrainedRows


class UnmovableStateError(RuntimeError):
    """An optimizer keeps state whose shape does not tell which row it belongs to."""


def attach(classes: Sequence[TrainedRows], optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Register the optimizer state of each class as companions, so that the next move takes it along.

    A class that no batch has reached so far has no state, or less than its siblings; it gets what it lacks from one
    that has all of it, zero for every row, so that rows which move in keep theirs.

    Raises:
        UnmovableStateError: If a state tensor is neither per weight, nor per row, nor a single number.
    """
    for optimizer in optimizers:
        mine = [
            rows for rows in classes if any(rows.parameter is p for g in optimizer.param_groups for p in g["params"])
        ]
        template = max(mine, key=lambda rows: len(optimizer.state.get(rows.parameter, ())), default=None)
        if template is None or not optimizer.state.get(template.parameter):
            continue
        for rows in mine:
            _check(rows, optimizer.state.get(rows.parameter, {}))
        for rows in mine:
            state = optimizer.state[rows.parameter]
            for key, value in optimizer.state[template.parameter].items():
                if key not in state:
                    state[key] = _empty_like(value, template, rows)
            for key, value in optimizer.state[rows.parameter].items():
                if _is_per_row(value):
                    rowwise = value.shape != rows.parameter.shape
                    rows.companions[key] = Storage(value.reshape(-1) if rowwise else value, rowwise=rowwise)


def detach(classes: Sequence[TrainedRows], optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Give the moved state back to the optimizers."""
    for optimizer in optimizers:
        for rows in classes:
            state = optimizer.state.get(rows.parameter) or {}
            for key, storage in rows.companions.items():
                if key in state:
                    one_column = storage.rowwise and state[key].dim() == 2
                    state[key] = storage.tensor.unsqueeze(1) if one_column else storage.tensor
    for rows in classes:
        rows.companions = {}


def _is_per_row(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.dim() > 0


def _check(rows: TrainedRows, state: Mapping[str, object]) -> None:
    for key, value in state.items():
        if _is_per_row(value) and value.shape not in (rows.parameter.shape, (rows.rows,), (rows.rows, 1)):
            raise UnmovableStateError(
                f"optimizer state {key!r} of shape {tuple(value.shape)} belongs to a table parameter of shape"
                f" {tuple(rows.parameter.shape)}; only state per weight, per row or a single number can follow rows"
                " that move. Use another optimizer for the embedding tables, or leave them out of the callback"
            )


def _empty_like(value: object, template: TrainedRows, rows: TrainedRows) -> object:
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value.clone() if isinstance(value, Tensor) else value
    if value.shape == template.parameter.shape:
        return value.new_zeros(rows.rows, rows.width)
    return value.new_zeros(rows.rows, *value.shape[1:])

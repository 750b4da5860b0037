"""State of dense optimizers by parameter name, so that it fits any number of processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.optim.fused import FusedOptimizer
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper, OptimizerWrapper

from lightning_embcomp.checkpoints.slices import Slices
from lightning_embcomp.strategies.errors import ShardingError
from lightning_embcomp.strategies.weights import Piece, local_pieces


@dataclass(frozen=True, kw_only=True)
class TablePlace:
    """Where the local part of a sharded table, a parameter, lies in the whole table.

    Args:
        shape: Shape of the whole table.
        pieces: The parts in the order in which their rows follow each other in the parameter; none where this process
            holds no row of the table.
    """

    shape: torch.Size
    pieces: list[Piece]

    def slices(self, value: Tensor, name: str) -> Slices:
        """See a state tensor of the parameter as parts of that of the whole table.

        Args:
            value: Either of the parameter's shape, or with one value for each row.
            name: For errors.

        Raises:
            ShardingError: If it has another shape, or holds one value per row and the table is cut by columns.
        """
        rows = sum(part.shape[0] for _, part in self.pieces)
        if value.dim() == 0 or value.shape[0] != rows or (value.dim() > 1 and not self._fits(value)):
            raise ShardingError(
                f"the optimizer's state {name} of shape {tuple(value.shape)} has no place in a table of shape"
                f" {tuple(self.shape)}: checkpoints take state with one value per weight or per row"
            )
        elementwise = self._elementwise(value)
        if not elementwise and any(offsets[1] for offsets, _ in self.pieces):
            raise ShardingError(
                f"the optimizer's state {name} has one value per row, and its table is cut by columns: shard it"
                " table_wise or row_wise"
            )
        blocks, first = [], 0
        for offsets, part in self.pieces:
            block = value[first : first + part.shape[0]]
            blocks.append((offsets[: value.dim()] if elementwise else (offsets[0],) + (0,) * (value.dim() - 1), block))
            first += part.shape[0]
        whole = tuple(self.shape) if elementwise else (self.shape[0], *value.shape[1:])
        return Slices(whole, blocks, dtype=value.dtype)

    @property
    def _columns(self) -> int:
        return self.pieces[0][1].shape[1] if self.pieces else self.shape[1]

    def _elementwise(self, value: Tensor) -> bool:
        return value.dim() == 2 and value.shape[1] == self._columns

    def _fits(self, value: Tensor) -> bool:
        return self._elementwise(value) or value.shape[1:].numel() == 1

    def local_shape(self, whole: torch.Size) -> torch.Size:
        """Shape of the local part of a state tensor.

        Args:
            whole: Its shape for the whole table.
        """
        rows = sum(part.shape[0] for _, part in self.pieces)
        if whole == self.shape:
            return torch.Size((rows, self._columns))
        return torch.Size((rows, *whole[1:]))


def table_places(modules: Mapping[str, nn.Module]) -> dict[str, TablePlace]:
    """Places of the local parts of all sharded tables, by parameter name.

    Args:
        modules: Sharded collections by path. Those that save themselves are left out.
    """
    places: dict[str, TablePlace] = {}
    for path, module in modules.items():
        if hasattr(module, "distributed_state"):
            continue
        for key, tensor in module.state_dict().items():
            pieces = local_pieces(tensor)
            if type(tensor) is not Tensor and len(tensor.size()) == 2:
                places[f"{path}.{key}"] = TablePlace(shape=tensor.size(), pieces=pieces)
    return places


def plain_parts(optimizers: Iterable[torch.optim.Optimizer]) -> Iterator[tuple[str, torch.optim.Optimizer]]:
    """Optimizers of PyTorch inside those of ``configure_optimizers``, with a name for each.

    Args:
        optimizers: Optimizers, also TorchRec's, which combine and wrap others. Fused ones are left out.

    Example:
        >>> sgd = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
        >>> [name for name, _ in plain_parts([sgd])]
        ['0']
    """
    for i, optimizer in enumerate(optimizers):
        yield from _parts(str(i), optimizer)


def _parts(name: str, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.optim.Optimizer]]:
    if isinstance(optimizer, CombinedOptimizer):
        for j, (_, part) in enumerate(optimizer.optimizers):
            yield from _parts(f"{name}.{j}", part)
    elif isinstance(optimizer, OptimizerWrapper | KeyedOptimizerWrapper):
        yield from _parts(name, optimizer._optimizer)
    elif not isinstance(optimizer, FusedOptimizer):
        yield name, optimizer


def save_state(
    optimizer: torch.optim.Optimizer, names: Mapping[int, str], places: Mapping[str, TablePlace]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Take an optimizer's state apart.

    Args:
        optimizer: An optimizer of PyTorch.
        names: Names of parameters, by ``id``.
        places: Places of sharded tables, by parameter name.

    Returns:
        Tensors by ``parameter/state``, and everything else: settings of the groups, and state that is no tensor.

    Raises:
        ShardingError: If a parameter is not one of the module, or its state does not fit its table.

    Example:
        >>> weight = nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> tensors, rest = save_state(optimizer, {id(weight): "w"}, {})
        >>> tensors, rest["groups"][0]["params"]
        ({'w/momentum_buffer': tensor([1., 1.])}, ['w'])
    """
    tensors: dict[str, Any] = {}
    values: dict[str, dict[str, Any]] = {}
    for parameter, state in optimizer.state.items():
        if id(parameter) not in names:
            raise ShardingError(
                f"{type(optimizer).__name__} holds state for something that is no parameter of the module: it cannot"
                " be saved by name"
            )
        name = names[id(parameter)]
        for key, value in state.items():
            if not isinstance(value, Tensor):
                values.setdefault(name, {})[key] = value
            elif name in places and value.dim():
                tensors[f"{name}/{key}"] = places[name].slices(value, f"{name}/{key}")
            else:
                tensors[f"{name}/{key}"] = value
    groups = [
        {**group, "params": [names.get(id(parameter), "") for parameter in group["params"]]}
        for group in optimizer.param_groups
    ]
    return tensors, {"groups": groups, "values": values}


def load_state(
    optimizer: torch.optim.Optimizer,
    names: Mapping[int, str],
    state: Mapping[str, Mapping[str, Any]],
    groups: Iterable[Mapping[str, Any]],
) -> None:
    """Put state back.

    Args:
        optimizer: An optimizer of PyTorch.
        names: Names of parameters, by ``id``.
        state: Local state by parameter name; parameters without an entry start anew.
        groups: Settings of the groups, in order.

    Raises:
        ShardingError: If there is another number of groups.
    """
    saved = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    if len(saved) != len(optimizer.param_groups):
        raise ShardingError(
            f"the checkpoint's {type(optimizer).__name__} has {len(saved)} parameter groups, configure_optimizers makes"
            f" {len(optimizer.param_groups)}: build the optimizer as in the run that was saved"
        )
    found: dict[int, Mapping[str, Any]] = {}
    new_groups: list[dict[str, Any]] = []
    number = 0
    for settings, group in zip(saved, optimizer.param_groups, strict=True):
        numbers = []
        for parameter in group["params"]:
            name = names.get(id(parameter), "")
            if name in state:
                found[number] = state[name]
            numbers.append(number)
            number += 1
        new_groups.append({**settings, "params": numbers})
    optimizer.load_state_dict({"state": found, "param_groups": new_groups})


def relink(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Let TorchRec's wrappers see the state that the optimizers inside them have now.

    Args:
        optimizers: Optimizers of ``configure_optimizers``.
    """
    for optimizer in optimizers:
        if isinstance(optimizer, CombinedOptimizer):
            relink([part for _, part in optimizer.optimizers])
        elif isinstance(optimizer, OptimizerWrapper | KeyedOptimizerWrapper):
            inner: KeyedOptimizer | torch.optim.Optimizer = optimizer._optimizer
            relink([inner])
            optimizer.state, optimizer.param_groups = inner.state, inner.param_groups

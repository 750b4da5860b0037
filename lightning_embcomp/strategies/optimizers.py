"""Optimizers beside tables that are trained inside the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from lightning.pytorch.core.module import LightningModule
from lightning.pytorch.plugins import Precision
from torch import nn
from torchrec.optim.fused import FusedOptimizer, FusedOptimizerModule
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, OptimizerWrapper

from lightning_embcomp.strategies.errors import ShardingError


def is_fused(parameter: nn.Parameter) -> bool:
    """Whether a parameter is updated inside the backward pass."""
    return bool(getattr(parameter, "_in_backward_optimizers", None))


def drop_fused_parameters(optimizers: Iterable[torch.optim.Optimizer], fused: Iterable[nn.Parameter]) -> None:
    """Take parameters of fused tables out of optimizers, which would keep state for them and may decay them.

    ``configure_optimizers`` may so give ``self.parameters()`` to its optimizer, sharded or not.

    Args:
        optimizers: Optimizers of ``configure_optimizers``; groups keep their place, if need be empty.
        fused: The parameters.

    Raises:
        ShardingError: If an optimizer runs the closure several times per step.

    Example:
        >>> table, dense = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))
        >>> optimizer = torch.optim.SGD([table, dense], lr=0.1)
        >>> drop_fused_parameters([optimizer], [table])
        >>> [p.numel() for p in optimizer.param_groups[0]["params"]]
        [3]
    """
    drop = {id(parameter) for parameter in fused}
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.LBFGS) and drop:
            raise ShardingError(
                "LBFGS runs the backward pass several times per step, and fused tables would be updated every time:"
                " choose another optimizer"
            )
        if isinstance(optimizer, KeyedOptimizer):
            continue  # of TorchRec; it skips parameters without gradients, and is keyed by name
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in drop]


def step_after_closure(
    precision: Precision, optimizer: KeyedOptimizer, model: LightningModule, closure: Callable[[], Any]
) -> Any:  # noqa: ANN401 - whatever the closure returns
    """Run the closure once, then step.

    TorchRec's optimizers hand the closure to each of their parts, or to none: a training step would run several times,
    or never.

    Args:
        precision: The trainer's precision plugin.
        optimizer: An optimizer of TorchRec.
        model: The module.
        closure: Forward and backward pass.

    Returns:
        What the closure returns.
    """
    result = precision._wrap_closure(model, optimizer, closure)
    optimizer.step()
    return result


class FusedRates:
    """Brings learning rates of fused optimizers to their tables before the step that uses them.

    TorchRec pushes a rate in ``step()``, which comes after the tables have been updated, and FBGEMM notes it in the
    forward pass: a scheduled rate would be one step late.

    Args:
        optimizers: Fused optimizers; several may stand for the same tables, and the one that changes counts.
    """

    def __init__(self, optimizers: Iterable[FusedOptimizer]) -> None:
        unique = {id(optimizer): optimizer for optimizer in optimizers}
        self._pushed = [(optimizer, _rates(optimizer)) for optimizer in unique.values()]

    def push(self) -> None:
        """Push the rates that have changed."""
        for i, (optimizer, pushed) in enumerate(self._pushed):
            rates = _rates(optimizer)
            if rates != pushed:
                optimizer.step()
                self._pushed[i] = (optimizer, rates)


def _rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def fused_optimizers(
    modules: Iterable[nn.Module], optimizers: Iterable[torch.optim.Optimizer]
) -> Iterator[FusedOptimizer]:
    """Find the fused optimizers of sharded modules, and those inside optimizers of ``configure_optimizers``.

    Args:
        modules: Sharded collections.
        optimizers: Optimizers that may combine others.
    """
    for module in modules:
        if isinstance(module, FusedOptimizerModule):
            yield from _parts(module.fused_optimizer)
        for parameter in module.parameters():
            for optimizer in getattr(parameter, "_in_backward_optimizers", ()):
                yield from _parts(optimizer)
    for optimizer in optimizers:
        yield from _parts(optimizer)


def _parts(optimizer: torch.optim.Optimizer) -> Iterator[FusedOptimizer]:
    if isinstance(optimizer, CombinedOptimizer):
        for _, part in optimizer.optimizers:
            yield from _parts(part)
    elif isinstance(optimizer, OptimizerWrapper):
        yield from _parts(optimizer._optimizer)
    elif isinstance(optimizer, FusedOptimizer) and optimizer.param_groups:
        yield optimizer

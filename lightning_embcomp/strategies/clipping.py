"""Clip gradients by their norm over all processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.types import ShardingPlan, ShardingType


@torch.no_grad()
def clip_grad_norm(
    sharded: Iterable[nn.Parameter], replicated: Iterable[nn.Parameter], max_norm: float, device: torch.device
) -> Tensor:
    r"""Scale gradients so that their norm over all processes is at most ``max_norm``.

    The norm is that of one process that holds everything: squares of sharded gradients are summed over processes,
    those of replicated ones, equal everywhere, count once. All processes call this.

    Args:
        sharded: Parameters of which every process holds other parts.
        replicated: Parameters of which every process holds all, with averaged gradients.
        max_norm: Largest norm allowed.
        device: Device for the sum over processes.

    Returns:
        The norm before clipping, a scalar.
    """
    mine = [p.grad for p in sharded if p.grad is not None]
    common = [p.grad for p in replicated if p.grad is not None]
    total = _squares(mine, device)
    dist.all_reduce(total)
    norm = (total + _squares(common, device)).sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in (*mine, *common):
        gradient.mul_(scale.to(gradient.device, gradient.dtype))
    return norm


def spread_parameters(modules: Mapping[str, nn.Module], plan: ShardingPlan | None) -> set[int]:
    """Parameters of which every process holds other parts, by ``id``.

    Args:
        modules: Sharded collections, by path.
        plan: Their plan; tables with copies on all processes are left out.
    """
    spread: set[int] = set()
    for path, module in modules.items():
        module_plan: Any = (plan.get_plan_for_module(path) if plan is not None else None) or {}
        for name, parameter in module.named_parameters():
            choice = module_plan.get(name.split(".")[-2])
            if choice is None or choice.sharding_type != ShardingType.DATA_PARALLEL.value:
                spread.add(id(parameter))
    return spread


def _squares(gradients: Iterable[Tensor], device: torch.device) -> Tensor:
    total = torch.zeros((), dtype=torch.float32, device=device)
    for gradient in gradients:
        total += gradient.float().square().sum().to(device)
    return total

"""Copies of tables that start equal on all processes."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_embcomp.engine.host import EngineHost
from lightning_embcomp.engine.router import slabs


@torch.no_grad()
def from_first(host: EngineHost, weight: Tensor) -> Tensor:
    """Take the whole table of process 0 over; all processes call it.

    Every process built a table of its own, with other random numbers unless all were seeded alike.

    Args:
        host: Module that is to hold copies of the table.
        weight: The table ``(R, D)`` of this process, which is left as it is on process 0 and overwritten on others.

    Returns:
        The table of process 0.
    """
    weight = weight.detach()
    for start, stop in slabs(weight.shape[0]) if host.group.size > 1 else ():
        rows = host.group.broadcast(weight[start:stop].contiguous(), source=0)
        if host.group.rank:
            weight[start:stop] = rows
    return weight

"""The processes that the tables of a module are spread over, and what methods need of them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class Group:
    """One process that holds all tables.

    Example:
        >>> Group().sum(torch.ones(2)).tolist()
        [1.0, 1.0]
    """

    rank: int = 0
    size: int = 1

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the processes; the given tensor may be overwritten."""
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """Tensors of one shape of all processes, stacked by rank."""
        return tensor.unsqueeze(0)

    def gather_uneven(self, tensor: Tensor) -> list[Tensor]:
        """Tensors of all processes that may differ in their first dimension, by rank."""
        return [tensor]

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        """The tensor of one rank; of the same shape everywhere, overwritten on the others."""
        return tensor


class ProcessGroup(Group):
    """Processes that communicate; all of them must make the same calls in the same order.

    Args:
        group: PyTorch's process group.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def sum(self, tensor: Tensor) -> Tensor:
        """See :meth:`Group.sum`."""
        dist.all_reduce(tensor, group=self._group)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """See :meth:`Group.gather`."""
        found = tensor.new_empty(self.size, *tensor.shape)
        dist.all_gather(list(found.unbind()), tensor.contiguous(), group=self._group)
        return found

    def gather_uneven(self, tensor: Tensor) -> list[Tensor]:
        """See :meth:`Group.gather_uneven`."""
        sizes = self.gather(torch.tensor([tensor.shape[0]], device=tensor.device)).flatten().tolist()
        padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
        padded[: tensor.shape[0]] = tensor
        return [part[:size] for part, size in zip(self.gather(padded), sizes, strict=True)]

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        """See :meth:`Group.broadcast`."""
        dist.broadcast(tensor, group_src=source, group=self._group)
        return tensor

"""The processes that the tables of a module are spread over, and what methods need of them."""

from __future__ import annotations

from collections.abc import Sequence

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

    def gather_uneven(self, tensor: Tensor, sizes: Sequence[int] | None = None) -> list[Tensor]:
        """Tensors of all processes that may differ in their first dimension, by rank.

        Args:
            tensor: That of this process.
            sizes: First dimensions by rank where they are known; otherwise the host waits for them.
        """
        return [tensor]

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        """The tensor of one rank; of the same shape everywhere, overwritten on the others."""
        return tensor


class ProcessGroup(Group):
    """Processes that communicate; all of them must make the same calls in the same order.

    Tensors may be on any device: those that the processes cannot exchange where they are, such as host memory over
    NCCL, travel through the device of the process.

    Args:
        group: PyTorch's process group.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self._device_types = device_types(group)

    def _exchangeable(self, tensor: Tensor) -> Tensor:
        if tensor.device.type in self._device_types:
            return tensor
        return tensor.to(torch.device("cuda", torch.cuda.current_device()))

    def sum(self, tensor: Tensor) -> Tensor:
        """See :meth:`Group.sum`."""
        sent = self._exchangeable(tensor)
        dist.all_reduce(sent, group=self._group)
        return tensor if sent is tensor else tensor.copy_(sent)

    def gather(self, tensor: Tensor) -> Tensor:
        """See :meth:`Group.gather`."""
        sent = self._exchangeable(tensor).contiguous()
        found = sent.new_empty(self.size, *sent.shape)
        dist.all_gather(list(found.unbind()), sent, group=self._group)
        return found.to(tensor.device)

    def gather_uneven(self, tensor: Tensor, sizes: Sequence[int] | None = None) -> list[Tensor]:
        """See :meth:`Group.gather_uneven`."""
        if sizes is None:
            sizes = self.gather(torch.tensor([tensor.shape[0]], device=tensor.device)).flatten().tolist()
        padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
        padded[: tensor.shape[0]] = tensor
        return [part[:size] for part, size in zip(self.gather(padded), sizes, strict=True)]

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        """See :meth:`Group.broadcast`."""
        sent = self._exchangeable(tensor)
        dist.broadcast(sent, group_src=source, group=self._group)
        return tensor if sent is tensor else tensor.copy_(sent)


def device_types(group: dist.ProcessGroup | None = None) -> set[str]:
    """Types of device whose tensors some processes can exchange: gloo takes host memory too, NCCL does not.

    Args:
        group: PyTorch's process group; all processes by default.
    """
    return {pair.partition(":")[0] for pair in dist.get_backend_config(group).split(",")}

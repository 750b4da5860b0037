"""Small tensors of the host on their way to a GPU."""

from __future__ import annotations

import torch
from torch import Tensor


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the host on a device, by way of pinned memory, so that the host does not wait for a GPU.

    Args:
        tensor: In host memory.
        device: Where it goes.

    Example:
        >>> on_device(torch.tensor([1, 2]), torch.device("cpu"))
        tensor([1, 2])
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

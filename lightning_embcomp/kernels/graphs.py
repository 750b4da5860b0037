"""CUDA graphs: what a captured graph reads must still be there when it runs."""

from __future__ import annotations

from typing import Final

import torch

_kept: Final[list[object]] = []


def capturing(device: torch.device) -> bool:
    """Whether what is launched now becomes part of a CUDA graph instead of running.

    Example:
        >>> capturing(torch.device("cpu"))
        False
    """
    return device.type == "cuda" and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def keep_for_graph(value: object, device: torch.device) -> None:
    """Keep small tensors of a cache for good if a graph is being captured: its kernels have their addresses.

    Args:
        value: Whatever holds the tensors.
        device: Where they are.
    """
    if capturing(device):
        _kept.append(value)

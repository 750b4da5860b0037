"""Selection in plain PyTorch: the definition that the fast paths are tested against."""

from __future__ import annotations

import torch
from torch import Tensor

_MAGNITUDE = 0x7FFFFFFF


def top_entries(rows: Tensor, kept: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Plain twin of :func:`lightning_embcomp.kernels.topk.top_entries`."""
    width = rows.shape[1]
    magnitude = (rows.detach().contiguous().view(torch.int32) & _MAGNITUDE).long()
    # One integer per entry, no two of a row equal: PyTorch promises no order among ties.
    key = magnitude * width + torch.arange(width - 1, -1, -1, device=rows.device)
    positions = torch.topk(key, kept, dim=1, sorted=False).indices.sort(dim=1).values
    return positions.to(dtype), rows.detach().gather(1, positions)


def place_entries(positions: Tensor, values: Tensor, width: int) -> Tensor:
    """Plain twin of :func:`lightning_embcomp.kernels.topk.place_entries`."""
    columns = positions.long()
    if positions.device.type == "cpu" and ((columns < 0) | (columns >= width)).any():
        raise ValueError(f"positions of entries must be from 0 to {width - 1}")
    rows = torch.zeros(positions.shape[0], width, dtype=values.dtype, device=values.device)
    return rows.scatter_(1, columns, values)

"""What every lookup asks of bag boundaries: kernels read memory by them without another look."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lightning_embcomp.kernels.route.watch import report_later


def check_extent(indices: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Make sure that bag boundaries go through all ids of a batch in order.

    The host does not wait for a GPU to know: there, boundaries that do not are mended, so that no kernel leaves its
    tensors, and a later lookup raises.

    Args:
        indices: Logical ids ``(N,)``.
        offsets: Bag boundaries, int32 or int64 ``(bags + 1,)``.
        weights: Per-sample weights ``(N,)``, or None.

    Returns:
        The boundaries to use.

    Raises:
        ValueError: If boundaries do not begin at 0, fall, or do not end at N, or there is not a weight for every id.

    Example:
        >>> check_extent(torch.arange(6), torch.tensor([0, 5, 2, 6]))
        Traceback (most recent call last):
        ValueError: offsets must not fall: bag 1 goes from 5 to 2
    """
    if weights is not None and weights.shape != indices.shape:
        raise ValueError(
            f"per_sample_weights of shape {tuple(weights.shape)} do not match ids of shape {tuple(indices.shape)}"
        )
    if offsets.device.type == "cuda":
        return _mended(offsets, indices.numel())
    first, last = int(offsets[0]), int(offsets[-1])
    if (first, last) != (0, indices.numel()):
        raise ValueError(
            f"offsets go from {first} to {last}, but must go from 0 to {indices.numel()}, the number of ids"
        )
    bounds = offsets.numpy()  # NumPy takes a third to a half of PyTorch's time for so little work
    falls = bounds[1:] < bounds[:-1]
    if falls.any():
        bag = int(falls.argmax())
        raise ValueError(f"offsets must not fall: bag {bag} goes from {bounds[bag]} to {bounds[bag + 1]}")
    return offsets


def _mended(offsets: Tensor, ids: int) -> Tensor:
    """Boundaries that stay inside and do not fall, and a report of those that were not like that."""
    mended = offsets.clamp(0, ids).cummax(0).values
    wrong = (mended != offsets).sum() + (offsets.select(0, 0) != 0) + (offsets.select(0, -1) != ids)
    report_later(wrong.view(1), partial(_raise_for, offsets, ids))
    return mended


def _raise_for(offsets: Tensor, ids: int, wrong: int) -> None:
    if wrong:
        check_extent(torch.empty(ids, dtype=torch.uint8), offsets.cpu())
        raise ValueError("offsets have changed while a lookup was using them")

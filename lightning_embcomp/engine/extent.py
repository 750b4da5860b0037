"""What every lookup asks of bag boundaries: kernels read memory by them without another look."""

from __future__ import annotations

from torch import Tensor


def check_extent(indices: Tensor, offsets: Tensor, weights: Tensor | None = None) -> None:
    """Raise unless bag boundaries go through all ids of a batch in order.

    Args:
        indices: Logical ids ``(N,)``.
        offsets: Bag boundaries, int32 or int64 ``(bags + 1,)``.
        weights: Per-sample weights ``(N,)``, or None.

    Raises:
        ValueError: If boundaries do not begin at 0, fall, or do not end at N, or there is not a weight for every id.

    Example:
        >>> import torch
        >>> check_extent(torch.arange(6), torch.tensor([0, 5, 2, 6]))
        Traceback (most recent call last):
        ValueError: offsets must not fall: bag 1 goes from 5 to 2
    """
    first, last = int(offsets[0]), int(offsets[-1])
    if (first, last) != (0, indices.numel()):
        raise ValueError(
            f"offsets go from {first} to {last}, but must go from 0 to {indices.numel()}, the number of ids"
        )
    bounds = offsets.cpu().numpy()  # NumPy takes a third to a half of PyTorch's time for so little work
    falls = bounds[1:] < bounds[:-1]
    if falls.any():
        bag = int(falls.argmax())
        raise ValueError(f"offsets must not fall: bag {bag} goes from {bounds[bag]} to {bounds[bag + 1]}")
    if weights is not None and weights.shape != indices.shape:
        raise ValueError(
            f"per_sample_weights of shape {tuple(weights.shape)} do not match ids of shape {tuple(indices.shape)}"
        )

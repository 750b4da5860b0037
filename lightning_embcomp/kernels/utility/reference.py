"""Accumulation and decay of utilities in plain PyTorch.

The occurrences of one row are summed in float32 first and rounded once, while the CPU kernel rounds after every
occurrence: both have the same expectation, and agree to bfloat16 precision where a row occurs once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_embcomp.kernels.types import BagLayout

SAMPLE_STRIDE = 0x61C88647
"""Keeps the random bits of one row in different samples of a batch apart."""
_SLAB = 1 << 20  # values at a time: the random bits take eight bytes each


def hash_bits(seed: int, position: Tensor) -> Tensor:
    """16 pseudo-random bits per position.

    Args:
        seed: Any integer.
        position: int64 tensor.

    Returns:
        int64 tensor of the same shape, from 0 to 65535.
    """
    mixed = (position * 0x9E3779B1 + (seed & 0xFFFFFFFF) * 0x85EBCA6B) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 15)) * 0x2C1B3C6D) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 12)) * 0x297A2D39) & 0xFFFFFFFF
    return (mixed ^ (mixed >> 15)) & 0xFFFF


def round_stochastically(value: Tensor, random_bits: Tensor) -> Tensor:
    """Round non-negative float32 to bfloat16, up with the probability of the part cut off.

    Example:
        >>> value = torch.tensor([1.0 + 2**-8])
        >>> [round_stochastically(value, torch.tensor([bits])).item() for bits in (0, 0xFFFF)]
        [1.0, 1.0078125]
    """
    bits = value.contiguous().view(torch.int32).long() + random_bits
    return (bits >> 16).to(torch.int16).view(torch.bfloat16)


def accumulate_utility(
    utility: Tensor,
    row_start: Tensor,
    indices: Tensor,
    offsets: Tensor,
    layout: BagLayout,
    norms: Tensor,
    weights: Tensor | None,
    kind: str,
    seed: int,
    number: Tensor,
) -> None:
    """Plain twin of :func:`lightning_embcomp.kernels.utility.accumulate_utility`."""
    bag = torch.repeat_interleave(torch.arange(offsets.numel() - 1, device=indices.device), offsets.long().diff())
    feature = torch.searchsorted(layout.bag_start[1:], bag, right=True)
    rows = row_start[layout.table[feature]] + indices.long()
    gain = norms[bag]
    if weights is not None:
        gain = gain * weights.detach().float().abs().unsqueeze(1)
    if kind == "frequency":
        gain = torch.ones_like(gain)
    unique, inverse = torch.unique(rows, return_inverse=True)
    before = utility[unique].float()
    if kind == "peak_gradient":
        after = before.scatter_reduce(0, inverse.unsqueeze(1).expand_as(gain), gain, "amax")
        utility[unique] = after.to(torch.bfloat16)
        return
    after = before.index_add(0, inverse, gain)
    first = torch.full_like(unique, rows.numel()).scatter_reduce(
        0, inverse, torch.arange(rows.numel(), device=rows.device), "amin"
    )
    parts = utility.shape[1]
    sample = (bag - layout.bag_start[feature])[first]
    position = (number[layout.table[feature]] + indices.long())[first].unsqueeze(1) * parts
    position = position + torch.arange(parts, device=rows.device) + sample.unsqueeze(1) * SAMPLE_STRIDE
    utility[unique] = round_stochastically(after, hash_bits(seed, position))


def decay_utility(values: Tensor, factor: float, seed: int, first: int = 0) -> None:
    """Plain twin of :func:`lightning_embcomp.kernels.utility.decay_utility`."""
    flat = values.view(-1)
    for start in range(0, flat.numel(), _SLAB):
        part = flat[start : start + _SLAB]
        position = torch.arange(first + start, first + start + part.numel(), device=values.device)
        # As a tensor: a Python float would be multiplied in double precision on some devices.
        scaled = part.float() * torch.tensor(factor, dtype=torch.float32, device=values.device)
        part.copy_(round_stochastically(scaled, hash_bits(seed, position)))

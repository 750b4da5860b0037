"""Integers of b bits, packed without gaps, least significant bit first."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_SLAB = 1 << 20
"""Values handled at a time; a multiple of 8, so that every slab ends on a byte."""


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Pack integers below :math:`2^b`.

    Args:
        values: uint8, any shape.
        bits: Width b, 1 to 8.

    Returns:
        uint8 tensor of ``ceil(n * bits / 8)`` bytes.

    Example:
        >>> pack_bits(torch.tensor([1, 2, 3, 0], dtype=torch.uint8), 2)
        tensor([57], dtype=torch.uint8)
    """
    flat = values.reshape(-1).contiguous().numpy()
    if bits == 8:
        return torch.from_numpy(flat.copy())
    packed = np.empty(packed_bytes(flat.size, bits), np.uint8)
    for start in range(0, flat.size, _SLAB):
        part = flat[start : start + _SLAB]
        spread = np.unpackbits(part[:, None], axis=1, count=bits, bitorder="little")
        first = start * bits // 8
        packed[first : first + packed_bytes(part.size, bits)] = np.packbits(spread, bitorder="little")
    return torch.from_numpy(packed)


def unpack_bits(packed: Tensor, count: int, bits: int) -> Tensor:
    """Read packed integers back.

    Args:
        packed: What :func:`pack_bits` returned.
        count: How many there are.
        bits: Their width.

    Returns:
        uint8 tensor of shape ``(count,)``.

    Raises:
        ValueError: If there are too few or too many bytes.

    Example:
        >>> unpack_bits(torch.tensor([57], dtype=torch.uint8), 4, 2)
        tensor([1, 2, 3, 0], dtype=torch.uint8)
    """
    if packed.numel() != packed_bytes(count, bits):
        raise ValueError(f"{count} values of {bits} bits take {packed_bytes(count, bits)} bytes, not {packed.numel()}")
    flat = packed.contiguous().numpy()
    if bits == 8:
        return torch.from_numpy(flat.copy())
    values = np.empty(count, np.uint8)
    for start in range(0, count, _SLAB):
        number = min(_SLAB, count - start)
        first = start * bits // 8
        part = flat[first : first + packed_bytes(number, bits)]
        spread = np.unpackbits(part, count=number * bits, bitorder="little").reshape(number, bits)
        values[start : start + number] = np.packbits(spread, axis=1, bitorder="little")[:, 0]
    return torch.from_numpy(values)


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that many packed integers take.

    Example:
        >>> packed_bytes(3, 3)
        2
    """
    return -(-count * bits // 8)

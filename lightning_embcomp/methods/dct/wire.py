"""Bytes of a thresholded bucket: 16-bit positions within blocks of 65 536, how many each block has, and values.

``counts (int32, one for each block) | values (fp32, fp16 or bf16) | low halves of the positions (int16)``, padded to a
multiple of :data:`ALIGNMENT`. Values of fp16 share a power of two, such that the largest is near the top of the range:
small gradients do not underflow, large ones do not overflow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_embcomp.methods.dct.config import ValueType

ALIGNMENT = 8
_BLOCK = 1 << 16
_TOP_EXPONENT = 15
"""Largest values of fp16 are below 2 to this power, half of what it can hold."""
_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A message of one worker.

    Attributes:
        data: uint8 ``(bytes,)``.
        values: What receivers will read, float32 ``(k,)``.
        exponent: Power of two that the receivers multiply by.
    """

    data: Tensor
    values: Tensor
    exponent: int


def encoded_bytes(entries: int, numel: int, value_type: ValueType) -> int:
    """Bytes of a message.

    Args:
        entries: Entries that are sent.
        numel: Entries of the bucket.
        value_type: Type of the values.

    Example:
        >>> encoded_bytes(10_000, 1_000_000, "fp32")
        60064
    """
    size = 4 * _blocks(numel) + entries * (2 + _TYPES[value_type].itemsize)
    return -(-size // ALIGNMENT) * ALIGNMENT


def encode(indices: Tensor, values: Tensor, numel: int, value_type: ValueType, exponent: int | None = None) -> Encoded:
    """Pack entries of a bucket.

    Args:
        indices: Positions in the bucket, int32 ``(k,)``, rising.
        values: float32 ``(k,)``, finite.
        numel: Entries of the bucket.
        value_type: Type of the values on the wire.
        exponent: Result of :func:`shared_exponent`, where it is known: finding it waits for the device.

    Example:
        >>> message = encode(torch.tensor([2, 70_000], dtype=torch.int32), torch.tensor([1.5, -2.0]), 70_001, "fp16")
        >>> message.data.numel(), decode(message.data, 2, 70_001, "fp16", message.exponent)
        (16, (tensor([    2, 70000]), tensor([ 1.5000, -2.0000])))
    """
    if exponent is None:
        exponent = 0
        if value_type == "fp16" and values.numel():
            exponent = math.frexp(float(values.abs().max()))[1] - _TOP_EXPONENT
    sent = _scaled(values, -exponent).to(_TYPES[value_type])
    borders = torch.arange(1, _blocks(numel) + 1, device=indices.device) * _BLOCK
    ends = torch.searchsorted(indices.long(), borders)
    counts = torch.diff(ends, prepend=ends.new_zeros(1)).to(torch.int32)
    lows = ((indices << 16) >> 16).to(torch.int16)  # the shifts carry the sign, so that nothing is cut
    data = torch.zeros(encoded_bytes(values.numel(), numel, value_type), dtype=torch.uint8, device=values.device)
    start = 0
    for part in (counts, sent, lows):
        raw = part.contiguous().view(torch.uint8)
        data[start : start + raw.numel()] = raw
        start += raw.numel()
    return Encoded(data=data, values=_scaled(sent.float(), exponent), exponent=exponent)


def shared_exponent(largest: Tensor, entries: Tensor, value_type: ValueType) -> Tensor:
    """Power of two that the values of a message share, without waiting for the device.

    Args:
        largest: Largest magnitude of the values, float32.
        entries: How many there are.
        value_type: Type of the values on the wire.

    Returns:
        int32, of the shape of ``largest``.

    Example:
        >>> shared_exponent(torch.tensor(3.0), torch.tensor(1), "fp16")
        tensor(-13, dtype=torch.int32)
    """
    if value_type != "fp16":
        return torch.zeros_like(largest, dtype=torch.int32)
    return torch.where(entries > 0, torch.frexp(largest).exponent - _TOP_EXPONENT, 0)


def decode(data: Tensor, entries: int, numel: int, value_type: ValueType, exponent: int) -> tuple[Tensor, Tensor]:
    """Unpack a message.

    Args:
        data: uint8, starting at a multiple of :data:`ALIGNMENT`; what follows the message is not read.
        entries: Entries of the message.
        numel: Entries of the bucket.
        value_type: Type of the values.
        exponent: Power of two to multiply by.

    Returns:
        Positions, int64 ``(entries,)``, and values, float32 ``(entries,)``.
    """
    kind = _TYPES[value_type]
    blocks = _blocks(numel)
    first, second = 4 * blocks, 4 * blocks + kind.itemsize * entries
    counts = data[:first].view(torch.int32)
    values = data[first:second].view(kind).float()
    lows = data[second : second + 2 * entries].view(torch.int16)
    block = torch.repeat_interleave(torch.arange(blocks, device=data.device), counts, output_size=entries)
    return block * _BLOCK + (lows.long() & (_BLOCK - 1)), _scaled(values, exponent)


def _blocks(numel: int) -> int:
    return -(-numel // _BLOCK)


def _scaled(values: Tensor, exponent: int) -> Tensor:
    """Multiply by a power of two that may itself be outside the range of float32."""
    return values if exponent == 0 else (values.double() * 2.0**exponent).float()

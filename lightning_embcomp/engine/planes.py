"""Codes of rows as bit planes: a block of 64 rows is one 64-bit word per bit of a code, row by row from the lowest."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_embcomp.engine.router import BLOCK, slabs


def encode(codes: Tensor, planes: int) -> Tensor:
    """Turn codes into bit planes.

    Args:
        codes: uint8 ``(R,)``.
        planes: Bits of a code, at most 8.

    Returns:
        int64 ``(blocks of 64 rows, planes)``; rows after the last are 0.

    Example:
        >>> encode(torch.tensor([1, 2, 3], dtype=torch.uint8), 2).tolist()
        [[5, 6]]
    """
    words = torch.empty(-(-codes.numel() // BLOCK), planes, dtype=torch.int64)
    for start, stop in slabs(codes.numel()):
        part = torch.zeros(-(-(stop - start) // BLOCK) * BLOCK, dtype=torch.uint8)
        part[: stop - start] = codes[start:stop]
        for plane in range(planes):
            bits = (part >> plane & 1).view(-1, 8) << torch.arange(8, dtype=torch.uint8)
            words[start // BLOCK : -(-stop // BLOCK), plane] = bits.sum(1, dtype=torch.uint8).view(torch.int64)
    return words


def decode(words: Tensor, rows: int) -> Tensor:
    """Turn bit planes back into codes.

    Args:
        words: int64 ``(blocks of 64 rows, planes)``, at most 8 planes; a slab of a table, since every bit becomes a
            number of 8 bytes on the way.
        rows: Rows to return; the rest of the last block is dropped.

    Returns:
        Codes, uint8 ``(rows,)``.

    Example:
        >>> decode(torch.tensor([[5, 6]]), rows=3).tolist()
        [1, 2, 3]
    """
    bits = torch.arange(BLOCK, device=words.device)
    codes = torch.zeros(words.shape[0], BLOCK, dtype=torch.uint8, device=words.device)
    for plane in range(words.shape[1]):
        codes |= ((words[:, plane : plane + 1] >> bits) & 1).to(torch.uint8) << plane
    return codes.flatten()[:rows]

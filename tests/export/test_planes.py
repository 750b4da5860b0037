"""Bit planes of codes against NumPy's packed bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_embcomp.engine import planes
from lightning_embcomp.engine.router import SLAB


@pytest.mark.parametrize("width", [1, 3, 8])
@pytest.mark.parametrize("rows", [1, 64, 200, SLAB + 65])
def test_planes_are_packed_bits(rows: int, width: int) -> None:
    codes = torch.randint(0, 2**width, (rows,), dtype=torch.uint8, generator=torch.Generator().manual_seed(rows))
    words = planes.encode(codes, width)
    blocks = -(-rows // 64)
    assert words.shape == (blocks, width)
    padded = np.zeros(blocks * 64, np.uint8)
    padded[:rows] = codes.numpy()
    for plane in range(width):
        expected = np.packbits(padded >> plane & 1, bitorder="little").view("<i8")
        assert np.array_equal(words[:, plane].numpy(), expected)
    assert torch.equal(planes.decode(words, rows), codes)
    assert planes.decode(words[:0], 0).numel() == 0

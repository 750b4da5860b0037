"""Tensors of which every element is known, for the ranks and for the tests."""

import math
import zlib

import torch

from lightning_embcomp.checkpoints import Slices

ROWS, DIM = (7, 11, 6), 8


def filled(key: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Count up from a number that depends on the key; exact in every dtype used."""
    start = zlib.crc32(key.encode()) % 50
    return (torch.arange(math.prod(shape)) % 100 + start).view(shape).to(dtype)


def whole_slices() -> dict[str, torch.Tensor]:
    """Whole tensors of those that the ranks hold as slices."""
    return {
        "codes": filled("codes", (10, 3), torch.uint8),
        "planes": filled("planes", (4, 6), torch.bfloat16),
        "copied": filled("copied", (5,), torch.int64),
        "alone": filled("alone", (2, 2), torch.float16),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(3.5),
    }


def plain_slices(rank: int, world: int) -> dict[str, Slices]:
    """Uneven parts: several, none, without elements at the same place as another's, and copies."""
    full = whole_slices()
    bounds = {1: [0, 10], 2: [0, 3, 10], 4: [0, 4, 4, 9, 10]}[world]
    rows = slice(bounds[rank], bounds[rank + 1])
    codes = [((rows.start, column), full["codes"][rows, column : column + 1].clone()) for column in range(3)]
    quarters = [((2 * r, 3 * c), full["planes"][2 * r :, 3 * c :][:2, :3].clone()) for r in range(2) for c in range(2)]
    return {
        "codes": Slices((10, 3), codes),
        "planes": Slices((4, 6), quarters[rank::world]),
        "copied": Slices((5,), [((0,), full["copied"].clone())]),
        "alone": Slices((2, 2), [((0, 0), full["alone"].clone())] if rank == world - 1 else []),
        "empty": Slices((0, 4), [((0, 0), full["empty"].clone())]),
        "scalar": Slices((), [((), full["scalar"].clone())]),
    }

"""How a counter is stored, and the random bits of counters that round.

A *log* counter is one byte: code :math:`L` stands for :math:`v_L = (b^L - 1) / (b - 1)`. Adding :math:`w` moves it to
one of the two codes around :math:`v_L + w`, with the probabilities that make the expectation exact [1]_.

References:
    .. [1] R. Morris, Counting large numbers of events in small registers, CACM 21(10), 1978
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

LOG_BASE = 1.075
"""The last of 256 codes stands for 1.36 · 10⁹; the standard error of a large count is √((b - 1) / 2) = 19 %."""
LOG_VALUES = (LOG_BASE ** np.arange(256, dtype=np.float64) - 1.0) / (LOG_BASE - 1.0)
"""The count that each code stands for."""
LAST_CODE = 255
LARGEST_INT = 2**31 - 1

NOT_COUNTED, LOG, INTEGER, REAL = 0, 1, 2, 3
"""Numbers of the encodings: none, uint8 log counter, int32 (saturating), float32."""
ENCODING_OF = {torch.uint8: LOG, torch.int32: INTEGER, torch.float32: REAL}

STEP_FACTOR = 0x9E3779B97F4A7C15
ROW_FACTOR = 0xD1B54A32D192ED03
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB


def log_values(device: torch.device) -> Tensor:
    """:data:`LOG_VALUES` on a device, float64; copied to it once."""
    return torch.from_numpy(LOG_VALUES) if device.type == "cpu" else _log_values(device)


@cache
def _log_values(device: torch.device) -> Tensor:
    return torch.from_numpy(LOG_VALUES).to(device)


def uniform(seed: int, position: Tensor) -> Tensor:
    """Pseudo-random numbers from 0 to below 1, a hash of the seed and the position.

    Args:
        seed: Any integer.
        position: int64 tensor.

    Returns:
        float64 tensor of the same shape.

    Example:
        >>> draws = uniform(3, torch.arange(100_000))
        >>> round(draws.mean().item(), 2), round(draws.var().item() * 12, 2)
        (0.5, 1.0)
    """
    mixed = position * _signed(ROW_FACTOR) + _signed(seed * STEP_FACTOR)
    mixed = (mixed ^ _shift(mixed, 30)) * _signed(MIX_1)
    mixed = (mixed ^ _shift(mixed, 27)) * _signed(MIX_2)
    return _shift(mixed ^ _shift(mixed, 31), 11).double() * 2.0**-53


def round_to_code(value: Tensor, draw: Tensor) -> Tensor:
    """Encode counts in log codes, at random between the two codes around each, so that the expectation is exact.

    Args:
        value: float64, not negative; above the last code's value the last code is taken.
        draw: Numbers from 0 to below 1, of the same shape.

    Returns:
        uint8 tensor of the same shape.

    Example:
        >>> round_to_code(torch.tensor([0.0, 1.0, 1.5, 1.5]).double(), torch.tensor([0.5, 0.9, 0.4, 0.6]).double())
        tensor([0, 1, 2, 1], dtype=torch.uint8)
    """
    values = log_values(value.device)
    low = (torch.searchsorted(values, value.contiguous(), right=True) - 1).clamp(0, LAST_CODE)
    high = (low + 1).clamp(max=LAST_CODE)
    up = draw * (values[high] - values[low]) < value - values[low]
    return torch.where(up, high, low).to(torch.uint8)


def nearest_code(value: Tensor) -> Tensor:
    """Encode counts in the log codes whose values are nearest by ratio; for counts that never move.

    Args:
        value: float64, at least 1.

    Returns:
        uint8 tensor of the same shape, at least 1.
    """
    logs = torch.from_numpy(np.log(LOG_VALUES[1:])).to(value.device)
    return (torch.bucketize(value.log(), (logs[1:] + logs[:-1]) / 2) + 1).to(torch.uint8)


def decode(stored: Tensor) -> Tensor:
    """The counts that stored counters stand for, float64."""
    if stored.dtype == torch.uint8:
        return log_values(stored.device)[stored.long()]
    return stored.double()


def _signed(value: int) -> int:
    """The low 64 bits as PyTorch's int64 holds them."""
    low = value & (2**64 - 1)
    return low - 2**64 if low >= 2**63 else low


def _shift(value: Tensor, bits: int) -> Tensor:
    """Logical shift to the right."""
    return (value >> bits) & (2 ** (64 - bits) - 1)

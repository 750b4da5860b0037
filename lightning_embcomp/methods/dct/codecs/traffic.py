"""Count what codecs hand to the collectives."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes that this process handed to one collective in one direction, so far.

    They include what a process hands to itself: of W processes each keeps about one W-th, which crosses no wire.

    Args:
        encoded: Bytes as encoded.
        dense: Bytes of the same tensors in float32.
        exchanges: Number of collectives.
    """

    encoded: int = 0
    dense: int = 0
    exchanges: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            encoded=self.encoded + other.encoded,
            dense=self.dense + other.dense,
            exchanges=self.exchanges + other.exchanges,
        )


class TrafficMeter:
    """Adds up :class:`Traffic`.

    Example:
        >>> import torch
        >>> meter = TrafficMeter()
        >>> meter.count(torch.zeros(8), torch.zeros(3, dtype=torch.uint8))
        >>> meter.read()
        Traffic(encoded=3, dense=32, exchanges=1)
    """

    def __init__(self) -> None:
        self.reset()

    def count(self, dense: Tensor, encoded: Tensor) -> None:
        """Add one exchange."""
        self._dense += dense.numel() * 4
        self._encoded += encoded.numel() * encoded.element_size()
        self._exchanges += 1

    def read(self) -> Traffic:
        """Totals since construction or the last reset."""
        return Traffic(encoded=self._encoded, dense=self._dense, exchanges=self._exchanges)

    def reset(self) -> None:
        """Start at zero."""
        self._encoded = self._dense = self._exchanges = 0

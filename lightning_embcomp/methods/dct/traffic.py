"""Bytes that collectives move per process, and what a step logs."""

from __future__ import annotations

from dataclasses import dataclass


def all_reduce_bytes(size: int, world_size: int) -> int:
    """Bytes that a process sends, and as many that it receives, in a ring all-reduce.

    Example:
        >>> all_reduce_bytes(1000, 2), all_reduce_bytes(1000, 4)
        (1000, 1500)
    """
    return 2 * (world_size - 1) * size // world_size


def all_gather_bytes(size: int, world_size: int) -> int:
    """Bytes that a process sends, and as many that it receives, in an all-gather of ``size`` bytes from each.

    Example:
        >>> all_gather_bytes(1000, 4)
        3000
    """
    return (world_size - 1) * size


@dataclass
class Traffic:
    """What the exchange of the gradients of one or more steps took, on this process.

    Attributes:
        sent: Bytes handed to the others.
        received: Bytes taken from the others.
        dense: Bytes that DDP's all-reduce would have sent, and received.
        entries: Entries of thresholded parameters that were sent.
        numel: Entries of thresholded parameters.
        selection_seconds: Time to choose and pack; for a GPU, until that is queued.
        exchange_seconds: From handing a bucket over until its mean is there, summed over buckets; backward goes on
            meanwhile.
        gradient_norm: Squared norm of the gradients of thresholded parameters, where it was measured.
        unsent_norm: Squared norm of what was left unsent, where it was measured.
    """

    sent: int = 0
    received: int = 0
    dense: int = 0
    entries: int = 0
    numel: int = 0
    selection_seconds: float = 0.0
    exchange_seconds: float = 0.0
    gradient_norm: float = 0.0
    unsent_norm: float = 0.0

    def add(self, other: Traffic) -> None:
        """Add the figures of further steps."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def moved(self, size: int) -> None:
        """Count bytes that went out and came in."""
        self.sent += size
        self.received += size

    def logged(self) -> dict[str, float]:
        """Figures by the name that they are logged under."""
        return {
            "bytes_sent": float(self.sent),
            "bytes_received": float(self.received),
            "dense_bytes": float(self.dense),
            "density": self.entries / self.numel if self.numel else 0.0,
            "residual_ratio": (self.unsent_norm / self.gradient_norm) ** 0.5 if self.gradient_norm else 0.0,
            "selection_seconds": self.selection_seconds,
            "exchange_seconds": self.exchange_seconds,
        }

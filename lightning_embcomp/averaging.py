"""Lightning's callbacks that average parameters, which compressed and sharded tables cannot follow."""

from __future__ import annotations

from lightning.pytorch import callbacks

AVERAGING: tuple[type[callbacks.Callback], ...] = tuple(
    getattr(callbacks, name)
    for name in ("StochasticWeightAveraging", "WeightAveraging")
    if hasattr(callbacks, name)  # the second came with Lightning 2.6
)
"""For ``isinstance``."""

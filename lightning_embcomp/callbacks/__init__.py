"""What a user adds to a ``Trainer``: one callback per method."""

from lightning_embcomp.methods.fiited.callback import DimensionPruning
from lightning_embcomp.methods.fiited.config import Granularity, PruningSchedule

__all__ = ["DimensionPruning", "Granularity", "PruningSchedule"]

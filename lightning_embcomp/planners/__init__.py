"""Sharding plans that know what compressed tables take."""

from lightning_embcomp.planners.callbacks import callback_footprints
from lightning_embcomp.planners.footprint import TableFootprint
from lightning_embcomp.planners.measured import checkpoint_footprints, engine_footprint
from lightning_embcomp.planners.planner import CompressionAwarePlanner, NoPlanError

__all__ = [
    "CompressionAwarePlanner",
    "NoPlanError",
    "TableFootprint",
    "callback_footprints",
    "checkpoint_footprints",
    "engine_footprint",
]

"""What a user adds to a ``Trainer``: one callback per method."""

from lightning_embcomp.engine.counters import CounterSettings
from lightning_embcomp.export.callback import ModelExport
from lightning_embcomp.methods.fiited.callback import DimensionPruning
from lightning_embcomp.methods.fiited.config import Granularity, PruningSchedule
from lightning_embcomp.methods.frequency_lr.callback import FrequencyAwareLR
from lightning_embcomp.methods.mpe.callback import MixedPrecisionSearch
from lightning_embcomp.methods.mpe.config import PrecisionSearch, RowQuantization

__all__ = [
    "CounterSettings",
    "DimensionPruning",
    "FrequencyAwareLR",
    "Granularity",
    "MixedPrecisionSearch",
    "ModelExport",
    "PrecisionSearch",
    "PruningSchedule",
    "RowQuantization",
]

"""What a user adds to a ``Trainer``: one callback per method."""

from lightning_embcomp.callbacks.budget import CompressionBudget
from lightning_embcomp.engine.counters import CounterSettings
from lightning_embcomp.engine.placement import CacheSettings
from lightning_embcomp.export.callback import ModelExport
from lightning_embcomp.methods.budget.config import BudgetControl
from lightning_embcomp.methods.dct.callback import GradientThresholding
from lightning_embcomp.methods.dct.codecs import EmbeddingTrafficMonitor
from lightning_embcomp.methods.dct.config import ErrorFeedback, ThresholdSettings
from lightning_embcomp.methods.fiited.callback import DimensionPruning
from lightning_embcomp.methods.fiited.config import Granularity, PruningSchedule
from lightning_embcomp.methods.frequency_lr.callback import FrequencyAwareLR
from lightning_embcomp.methods.mpe.callback import MixedPrecisionSearch
from lightning_embcomp.methods.mpe.config import PrecisionSearch, RowQuantization
from lightning_embcomp.strategies.resharding import ReshardOnImbalance

__all__ = [
    "BudgetControl",
    "CacheSettings",
    "CompressionBudget",
    "CounterSettings",
    "DimensionPruning",
    "FrequencyAwareLR",
    "EmbeddingTrafficMonitor",
    "ErrorFeedback",
    "GradientThresholding",
    "Granularity",
    "MixedPrecisionSearch",
    "ModelExport",
    "PrecisionSearch",
    "PruningSchedule",
    "ReshardOnImbalance",
    "RowQuantization",
    "ThresholdSettings",
]

"""Embedding compression for recommendation models, inside the training that people already run."""

from lightning_embcomp.stack import check_stack

check_stack()

from lightning_embcomp.callback import CompressionCallback, SetupError  # noqa: E402
from lightning_embcomp.callbacks.budget import CompressionBudget  # noqa: E402
from lightning_embcomp.composition import OwnershipError  # noqa: E402
from lightning_embcomp.deferred import deferred_tables  # noqa: E402
from lightning_embcomp.engine.counters import CounterSettings  # noqa: E402
from lightning_embcomp.engine.placement import CacheSettings  # noqa: E402
from lightning_embcomp.errors import NonFiniteLossError  # noqa: E402
from lightning_embcomp.export.callback import ModelExport  # noqa: E402
from lightning_embcomp.methods.budget.config import BudgetControl  # noqa: E402
from lightning_embcomp.methods.dct.callback import GradientThresholding  # noqa: E402
from lightning_embcomp.methods.dct.codecs import (  # noqa: E402
    EmbeddingTrafficMonitor,
    PooledThresholding,
    comm_codecs,
)
from lightning_embcomp.methods.dct.config import ErrorFeedback, ThresholdSettings  # noqa: E402
from lightning_embcomp.methods.dct.errors import ExchangeError, NonFiniteGradientError  # noqa: E402
from lightning_embcomp.methods.fiited.callback import DimensionPruning  # noqa: E402
from lightning_embcomp.methods.fiited.config import Granularity, PruningSchedule  # noqa: E402
from lightning_embcomp.methods.frequency_lr.callback import FrequencyAwareLR  # noqa: E402
from lightning_embcomp.methods.mpe.callback import MixedPrecisionSearch  # noqa: E402
from lightning_embcomp.methods.mpe.config import PrecisionSearch, RowQuantization  # noqa: E402
from lightning_embcomp.planners import CompressionAwarePlanner, NoPlanError, TableFootprint  # noqa: E402
from lightning_embcomp.strategies import ShardingError, TorchRecStrategy  # noqa: E402
from lightning_embcomp.strategies.resharding import ReshardOnImbalance  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "BudgetControl",
    "CacheSettings",
    "CompressionAwarePlanner",
    "CompressionBudget",
    "CompressionCallback",
    "CounterSettings",
    "DimensionPruning",
    "EmbeddingTrafficMonitor",
    "ErrorFeedback",
    "ExchangeError",
    "FrequencyAwareLR",
    "GradientThresholding",
    "Granularity",
    "MixedPrecisionSearch",
    "ModelExport",
    "NoPlanError",
    "NonFiniteGradientError",
    "NonFiniteLossError",
    "OwnershipError",
    "PooledThresholding",
    "PrecisionSearch",
    "PruningSchedule",
    "ReshardOnImbalance",
    "RowQuantization",
    "SetupError",
    "ShardingError",
    "TableFootprint",
    "ThresholdSettings",
    "TorchRecStrategy",
    "comm_codecs",
    "deferred_tables",
]

"""Embedding compression for recommendation models, inside the training that people already run."""

from lightning_embcomp.stack import check_stack

check_stack()

from lightning_embcomp.callback import CompressionCallback, SetupError  # noqa: E402
from lightning_embcomp.composition import OwnershipError  # noqa: E402
from lightning_embcomp.deferred import deferred_tables  # noqa: E402
from lightning_embcomp.engine.counters import CounterSettings  # noqa: E402
from lightning_embcomp.errors import NonFiniteLossError  # noqa: E402
from lightning_embcomp.export.callback import ModelExport  # noqa: E402
from lightning_embcomp.methods.fiited.callback import DimensionPruning  # noqa: E402
from lightning_embcomp.methods.fiited.config import Granularity, PruningSchedule  # noqa: E402
from lightning_embcomp.methods.frequency_lr.callback import FrequencyAwareLR  # noqa: E402
from lightning_embcomp.methods.mpe.callback import MixedPrecisionSearch  # noqa: E402
from lightning_embcomp.methods.mpe.config import PrecisionSearch, RowQuantization  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "CompressionCallback",
    "CounterSettings",
    "DimensionPruning",
    "FrequencyAwareLR",
    "Granularity",
    "MixedPrecisionSearch",
    "ModelExport",
    "NonFiniteLossError",
    "OwnershipError",
    "PrecisionSearch",
    "PruningSchedule",
    "RowQuantization",
    "SetupError",
    "deferred_tables",
]

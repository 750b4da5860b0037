"""Click logs as batches: real files as they come, and a synthetic log with a known best AUC."""

from lightning_embcomp.data.datamodule import ClickLogDataModule, SyntheticClickLogDataModule
from lightning_embcomp.data.errors import DataFileError, MalformedRowError, TruncatedFileError
from lightning_embcomp.data.loader import BatchLoader
from lightning_embcomp.data.schema import CategoricalFeature, ClickLogSchema, SideTable, Split, TextDialect
from lightning_embcomp.data.synthetic import SyntheticClickLog

__all__ = [
    "BatchLoader",
    "CategoricalFeature",
    "ClickLogDataModule",
    "ClickLogSchema",
    "DataFileError",
    "MalformedRowError",
    "SideTable",
    "Split",
    "SyntheticClickLog",
    "SyntheticClickLogDataModule",
    "TextDialect",
    "TruncatedFileError",
]

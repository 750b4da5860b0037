"""Made-up logs: one in the shape of Criteo's with 10 M rows, 26 categorical features and 5 M ids, and a small one.

Rows of the large one are made once and kept in ``EMBCOMP_CACHE`` (1.6 GB), so that a run does not wait for them.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from benchmarks.datasets import CACHE
from lightning_embcomp.data import SyntheticClickLog, SyntheticClickLogDataModule
from lightning_embcomp.data.batches import Columns, RowSource
from lightning_embcomp.data.schema import Split
from lightning_embcomp.data.splits import Part, part_sizes
from lightning_embcomp.data.synthetic import BLOCK_ROWS

CRITEO = (
    *(1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194),
    *(27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572),
)
"""Ids of the features in Criteo's full log of seven days."""
IDS = 5_000_000


def sizes(total: int = IDS) -> tuple[int, ...]:
    """Criteo's numbers of ids, the five above a million cut in proportion to reach ``total``.

    Example:
        >>> sum(sizes())
        4999996
    """
    large = sum(size for size in CRITEO if size > 10**6)
    rest = total - (sum(CRITEO) - large)
    return tuple(int(size * rest / large) if size > 10**6 else size for size in CRITEO)


def log_of(num_rows: int) -> SyntheticClickLog:
    """What is made up: Zipf ids, a planted logistic model, 95 % of the rows for training."""
    return SyntheticClickLog(
        num_rows=num_rows, num_embeddings=sizes(), num_dense=13, exponent=1.1, validation=0.01, test=0.04
    )


class _Stored:
    """Some rows of the stored arrays, in order."""

    block_rows = window_rows = BLOCK_ROWS

    def __init__(self, columns: Columns, begin: int, num_rows: int) -> None:
        self._columns, self._begin, self.num_rows = columns, begin, num_rows

    def read(self, rows: np.ndarray) -> Columns:
        """Copy rows."""
        found = self._columns.take(rows + self._begin)
        return Columns(dense=found.dense.astype(np.float32), ids=found.ids, bags=(), label=found.label)


class LargeLog(SyntheticClickLogDataModule):
    """The log, read from stored arrays.

    Args:
        num_rows: Rows in all.
        batch_size: Rows per batch.
    """

    def __init__(self, num_rows: int = 10_000_000, batch_size: int = 8192) -> None:
        super().__init__(log_of(num_rows), batch_size=batch_size)
        self.folder = CACHE / f"large-{num_rows}"

    def prepare_data(self) -> None:
        """Make the rows, unless they are there."""
        if (self.folder / "done").exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        rows, features = self.log.num_rows, len(self.log.features)
        kinds = {"dense": (np.float16, (rows, 13)), "ids": (np.int32, (rows, features)), "label": (np.uint8, (rows,))}
        arrays = {
            name: np.lib.format.open_memmap(self.folder / f"{name}.npy", mode="w+", dtype=dtype, shape=shape)
            for name, (dtype, shape) in kinds.items()
        }
        for block in range(-(-rows // BLOCK_ROWS)):
            columns, _ = self.log.block(block)
            span = slice(block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, rows))
            for name, array in arrays.items():
                array[span] = getattr(columns, name)[: span.stop - span.start]
        for array in arrays.values():
            array.flush()
        (self.folder / "done").touch()

    @cached_property
    def _columns(self) -> Columns:
        found = {name: np.load(self.folder / f"{name}.npy", mmap_mode="r") for name in ("dense", "ids", "label")}
        return Columns(dense=found["dense"], ids=found["ids"], bags=(), label=found["label"])

    def id_counts(self, feature_name: str) -> torch.Tensor:
        """How often every id occurs in the training rows, int64 ``(num_embeddings,)``."""
        path: Path = self.folder / f"counts-{feature_name}.npy"
        if not path.exists():
            index = [feature.name for feature in self.features].index(feature_name)
            train = self._part("train").num_rows
            found = np.bincount(self._columns.ids[:train, index], minlength=self.features[index].num_embeddings)
            np.save(path, found.astype(np.int64))
        return torch.from_numpy(np.load(path))

    def _part(self, part: Part) -> RowSource:
        log = self.log
        train, validation, test = part_sizes(log.num_rows, Split(validation=log.validation, test=log.test))
        begin = {"train": 0, "validation": train, "test": train + validation}[part]
        return _Stored(self._columns, begin, {"train": train, "validation": validation, "test": test}[part])


def large(seed: int) -> LargeLog:
    """The made-up log of 10 M rows; every seed sees the same rows in the same order."""
    return LargeLog()


def made_up(seed: int) -> SyntheticClickLogDataModule:
    """200 000 rows of 8 features with 88 250 ids; nothing is stored."""
    return SyntheticClickLogDataModule(SyntheticClickLog(), batch_size=512)

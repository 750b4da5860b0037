"""Where the rows of each feature go in the output of a lookup."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lightning_embcomp.kernels.types import BagLayout


@dataclass(frozen=True)
class FeatureShapes:
    """The features of a lookup, in the order of the batch.

    Args:
        tables: Table of each feature.
        dims: Columns of each feature.
        mean: Whether each feature is averaged.
        device: Of the layouts.

    Example:
        >>> layout = FeatureShapes((0, 0), (4, 4), (False, False)).pooled(3)
        >>> layout.column.tolist(), layout.bag_start.tolist(), layout.shape
        ([0, 4], [0, 3, 6], (3, 8))
    """

    tables: tuple[int, ...]
    dims: tuple[int, ...]
    mean: tuple[bool, ...]
    device: torch.device = torch.device("cpu")

    def pooled(self, batch_size: int) -> BagLayout:
        """Pooled rows, features side by side: ``(B, ΣD)``."""
        features = len(self.dims)
        columns = [sum(self.dims[:f]) for f in range(features)]
        bags = [f * batch_size for f in range(features + 1)]
        return self._layout(bags, [0] * features, columns, (batch_size, sum(self.dims)))

    def sequence(self, ids_per_feature: Sequence[int]) -> BagLayout:
        """Single rows, feature below feature: ``(N, largest D)``."""
        bags = [sum(ids_per_feature[:f]) for f in range(len(ids_per_feature) + 1)]
        return self._layout(bags, bags[:-1], [0] * len(ids_per_feature), (bags[-1], max(self.dims)))

    def _layout(
        self, bag_start: list[int], row_start: list[int], column: list[int], shape: tuple[int, int]
    ) -> BagLayout:
        return BagLayout(
            table=self._tensor(self.tables),
            bag_start=self._tensor(bag_start),
            row_start=self._tensor(row_start),
            column=self._tensor(column),
            width=self._tensor(self.dims),
            mean=self._tensor(self.mean),
            shape=shape,
        )

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor([int(value) for value in values], dtype=torch.int64, device=self.device)


@lru_cache(maxsize=16)
def pooled_layout(shapes: FeatureShapes, batch_size: int) -> BagLayout:
    """:meth:`FeatureShapes.pooled`, made once for each batch size."""
    return shapes.pooled(batch_size)

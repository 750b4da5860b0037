"""Where the rows of each feature go in the output of a lookup."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from lightning_embcomp.kernels.graphs import capturing, keep_for_graph
from lightning_embcomp.kernels.transfer import on_device
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

    def single_rows(self, pooled: BagLayout, offsets: Tensor, ids: int) -> BagLayout:
        """:meth:`sequence` of the ids of a pooled batch; the host need not know how many each feature has.

        Args:
            pooled: Layout of the batch.
            offsets: Bag boundaries.
            ids: Ids of the batch.
        """
        starts = offsets[pooled.bag_start].long()
        return replace(
            pooled,
            bag_start=starts,
            row_start=starts[:-1],
            column=torch.zeros_like(pooled.column),
            shape=(ids, max(self.dims)),
        )

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
        return on_device(torch.tensor([int(value) for value in values], dtype=torch.int64), self.device)


def pooled_layout(shapes: FeatureShapes, batch_size: int) -> BagLayout:
    """:meth:`FeatureShapes.pooled`, made once for each batch size.

    Raises:
        RuntimeError: If a new one is needed while a CUDA graph is captured.
    """
    layout = _pooled_layout(shapes, batch_size)
    keep_for_graph(layout, shapes.device)
    return layout


@lru_cache(maxsize=16)
def _pooled_layout(shapes: FeatureShapes, batch_size: int) -> BagLayout:
    if capturing(shapes.device):
        raise RuntimeError("run a lookup of the same batch size before capturing a CUDA graph")
    return shapes.pooled(batch_size)

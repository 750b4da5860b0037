"""Rows in columns, and batches made of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from lightning_embcomp.data.schema import CategoricalFeature

Batch = tuple[Tensor, KeyedJaggedTensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Bags:
    """The ids of one multi-valued feature.

    Args:
        values: Ids of all rows, one row after the other; an integer type.
        offsets: Where every row starts in ``values``, and the end; int64 of shape ``(rows + 1,)``.
    """

    values: np.ndarray
    offsets: np.ndarray

    def take(self, rows: np.ndarray) -> "Bags":
        """Copy the bags of ``rows`` (int64), in that order."""
        begin = np.asarray(self.offsets[rows])
        lengths = np.asarray(self.offsets[rows + 1]) - begin
        offsets = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        within = np.arange(offsets[-1], dtype=np.int64) - np.repeat(offsets[:-1], lengths)
        return Bags(values=np.asarray(self.values[np.repeat(begin, lengths) + within]), offsets=offsets)


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Rows as arrays, in memory or memory-mapped.

    Args:
        dense: Numbers, float32 of shape ``(rows, num_dense)``.
        ids: Ids of the single-valued features, an integer type, of shape ``(rows, single-valued features)``.
        bags: The multi-valued features, in order; they come after the single-valued ones.
        label: 0 or 1, of shape ``(rows,)``.
    """

    dense: np.ndarray
    ids: np.ndarray
    bags: tuple[Bags, ...]
    label: np.ndarray

    def take(self, rows: np.ndarray) -> "Columns":
        """Copy ``rows`` (int64), in that order."""
        return Columns(
            dense=np.asarray(self.dense[rows]),
            ids=np.asarray(self.ids[rows]),
            bags=tuple(bags.take(rows) for bags in self.bags),
            label=np.asarray(self.label[rows]),
        )


class RowSource(Protocol):
    """Rows that can be read in any order.

    Attributes:
        num_rows: Rows in all.
        block_rows: Rows that are cheap to read together; a shuffled epoch goes through whole blocks.
        window_rows: Rows that may be mixed with each other.
    """

    @property
    def num_rows(self) -> int:
        """Rows in all."""

    @property
    def block_rows(self) -> int:
        """Rows that are cheap to read together."""

    @property
    def window_rows(self) -> int:
        """Rows that may be mixed with each other."""

    def read(self, rows: np.ndarray) -> Columns:
        """Read ``rows`` (int64), in that order."""


def concat_columns(parts: Sequence[Columns]) -> Columns:
    """Join rows to one; the features must be the same."""
    if len(parts) == 1:
        return parts[0]
    bags = []
    for same in zip(*(part.bags for part in parts), strict=True):
        starts = np.cumsum([0, *(bag.offsets[-1] for bag in same)])
        offsets = [bag.offsets[:-1] + start for bag, start in zip(same, starts[:-1], strict=True)]
        values = np.concatenate([bag.values for bag in same])
        bags.append(Bags(values=values, offsets=np.concatenate([*offsets, starts[-1:]])))
    return Columns(
        dense=np.concatenate([part.dense for part in parts]),
        ids=np.concatenate([part.ids for part in parts]),
        bags=tuple(bags),
        label=np.concatenate([part.label for part in parts]),
    )


def to_batch(columns: Columns, features: Sequence[CategoricalFeature]) -> Batch:
    """Make the tensors that models take.

    Args:
        columns: The B rows of the batch.
        features: Their features: single-valued ones, then multi-valued ones.

    Returns:
        Dense inputs (float32, ``(B, num_dense)``), the ids (int64 values, int64 lengths, keys in the order of
        ``features``) and the labels (float32, ``(B,)``).

    Example:
        >>> columns = Columns(
        ...     dense=np.zeros((2, 0), np.float32), ids=np.array([[5], [6]]), bags=(), label=np.array([0, 1])
        ... )
        >>> dense, sparse, label = to_batch(columns, [CategoricalFeature("site", num_embeddings=9)])
        >>> sparse["site"].values()
        tensor([5, 6])
    """
    size = len(columns.label)
    values = [columns.ids.T.astype(np.int64, copy=True).reshape(-1)]
    lengths = [np.ones(values[0].size, dtype=np.int64)]
    for bags in columns.bags:
        values.append(bags.values.astype(np.int64))
        lengths.append(np.diff(bags.offsets))
    sparse = KeyedJaggedTensor(
        keys=[feature.name for feature in features],
        values=torch.from_numpy(np.concatenate(values)),
        lengths=torch.from_numpy(np.concatenate(lengths)),
        stride=size,
    )
    dense = torch.from_numpy(np.ascontiguousarray(columns.dense, dtype=np.float32))
    return dense, sparse, torch.from_numpy(columns.label.astype(np.float32))

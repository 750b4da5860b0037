"""The hashing trick, and quotient and remainder: rows of a smaller table stand for several ids.

Ids are numbered by falling frequency, and are folded by the remainder: frequent ids never share a row with each other.
This is kinder to both methods than a random hash.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, isqrt
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from benchmarks.peers.tables import fused_tables
from lightning_embcomp.models.collections import build_collection, table_configs


class Unreachable(ValueError):
    """A method cannot get as small as asked for."""


@dataclass(frozen=True, kw_only=True)
class Fold:
    """How the ids of one table are folded.

    Args:
        slots: Rows of the first table; id i reads row ``i % slots``.
        quotients: Rows of the second table, of which id i reads row ``i // slots`` as a factor; 0: there is none.
    """

    slots: int
    quotients: int = 0

    @property
    def rows(self) -> int:
        """Rows of both tables."""
        return self.slots + self.quotients


def hashed(rows: Sequence[int], total: int) -> list[Fold]:
    """Cut the largest tables to one number of rows, so that all together have at most ``total``.

    Raises:
        Unreachable: If one row per table is too much.

    Example:
        >>> [fold.slots for fold in hashed([10, 100, 1000], 120)]
        [10, 55, 55]
    """
    if total < len(rows):
        raise Unreachable(f"{total} rows are fewer than one for each of {len(rows)} tables")
    low, high = 1, max(rows)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if sum(min(r, middle) for r in rows) <= total else (low, middle - 1)
    return [Fold(slots=min(r, low)) for r in rows]


def quotient_remainder(rows: Sequence[int], total: int, whole: Sequence[int] = ()) -> list[Fold]:
    """Let as few ids as possible share a remainder, the same number in all tables where that saves rows.

    Args:
        rows: Of each table.
        total: Rows of all folded tables together.
        whole: Tables that stay as they are: those of multi-valued features, see :class:`FoldedBags`.

    Raises:
        Unreachable: If the roots of the table sizes are too much.

    Example:
        >>> quotient_remainder([4, 100], 30)
        [Fold(slots=4, quotients=0), Fold(slots=20, quotients=5)]
    """

    def folded(sharing: int) -> list[Fold]:
        return [Fold(slots=r) if table in whole else _folded(r, sharing) for table, r in enumerate(rows)]

    largest = isqrt(max(rows) - 1) + 1
    low, high = 1, largest
    while low < high:
        middle = (low + high) // 2
        fits = sum(fold.rows for fold in folded(middle)) <= total
        low, high = (low, middle) if fits else (middle + 1, high)
    folds = folded(low)
    if sum(fold.rows for fold in folds) > total:
        raise Unreachable(f"quotients and remainders of {list(rows)} rows need more than {total} rows")
    return folds


def _folded(rows: int, sharing: int) -> Fold:
    """At most ``sharing`` ids for one remainder; more than the root of the rows would not save any."""
    slots = ceil(rows / min(sharing, isqrt(rows - 1) + 1)) if rows > 1 else 1
    fold = Fold(slots=slots, quotients=ceil(rows / slots))
    return fold if fold.rows < rows else Fold(slots=rows)


class FoldedBags(nn.Module):
    """A collection with row-wise Adagrad whose tables are folded.

    The rows of first tables start as TorchRec starts them, factors around one: at first a quotient changes little.

    Args:
        features: Records with ``name``, ``num_embeddings`` and ``multi_valued``, one table each.
        folds: How each table is folded.
        dim: Columns.
        lr: Rate of row-wise Adagrad.

    Raises:
        ValueError: If a multi-valued feature has quotients: rows are multiplied before they are pooled, which a sum of
            pooled rows cannot do.
    """

    slots: Tensor

    def __init__(self, features: Sequence[dict[str, Any]], folds: Sequence[Fold], dim: int, lr: float) -> None:
        super().__init__()
        both = list(zip(features, folds, strict=True))
        for feature, fold in both:
            if fold.quotients and feature["multi_valued"]:
                raise ValueError(f"feature {feature['name']!r} is multi-valued: it cannot have quotients")
        self.names = [feature["name"] for feature in features]
        self.factored = [feature["name"] for feature, fold in both if fold.quotients]
        self.dim = dim
        self.register_buffer("slots", torch.tensor([fold.slots for fold in folds]), persistent=False)
        first = [{"name": feature["name"], "num_embeddings": fold.slots} for feature, fold in both]
        second = [
            {"name": f"{feature['name']}_factor", "num_embeddings": fold.quotients}
            for feature, fold in both
            if fold.quotients
        ]
        self.inner = build_collection(table_configs([*first, *second], dim), "rowwise_adagrad", lr)
        for table in fused_tables(self.inner)[len(first) :]:
            table.add_(1.0)

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """Configurations of the first tables, one for each feature."""
        return self.inner.embedding_bag_configs()[: len(self.names)]

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Look up and multiply.

        Args:
            features: Ids of the unfolded tables, with the features in the order of the constructor.

        Returns:
            ``(B, features * dim)``.
        """
        ids, counts = features.values(), torch.tensor(features.length_per_key())
        slots = torch.repeat_interleave(self.slots, counts)
        quotient, remainder = torch.div(ids, slots, rounding_mode="floor"), ids % slots
        values, lengths = [remainder], [features.lengths()]
        if self.factored:
            parts, sizes = quotient.split(features.length_per_key()), features.lengths().view(len(self.names), -1)
            chosen = [self.names.index(name) for name in self.factored]
            values += [parts[index] for index in chosen]
            lengths += [sizes[index] for index in chosen]
        keys = [*self.names, *(f"{name}_factor" for name in self.factored)]
        found = self.inner(KeyedJaggedTensor(keys, torch.cat(values), lengths=torch.cat(lengths))).to_dict()
        outputs: list[Tensor] = [found[name] for name in self.names]
        for name in self.factored:
            index = self.names.index(name)
            outputs[index] = outputs[index] * found[f"{name}_factor"]
        return KeyedTensor.from_tensor_list(self.names, outputs)

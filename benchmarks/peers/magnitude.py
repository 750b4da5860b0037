"""Unstructured pruning after training by Lightning's ``ModelPruning``, and what its zeros save when they are stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor, nn

from benchmarks.peers.folded import Unreachable

ROW_POINTER, VALUE, BLOCK = 4, 4, 64


def compressed_rows_bytes(rows: int, nonzero: int, columns: int) -> int:
    """Bytes of a compressed sparse row matrix: values, a pointer per row, column numbers of the smallest type.

    Example:
        >>> compressed_rows_bytes(rows=10, nonzero=3, columns=16)
        59
    """
    column = 1 if columns <= 256 else 2
    return nonzero * (VALUE + column) + ROW_POINTER * (rows + 1)


def bitmap_bytes(rows: int, occupied: int, nonzero: int, columns: int) -> int:
    """Bytes of values with a bit map for each row that has some, and a bit per row that tells which these are.

    A first value and a first map are known for every 64 rows.

    Example:
        >>> bitmap_bytes(rows=64, occupied=2, nonzero=3, columns=16)
        32
    """
    blocks = -(-rows // BLOCK)
    return nonzero * VALUE + occupied * (-(-columns // 8)) + blocks * (BLOCK // 8 + 2 * ROW_POINTER)


def sparse_bytes(masks: Sequence[Tensor]) -> int:
    """Bytes of the values that masks keep, each table in the smaller of both formats.

    Args:
        masks: Whether a value is kept, bool ``(rows, columns)``, one per table.
    """
    total = 0
    for mask in masks:
        rows, columns = mask.shape
        occupied, nonzero = int(mask.any(1).sum()), int(mask.sum())
        total += min(compressed_rows_bytes(rows, nonzero, columns), bitmap_bytes(rows, occupied, nonzero, columns))
    return total


def threshold_for(tables: Sequence[Tensor], size: int) -> float:
    """Magnitude below which values are dropped so that the rest takes at most ``size`` bytes.

    Raises:
        Unreachable: If the formats take more without any value.
    """
    low, high = 0.0, max(float(table.abs().max()) for table in tables)
    if sparse_bytes([torch.zeros_like(table, dtype=torch.bool) for table in tables]) > size:
        raise Unreachable(f"sparse tables take more than {size:,} bytes without any value")
    for _ in range(30):
        middle = (low + high) / 2
        if sparse_bytes([table.abs() > middle for table in tables]) <= size:
            high = middle
        else:
            low = middle
    return high


class _Tables(pl.LightningModule):
    """Tables where ``ModelPruning`` looks for them."""

    def __init__(self, tables: Sequence[Tensor]) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Module() for _ in tables)
        for module, table in zip(self.tables, tables, strict=True):
            module.weight = nn.Parameter(table.clone())


def pruned(tables: Sequence[Tensor], amount: float) -> list[Tensor]:
    """Set the smallest values of all tables together to zero, as ``ModelPruning`` chooses them.

    Args:
        tables: Weights; they are not changed.
        amount: Share of the values to drop.
    """
    module = _Tables(tables)
    pruning = ModelPruning(
        "l1_unstructured",
        parameters_to_prune=[(one, "weight") for one in module.tables],
        use_global_unstructured=True,
        amount=amount,
    )
    pruning.setup(cast(Any, None), module, "fit")
    pruning.apply_pruning(amount)
    pruning.make_pruning_permanent(module)
    return [cast(Tensor, one.weight).detach() for one in module.tables]


def pruned_to(tables: Sequence[Tensor], size: int) -> tuple[list[Tensor], int]:
    """Prune until the tables, stored sparse, take at most ``size`` bytes.

    Returns:
        The values with their zeros, and the bytes.

    Raises:
        Unreachable: If they cannot be that small.
    """
    threshold = threshold_for(tables, size)
    dropped = sum(int((table.abs() <= threshold).sum()) for table in tables)
    values = pruned(tables, dropped / sum(table.numel() for table in tables))
    return values, sparse_bytes([value != 0 for value in values])

"""The served lookup as a PyTorch operator, so that ``torch.export`` and ``torch.compile`` can put it into a graph.

A graph with it runs wherever this package is imported. It holds the served rows as constants, shared in memory.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lightning_embcomp.kernels.dequantize import ServedClasses, ServedRouter, pool_served
from lightning_embcomp.kernels.types import BagLayout, ClassColumns, RouterTensors


def tensors_of(record: Any) -> list[Tensor]:  # noqa: ANN401 - one of the kernels' records
    """Tensors of a record in the order of its fields; rows of classes are left out."""
    found: list[Tensor] = []
    for item in fields(record):
        value = getattr(record, item.name)
        if isinstance(value, Tensor):
            found.append(value)
        elif is_dataclass(value):
            found += tensors_of(value)
    return found


@torch.library.custom_op("embcomp::pool_served", mutates_args=())
def pool_served_op(
    indices: Tensor,
    offsets: Tensor,
    weights: Tensor | None,
    rows: list[Tensor],
    router: list[Tensor],
    classes: list[Tensor],
    tables: list[int],
    dims: list[int],
    mean: list[int],
) -> Tensor:
    """Pool rows of served tables.

    Args:
        indices: Logical ids, feature by feature.
        offsets: Bag boundaries.
        weights: Per-sample weights, float32, or None.
        rows: Rows of the classes.
        router: Tensors of a :class:`ServedRouter`.
        classes: Tensors of a :class:`ServedClasses`, rows left out.
        tables: Table of each feature.
        dims: Columns of each feature.
        mean: Whether each feature is averaged.

    Returns:
        float32 ``(B, ΣD)``.
    """
    if (int(offsets[0]), int(offsets[-1])) != (0, indices.numel()):
        raise ValueError(f"offsets go from {int(offsets[0])} to {int(offsets[-1])}, not from 0 to {indices.numel()}")
    layout = bag_layout(tuple(tables), tuple(dims), tuple(mean), (offsets.numel() - 1) // len(dims), indices.device)
    # Constants of a graph lie elsewhere in every process.
    address = torch.tensor([part.data_ptr() for part in rows], dtype=torch.int64, device=indices.device)
    held = replace(_record(ServedClasses, iter(classes), rows), address=address)
    return pool_served(indices, offsets, weights, layout, _record(ServedRouter, iter(router), rows), held)


@pool_served_op.register_fake
def _(
    indices: Tensor,
    offsets: Tensor,
    weights: Tensor | None,
    rows: list[Tensor],
    router: list[Tensor],
    classes: list[Tensor],
    tables: list[int],
    dims: list[int],
    mean: list[int],
) -> Tensor:
    return indices.new_empty(((offsets.shape[0] - 1) // len(dims), sum(dims)), dtype=torch.float32)


@lru_cache(maxsize=16)
def bag_layout(
    tables: tuple[int, ...], dims: tuple[int, ...], mean: tuple[int, ...], batch_size: int, device: torch.device
) -> BagLayout:
    """Where pooled rows go when features stand side by side.

    Args:
        tables: Table of each feature.
        dims: Columns of each feature.
        mean: Whether each feature is averaged.
        batch_size: Bags of each feature.
        device: Of the tensors.

    Example:
        >>> layout = bag_layout((0, 0), (4, 4), (0, 0), 3, torch.device("cpu"))
        >>> layout.column.tolist(), layout.bag_start.tolist(), layout.shape
        ([0, 4], [0, 3, 6], (3, 8))
    """

    def as_tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    count = len(dims)
    return BagLayout(
        table=as_tensor(list(tables)),
        bag_start=as_tensor([f * batch_size for f in range(count + 1)]),
        row_start=as_tensor([0] * count),
        column=as_tensor([sum(dims[:f]) for f in range(count)]),
        width=as_tensor(list(dims)),
        mean=as_tensor(list(mean)),
        shape=(batch_size, sum(dims)),
    )


_NESTED = {"packed": RouterTensors, "columns": ClassColumns}


def _record(kind: Any, tensors: Any, rows: list[Tensor]) -> Any:  # noqa: ANN401 - one of the kernels' records
    """Inverse of :func:`tensors_of`."""
    values: dict[str, Any] = {}
    for item in fields(kind):
        if item.name in _NESTED:
            values[item.name] = _record(_NESTED[item.name], tensors, rows)
        elif kind is ServedClasses and item.name == "rows":
            values["rows"] = tuple(rows)
        else:
            values[item.name] = next(tensors)
    return kind(**values)

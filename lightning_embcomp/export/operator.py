"""The served lookup as a PyTorch operator, so that ``torch.export`` and ``torch.compile`` can put it into a graph.

A graph with it runs wherever this package is imported. It holds the served rows as constants, shared in memory.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_embcomp.engine.bag_layout import FeatureShapes, pooled_layout
from lightning_embcomp.engine.extent import check_extent
from lightning_embcomp.kernels.dequantize import ServedClasses, ServedRouter, pool_served
from lightning_embcomp.kernels.types import ClassColumns, RouterTensors


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


# Not for CUDA graphs, which `mode="reduce-overhead"` would make: addresses are read anew in every call.
@torch.library.custom_op("embcomp::pool_served", mutates_args=(), tags=(torch._C.Tag.cudagraph_unsafe,))
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
    offsets = check_extent(indices, offsets, weights)
    shapes = FeatureShapes(tuple(tables), tuple(dims), tuple(map(bool, mean)), indices.device)
    layout = pooled_layout(shapes, (offsets.numel() - 1) // len(dims))
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

"""Move batches to a device."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch


def move_batch(batch: Any, device: torch.device) -> Any:  # noqa: ANN401 - whatever a loader yields
    """Move everything in a batch that has a ``to`` method: tensors, ``KeyedJaggedTensor``, ``KeyedTensor``.

    Goes through tuples (named ones too), lists, dictionaries and dataclasses, frozen ones included, which Lightning's
    own transfer refuses.

    Args:
        batch: The batch.
        device: Where to move it.

    Returns:
        A batch of the same type; everything else in it is the same object.

    Example:
        >>> from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
        >>> ids = KeyedJaggedTensor(["user"], torch.tensor([1, 2]), lengths=torch.tensor([2]))
        >>> moved = move_batch({"ids": ids, "name": "first"}, torch.device("cpu"))
        >>> moved["ids"].keys(), moved["name"]
        (['user'], 'first')
    """
    if callable(getattr(batch, "to", None)):
        non_blocking = isinstance(batch, torch.Tensor) and device.type != "cpu"
        moved = batch.to(device, non_blocking=True) if non_blocking else batch.to(device)
        return batch if moved is None else moved
    if isinstance(batch, Mapping):
        items = {key: move_batch(value, device) for key, value in batch.items()}
        return items if type(batch) is dict else type(batch)(items)  # type: ignore[call-arg]
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(move_batch(value, device) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(move_batch(value, device) for value in batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = {f.name: move_batch(getattr(batch, f.name), device) for f in dataclasses.fields(batch) if f.init}
        return dataclasses.replace(batch, **fields)
    return batch

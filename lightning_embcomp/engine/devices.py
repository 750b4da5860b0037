"""Carry an engine to another device, with everything that it holds outside of parameters."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from lightning_embcomp.kernels.types import ClassColumns, RouterTensors

if TYPE_CHECKING:
    from lightning_embcomp.engine.routed import RoutedEmbeddings

_Tensors = TypeVar("_Tensors", RouterTensors, ClassColumns)


def target_of(convert: Any, device: torch.device) -> torch.device:  # noqa: ANN401 - whatever ``Module._apply`` is given
    """Where the function of :meth:`torch.nn.Module._apply` takes tensors of ``device``.

    Example:
        >>> target_of(lambda tensor: tensor.to("meta"), torch.device("cpu"))
        device(type='meta')
    """
    found: torch.device = convert(torch.empty(0, dtype=torch.int64, device=device)).device
    return found


def carry(engine: RoutedEmbeddings, device: torch.device) -> None:
    """Move the router, the rows, utilities and what methods attached; parameters are moved by PyTorch.

    Raises:
        RuntimeError: If the target is ``meta``, which would lose the rows, or a method's state cannot leave its device.
    """
    if device.type == "meta":
        raise RuntimeError("tables with rows cannot be moved to 'meta': their rows would be lost")
    for name, attached in engine.attached.items():
        if not attached.movable:
            raise RuntimeError(
                f"{name} of table {engine.tables[0].name!r} works on {engine.options.device} only so far, not on"
                f" {device}: leave its callback out, or train on {engine.options.device}"
            )
    engine.options = replace(engine.options, device=device)
    engine.router.tensors = tensors_on(engine.router.tensors, device)
    engine.columns = tensors_on(engine.columns, device)
    engine.features = replace(engine.features, device=device)
    for rows in engine.classes:
        rows.carry(device)
    if engine.utility is not None:
        engine.utility.carry(device)
    for attached in engine.attached.values():
        attached.carry(device)
    engine.counting.changed()  # it knows addresses


def tensors_on(tensors: _Tensors, device: torch.device) -> _Tensors:
    """The same tensors on a device."""
    return replace(tensors, **{field.name: getattr(tensors, field.name).to(device) for field in fields(tensors)})

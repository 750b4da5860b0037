"""Ids of a batch by row class, in tensors whose sizes follow from shapes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ClassLists:
    """All ids of a batch, class by class and within a class in the order of the batch.

    Nothing is dropped and every class lists every bag, so no size depends on the ids and the host need not know how
    many of them a class has. Ids without storage come last, as a class ``C`` of their own, with slot 0. That is the
    input of one lookup over ``C + 1`` tables, the last of which has one row.

    Attributes:
        slots: Row of the class table, int32 ``(N,)``.
        positions: Position of the id in the batch, int32 ``(N,)``.
        offsets: Ids of class c in bag b are those from ``offsets[c * bags + b]`` to before the next entry, int64
            ``((C + 1) * bags + 1,)``.
    """

    slots: Tensor
    positions: Tensor
    offsets: Tensor

"""Refusals that every process makes, although some see the reason only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lightning_embcomp.engine.group import Group


@contextmanager
def refused_together(group: Group) -> Iterator[None]:
    """Raise on all processes what a block raises on some of them, which the others would wait for until a timeout.

    Args:
        group: The processes; all of them run the block, which communicates nothing itself.

    Raises:
        ValueError: What the block raised here; where it raised nothing, with the message of another process.

    Example:
        >>> with refused_together(Group()):
        ...     raise ValueError("no such table")
        Traceback (most recent call last):
        ValueError: no such table
    """
    refusal: ValueError | None = None
    try:
        yield
    except ValueError as error:
        refusal = error
    message = str(refusal).encode() if refusal is not None else b""
    said = group.gather_uneven(torch.tensor([refusal is not None, *message], dtype=torch.uint8))
    if refusal is not None:
        raise refusal
    for text in (bytes(each.tolist()) for each in said):
        if text[0]:
            raise ValueError(text[1:].decode())

"""The validation batches of a trainer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import lightning.pytorch as pl

from lightning_embcomp.export.errors import ExportError


class Batches:
    """Batches of several loaders, one loader after the other, as often as they are asked for.

    Args:
        loaders: The loaders.
        limits: Batches of each that are used; the rest is left out.
    """

    def __init__(self, loaders: list[Iterable[Any]], limits: list[int | float]) -> None:
        self.loaders, self.limits = loaders, limits

    def __iter__(self) -> Iterator[Any]:
        for loader, limit in zip(self.loaders, self.limits, strict=True):
            for number, batch in enumerate(loader):
                if number >= limit:
                    break
                yield batch


def validation_batches(trainer: pl.Trainer) -> Batches:
    """Collect the validation batches of a trainer that has fitted or validated, as many as it used itself.

    Args:
        trainer: The trainer.

    Returns:
        The batches; iterate as often as needed.

    Raises:
        ExportError: If the trainer has no validation data.
    """
    loaders: Any = trainer.val_dataloaders
    if isinstance(loaders, dict):
        loaders = list(loaders.values())
    elif loaders is not None and not isinstance(loaders, list | tuple):
        loaders = [loaders]
    limits = list(trainer.num_val_batches)
    if not loaders or not any(limits):
        raise ExportError(
            "there is no validation data for the NE guard: give the trainer a validation loader, or switch the guard"
            " off"
        )
    return Batches(list(loaders), limits)

"""The validation batches of a trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import lightning.pytorch as pl

from lightning_embcomp.export.errors import ExportError

_NO_DATA = (
    "there is no validation data for the NE guard: give the trainer a validation loader and the model a"
    " validation_step, or switch the guard off"
)


class Batches:
    """Batches of several loaders, one loader after the other, as often as they are asked for.

    Args:
        loaders: The loaders.
        limits: Batches of each that are used; the rest is left out.
        prepare: Maps (batch, number of its loader) to what the model is given.
    """

    def __init__(
        self, loaders: list[Iterable[Any]], limits: list[int | float], prepare: Callable[[Any, int], Any]
    ) -> None:
        self.loaders, self.limits, self.prepare = loaders, limits, prepare

    def __iter__(self) -> Iterator[Any]:
        for loader, (batches, limit) in enumerate(zip(self.loaders, self.limits, strict=True)):
            for number, batch in enumerate(batches):
                if number >= limit:
                    break
                yield self.prepare(batch, loader)


def check_validation(trainer: pl.Trainer) -> None:
    """Raise if a trainer cannot validate; no loader is asked for data.

    Args:
        trainer: A trainer that runs or has run.

    Raises:
        ExportError: If there is no validation loader or step, or validation is switched off.
    """
    if not trainer.enable_validation:
        raise ExportError(_NO_DATA)


def validation_batches(trainer: pl.Trainer) -> Batches:
    """Collect the validation batches of a trainer that has fitted or validated, as many as it used itself.

    Args:
        trainer: The trainer.

    Returns:
        The batches as a validation step is given them, after the batch hooks; iterate as often as needed.

    Raises:
        ExportError: If the trainer has no validation data.
    """
    check_validation(trainer)
    if trainer.val_dataloaders is None:  # the fit was too short to validate
        trainer.fit_loop.epoch_loop.val_loop.setup_data()
    loaders: Any = trainer.val_dataloaders
    if isinstance(loaders, dict):
        loaders = list(loaders.values())
    elif loaders is not None and not isinstance(loaders, list | tuple):
        loaders = [loaders]
    limits = list(trainer.num_val_batches)
    if not loaders or not any(limits):
        raise ExportError(_NO_DATA)

    def prepare(batch: Any, loader: int) -> Any:  # noqa: ANN401 - the model's own batch
        # As before a validation step, batch hooks included; the fit may have left its device already.
        module = trainer.lightning_module
        batch = trainer.precision_plugin.convert_input(batch)
        batch = module._on_before_batch_transfer(batch, dataloader_idx=loader)
        return trainer.strategy.batch_to_device(batch, device=module.device, dataloader_idx=loader)

    return Batches(list(loaders), limits, prepare)

"""Keep a plain model from being compressed only to be measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import lightning.pytorch as pl
from torch import nn

from lightning_embcomp.engine.host import EngineHost
from lightning_embcomp.installation import sharding_strategy
from lightning_embcomp.surgery import replace
from lightning_embcomp.tables import HostView, select_tables

if TYPE_CHECKING:
    from lightning_embcomp.callback import CompressionCallback


@dataclass(frozen=True, kw_only=True)
class PlainEvaluation:
    """A plain model with weights that was given to an evaluation; right only if a checkpoint replaces the weights.

    Args:
        callback: The callback that would change what the model predicts; it keeps this until the evaluation starts.
        callbacks: All compression callbacks of the trainer.
        hosts: The plain modules as they were.
        training: The submodules that were in training mode.
        stage: ``validate``, ``test`` or ``predict``.
        table: Name of a table that would be compressed.
    """

    callback: CompressionCallback
    callbacks: Sequence[CompressionCallback]
    hosts: Sequence[HostView]
    training: Sequence[nn.Module]
    stage: str
    table: str

    def put_back(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the engines out again; tables that are sharded over processes stay as they are.

        Args:
            trainer: The trainer.
            pl_module: The module.
        """
        if sharding_strategy(trainer) is not None:
            return
        for host in self.hosts:
            if pl_module.get_submodule(host.path) is not host.module:
                replace(pl_module, host.path, host.module)
        for module in self.training:  # the evaluation ends before Lightning does this
            module.training = True
        for callback in self.callbacks:
            callback.owned = []


def plain_evaluation(
    pl_module: pl.LightningModule, hosts: Sequence[HostView], stage: str, callbacks: Sequence[CompressionCallback]
) -> PlainEvaluation | None:
    """Look for tables with weights that a callback would change in order to measure them.

    Args:
        pl_module: The module.
        hosts: Its modules that hold tables, before any is replaced.
        stage: What the trainer does: ``validate``, ``test`` or ``predict``.
        callbacks: All compression callbacks, in stage order.

    Returns:
        What is needed to refuse that; None if there are none.
    """
    for callback in callbacks:
        for table in select_tables(hosts, callback.patterns, callback.state_key) if callback.changes_values else ():
            if table.weight is not None and not table.weight.is_meta:
                return PlainEvaluation(
                    callback=callback,
                    callbacks=tuple(callbacks),
                    hosts=[host for host in hosts if not isinstance(host.module, EngineHost)],
                    training=[module for module in pl_module.modules() if module.training],
                    stage=str(getattr(stage, "value", stage)),
                    table=table.name,
                )
    return None

"""Export at the end of a fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from rich.console import Console

from lightning_embcomp.export.checkpoint import describe_checkpoint
from lightning_embcomp.export.errors import ExportError
from lightning_embcomp.export.files import check_target
from lightning_embcomp.export.manifest import FileFormat
from lightning_embcomp.export.pipeline import ExportOptions, ExportReport, export_module
from lightning_embcomp.export.sources import hosts_of
from lightning_embcomp.export.validation import check_validation, validation_batches
from lightning_embcomp.export.view import SWITCHED_OFF, render
from lightning_embcomp.installation import sharding_strategy
from lightning_embcomp.report.checkpoint import open_checkpoint


class ModelExport(pl.Callback):
    """Write low-precision tables and the dense part of the model when a fit ends.

    Works with compressed and plain models. Tables that were rounded in training keep their widths; other rows are
    rounded one by one to ``bits``. The NE guard compares the exported model with its source on the validation data of
    the trainer, and gives the tables that cost most more bits where NE rises too much.

    Args:
        dirpath: Folder to write.
        format: ``fbgemm`` stores rows as they are served, ``packed`` as few bits as there are and expands on load.
        bits: Bits of rows that were not rounded in training: 2, 4, 8, 16 or 32.
        tables: Bits of single tables, by glob of their names.
        row_alignment: Bytes that a served row is filled up to a multiple of.
        checkpoint: Weights to export: ``last``, or those of the ``best`` checkpoint of ``ModelCheckpoint``; the
            latter not in a fit that searches bits, since it may be from before they are chosen.
        max_ne_loss: Relative increase of validation NE that is allowed; null switches the guard off.
        strict: Fail where NE rises more, instead of using more bits.
        overwrite: Replace an earlier export.

    Raises:
        ExportError: If a setting is not allowed.

    Example:
        >>> ModelExport("served", format="packed", bits=4).options.bits
        4
    """

    def __init__(
        self,
        dirpath: str,
        format: FileFormat = "fbgemm",
        bits: int = 8,
        tables: Mapping[str, int] | None = None,
        row_alignment: int = 1,
        checkpoint: Literal["last", "best"] = "last",
        max_ne_loss: float | None = 0.0005,
        strict: bool = False,
        overwrite: bool = False,
    ) -> None:
        if checkpoint not in ("last", "best"):
            raise ExportError(f"checkpoint must be 'last' or 'best', not {checkpoint!r}")
        if strict and max_ne_loss is None:
            raise ExportError("strict has no effect without the NE guard: give max_ne_loss")
        self.dirpath = dirpath
        self.checkpoint = checkpoint
        self.guarded = max_ne_loss is not None
        self.options = ExportOptions(
            format=format,
            bits=bits,
            tables=dict(tables or {}),
            row_alignment=row_alignment,
            overwrite=overwrite,
            max_ne_loss=0.0 if max_ne_loss is None else max_ne_loss,
            strict=strict,
        )
        self.report: ExportReport | None = None

    @property
    def state_key(self) -> str:
        """Distinct for instances with different folders."""
        return f"ModelExport[{self.dirpath}]"

    def __getstate__(self) -> dict[str, Any]:
        # Lightning hangs methods of the module on the callback for logging, anew in every run.
        return {name: value for name, value in self.__dict__.items() if name not in ("log", "log_dict")}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find out before the training whether there is a place to write to."""
        if stage != "fit":
            return
        if sharding_strategy(trainer) is not None:
            raise ExportError(
                f"{self.state_key}: no process holds all rows of sharded tables. Leave the callback out, and run"
                " `embcomp consolidate` and `embcomp export` on a checkpoint"
            )
        check_target(Path(self.dirpath), self.options.overwrite)
        if self.checkpoint == "best" and _best(trainer) is None:
            raise ExportError(
                f"{self.state_key}: checkpoint='best' needs a ModelCheckpoint with monitor=... among the callbacks"
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find out before the training whether there will be something to export, and data for the guard.

        Raises:
            ExportError: If a table cannot be exported, there is no validation data for the guard, or the best
                checkpoint may be one without bits.
            UnknownTableError: If a glob of ``tables`` matches no table.
        """
        self.options.bits_of(hosts_of(pl_module, trained=False))
        if self.guarded:
            check_validation(trainer)
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        searching = [type(c).__name__ for c in callbacks if getattr(c, "searches", False) is True]
        if self.checkpoint == "best" and searching:
            raise ExportError(
                f"{self.state_key}: checkpoint='best' may choose one from the search phase of {searching[0]}, when bits"
                " are not chosen yet: use checkpoint='last', or export the checkpoint of your choice with"
                " `embcomp export`"
            )

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Export; the module keeps its last weights."""
        if not trainer.is_global_zero:
            return
        batches = validation_batches(trainer) if self.guarded else None
        best = _best(trainer) if self.checkpoint == "best" else None
        if best is None:
            source: dict[str, Any] = {"epoch": trainer.current_epoch, "global_step": trainer.global_step}
            self.report = export_module(pl_module, self.dirpath, self.options, batches=batches, source=source)
        else:
            if not best.best_model_path:
                raise ExportError(f"{self.state_key}: ModelCheckpoint has kept no best checkpoint")
            checkpoint = open_checkpoint(best.best_model_path)
            last = {
                key: value.detach().clone() if isinstance(value, torch.Tensor) else value
                for key, value in pl_module.state_dict().items()
            }
            try:
                pl_module.load_state_dict(dict(checkpoint["state_dict"]))
                source = describe_checkpoint(checkpoint, best.best_model_path)
                self.report = export_module(pl_module, self.dirpath, self.options, batches=batches, source=source)
            finally:
                pl_module.load_state_dict(last)
        console = Console(width=100)
        with console.capture() as text:
            console.print(render(self.report, SWITCHED_OFF))
        rank_zero_info(text.get())


def _best(trainer: pl.Trainer) -> ModelCheckpoint | None:
    """The checkpoint callback that knows what is best."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return next((c for c in callbacks if isinstance(c, ModelCheckpoint) and c.monitor is not None), None)

"""Build trainer, model and data from the configuration of a run, and bring the model to the state of a checkpoint."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence

import lightning.pytorch as pl

from lightning_embcomp.trainer_cli import SETTINGS, EmbCompCLI


class _BuildOnly(EmbCompCLI):
    """LightningCLI that builds and does not run."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Leave the trainer alone."""


def restored_run(
    configs: Sequence[str | os.PathLike[str]], checkpoint: str | os.PathLike[str]
) -> tuple[pl.Trainer, pl.LightningModule]:
    """Build a run and load a checkpoint the way the run itself would: callbacks put their tables in first.

    Args:
        configs: Configuration files as for ``embcomp fit``, later ones win.
        checkpoint: The checkpoint.

    Returns:
        The trainer, which has validated, and its model. Nothing is logged or saved.
    """
    words = [word for path in configs for word in ("-c", os.fspath(path))]
    quiet = ["--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    with warnings.catch_warnings():
        # The words of the command line are those of `embcomp export`, and LightningCLI wonders about them.
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
        cli = _BuildOnly(
            **SETTINGS,
            save_config_callback=None,
            parser_kwargs={"prog": "embcomp export"},
            args=["fit", *words, *quiet],
        )
    cli.trainer.validate(cli.model, datamodule=cli.datamodule, ckpt_path=os.fspath(checkpoint), verbose=False)
    return cli.trainer, cli.model

"""A control: plain tables that start anew under a trained model, as tables do after a search of their precision."""

from __future__ import annotations

import lightning.pytorch as pl

from benchmarks.peers.tables import fused_states, fused_tables


class Restart(pl.Callback):
    """Give all tables fresh values and states once.

    Args:
        epochs: Epochs before that.
    """

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs
        self.searching = True

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the tables anew, at TorchRec's initial values."""
        if not self.searching or trainer.current_epoch < self.epochs:
            return
        self.searching = False
        for table in fused_tables(pl_module):
            bound = table.shape[0] ** -0.5
            table.uniform_(-bound, bound)
        for state in fused_states(pl_module):
            state.zero_()

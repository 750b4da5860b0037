"""What a run leaves behind for a comparison: step times, validation curve, bytes, test set."""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

import lightning.pytorch as pl

from lightning_embcomp.engine.memory import TableMemory
from lightning_embcomp.report.live import measure

WARM_UP_STEPS = 20
"""Steps at the start that say nothing about speed: kernels are compiled, caches are cold."""


class RunRecorder(pl.Callback):
    """Record a run of a model with ``val_ne``; put it last, so that steps include what other callbacks do.

    Attributes:
        seconds: Seconds of every training step, data loading and validation left out.
        curve: Optimizer step and validation NE of every validation.
        memory: Embedding bytes at the validation that held most.
        test_rows: Rows of the test set.
        test_positives: Rows with label 1 among them.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.curve: list[tuple[int, float]] = []
        self.memory: TableMemory | None = None
        self.test_rows = self.test_positives = 0
        self._started = 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:  # noqa: ANN401
        """Start the clock of a step."""
        self._started = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:  # noqa: ANN401
        """Stop the clock of a step."""
        self.seconds.append(time.perf_counter() - self._started)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the NE and what the tables hold."""
        if trainer.sanity_checking:
            return
        self.curve.append((trainer.global_step, float(trainer.callback_metrics["val_ne"])))
        memory = measure(pl_module, trainer.optimizers)
        if self.memory is None or memory.total > self.memory.total:
            self.memory = memory

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,  # noqa: ANN401 - Lightning's signature
        batch: Any,  # noqa: ANN401 - (dense, sparse, label)
        *args: Any,  # noqa: ANN401
    ) -> None:
        """Count the test set."""
        label = batch[2]
        self.test_rows += label.numel()
        self.test_positives += int(label.sum())

    @property
    def median_seconds(self) -> float:
        """Median seconds of a step after the warm-up."""
        return statistics.median(self._warm())

    @property
    def mean_seconds(self) -> float:
        """Mean seconds of a step after the warm-up, pruning events with their share."""
        return statistics.fmean(self._warm())

    def _warm(self) -> list[float]:
        return self.seconds[min(WARM_UP_STEPS, len(self.seconds) // 2) :]


def auc_standard_error(auc: float, positives: int, negatives: int) -> float:
    """Standard error of an AUC by Hanley and McNeil's formula [1]_.

    Args:
        auc: The AUC.
        positives: Test rows with label 1.
        negatives: Test rows with label 0.

    Returns:
        Standard error; NaN if a class is missing.

    Example:
        >>> round(auc_standard_error(0.79, positives=12_000, negatives=48_000), 4)
        0.0026

    References:
        .. [1] Hanley and McNeil, 1982, https://doi.org/10.1148/radiology.143.1.7063747
    """
    if positives == 0 or negatives == 0:
        return math.nan
    both_positive, both_negative = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc)
    variance += (positives - 1) * (both_positive - auc**2) + (negatives - 1) * (both_negative - auc**2)
    return math.sqrt(variance / (positives * negatives))

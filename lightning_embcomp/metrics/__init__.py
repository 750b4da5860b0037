"""Metrics of click-through models: functional forms, and torchmetrics classes that keep their state."""

from lightning_embcomp.metrics.click import Calibration, LogLoss, NormalizedEntropy
from lightning_embcomp.metrics.functional import calibration, log_loss, normalized_entropy

__all__ = ["Calibration", "LogLoss", "NormalizedEntropy", "calibration", "log_loss", "normalized_entropy"]

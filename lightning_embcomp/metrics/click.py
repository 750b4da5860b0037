"""Click-through metrics as torchmetrics: state here, maths in :mod:`.functional`."""

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_embcomp.metrics.functional import (
    calibration_from_sums,
    checked_predictions,
    log_loss_sum,
    normalized_entropy_from_sums,
)


class _SumsMetric(Metric):
    """A metric that is a function of sums over examples, kept in float64.

    Sums need no list of all predictions, and any split into batches or ranks gives the same result. They are
    replaced, never changed in place: a reset at the end of ``Trainer.validate`` leaves inference tensors, which a later
    ``fit`` may read but not change.
    """

    is_differentiable: bool = False
    full_state_update: bool | None = False

    def __init__(self, *names: str) -> None:
        """Register one float64 sum for each name.

        Args:
            *names: Attribute names of the sums.
        """
        super().__init__()
        for name in names:
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")


class LogLoss(_SumsMetric):
    """Average binary log loss, in nats; see :func:`~lightning_embcomp.metrics.functional.log_loss`.

    ``compute`` gives a float64 scalar; NaN before the first example.

    Example:
        >>> metric = LogLoss()
        >>> metric.update(torch.tensor([0.5, 0.5]), torch.tensor([1, 0]))
        >>> metric.compute()
        tensor(0.6931, dtype=torch.float64)
    """

    higher_is_better: bool | None = False
    loss_sum: Tensor
    total: Tensor

    def __init__(self) -> None:
        """Start from no examples."""
        super().__init__("loss_sum", "total")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            preds: Click probabilities, any shape, floating point.
            target: Labels 0 or 1, the same shape.

        Raises:
            ValueError: If the shapes differ or a value is not allowed.
        """
        self.loss_sum = self.loss_sum + log_loss_sum(preds, target)
        self.total = self.total + target.numel()

    def compute(self) -> Tensor:
        """Average over everything added since the last reset; NaN for no examples."""
        return self.loss_sum / self.total


class NormalizedEntropy(_SumsMetric):
    """Normalised entropy (NE); see :func:`~lightning_embcomp.metrics.functional.normalized_entropy`.

    The click-through rate in the denominator is that of all examples added, not a mean over batches.
    ``compute`` gives a float64 scalar; NaN for no examples or labels of one class only.

    Example:
        >>> metric = NormalizedEntropy()
        >>> metric.update(torch.tensor([0.9, 0.2]), torch.tensor([1, 0]))
        >>> metric.update(torch.tensor([0.2, 0.3]), torch.tensor([0, 0]))
        >>> metric.compute()
        tensor(0.4038, dtype=torch.float64)
    """

    higher_is_better: bool | None = False
    loss_sum: Tensor
    clicks: Tensor
    total: Tensor

    def __init__(self) -> None:
        """Start from no examples."""
        super().__init__("loss_sum", "clicks", "total")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            preds: Click probabilities, any shape, floating point.
            target: Labels 0 or 1, the same shape.

        Raises:
            ValueError: If the shapes differ or a value is not allowed.
        """
        self.loss_sum = self.loss_sum + log_loss_sum(preds, target)
        self.clicks = self.clicks + target.sum()
        self.total = self.total + target.numel()

    def compute(self) -> Tensor:
        """NE over everything added since the last reset."""
        return normalized_entropy_from_sums(self.loss_sum, self.clicks, self.total)


class Calibration(_SumsMetric):
    """Expected over observed clicks; see :func:`~lightning_embcomp.metrics.functional.calibration`.

    ``compute`` gives a float64 scalar; NaN where no click was added. Neither higher nor lower is better: 1 is.

    Example:
        >>> metric = Calibration()
        >>> metric.update(torch.tensor([0.9, 0.2]), torch.tensor([1, 0]))
        >>> metric.compute()
        tensor(1.1000, dtype=torch.float64)
    """

    higher_is_better: bool | None = None
    expected: Tensor
    clicks: Tensor

    def __init__(self) -> None:
        """Start from no examples."""
        super().__init__("expected", "clicks")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            preds: Click probabilities, any shape, floating point.
            target: Labels 0 or 1, the same shape.

        Raises:
            ValueError: If the shapes differ or a value is not allowed.
        """
        probability, label = checked_predictions(preds, target)
        self.expected = self.expected + probability.sum()
        self.clicks = self.clicks + label.sum()

    def compute(self) -> Tensor:
        """Ratio over everything added since the last reset."""
        return calibration_from_sums(self.expected, self.clicks)

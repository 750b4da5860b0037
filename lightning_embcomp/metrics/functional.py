"""Functional forms of the click-through metrics: pure tensors in, a scalar out."""

import torch
from torch import Tensor


def checked_predictions(preds: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return both as float64 of shape ``(N,)``, or say what is wrong with them.

    Args:
        preds: Predicted probabilities, any shape.
        target: Labels, the same shape.

    Returns:
        ``preds`` and ``target``, flattened, float64: log loss sums lose digits in float32.

    Raises:
        ValueError: If the shapes differ, a probability is outside [0, 1] or NaN, or a label is neither 0 nor 1.
    """
    if preds.shape != target.shape:
        raise ValueError(
            f"preds and target must have the same shape, got {tuple(preds.shape)} and {tuple(target.shape)}"
        )
    probability = preds.detach().flatten().to(torch.float64)
    label = target.detach().flatten().to(torch.float64)
    outside = ~((probability >= 0) & (probability <= 1))
    if outside.any():
        raise ValueError(
            f"preds must be probabilities in [0, 1], got {probability[outside][0].item()}; pass logits through sigmoid"
        )
    unknown = (label != 0) & (label != 1)
    if unknown.any():
        raise ValueError(f"target must be 0 or 1, got {label[unknown][0].item()}")
    return probability, label


def log_loss_sum(preds: Tensor, target: Tensor) -> Tensor:
    r"""Sum of the binary log loss over all examples, in nats.

    A probability of exactly 0 or 1 is moved inwards by ``torch.finfo(torch.float64).eps`` (2.2e-16), as in
    scikit-learn, so that a certain and wrong prediction costs 36.04 nats and not infinity.

    Args:
        preds: Click probabilities, any shape, floating point.
        target: Labels 0 or 1, the same shape.

    Returns:
        Float64 scalar, 0 for no examples.

    Raises:
        ValueError: If the shapes differ or a value is not allowed.

    Example:
        >>> log_loss_sum(torch.tensor([0.5, 0.5]), torch.tensor([1, 0]))
        tensor(1.3863, dtype=torch.float64)
    """
    probability, label = checked_predictions(preds, target)
    eps = torch.finfo(torch.float64).eps
    probability = probability.clamp(eps, 1 - eps)
    return -torch.where(label > 0, probability.log(), (-probability).log1p()).sum()


def normalized_entropy_from_sums(loss_sum: Tensor, clicks: Tensor, total: Tensor) -> Tensor:
    """Normalised entropy from its sufficient statistics; see :func:`normalized_entropy`.

    Args:
        loss_sum: Summed log loss in nats, scalar.
        clicks: Number of positive labels, scalar.
        total: Number of examples, scalar.

    Returns:
        Float64 scalar; NaN where the entropy of the label is 0 (no examples, or one class only).

    Example:
        >>> normalized_entropy_from_sums(torch.tensor(1.3863), torch.tensor(1.0), torch.tensor(2.0))
        tensor(1.0000, dtype=torch.float64)
    """
    loss, positive, count = (value.to(torch.float64) for value in (loss_sum, clicks, total))
    rate = positive / count
    entropy = -(torch.xlogy(rate, rate) + torch.special.xlog1py(1 - rate, -rate))
    return torch.where(entropy > 0, loss / count / entropy, torch.full_like(entropy, torch.nan))


def log_loss(preds: Tensor, target: Tensor) -> Tensor:
    """Average binary log loss, in nats per example.

    Args:
        preds: Click probabilities, any shape, floating point.
        target: Labels 0 or 1, the same shape.

    Returns:
        Float64 scalar; NaN for no examples.

    Raises:
        ValueError: If the shapes differ or a value is not allowed.

    Example:
        >>> log_loss(torch.tensor([0.5, 0.5]), torch.tensor([1, 0]))
        tensor(0.6931, dtype=torch.float64)
    """
    return log_loss_sum(preds, target) / preds.numel()


def normalized_entropy(preds: Tensor, target: Tensor) -> Tensor:
    r"""Average log loss divided by the entropy of the average click-through rate [1]_.

    With :math:`N` examples, :math:`p` the share of clicks among them:

    .. math::
        \mathrm{NE} = \frac{-\frac{1}{N}\sum_i y_i\log p_i + (1-y_i)\log(1-p_i)}
                           {-(p\log p + (1-p)\log(1-p))}

    1 is what predicting the click-through rate of these very examples scores; lower is better.

    Args:
        preds: Click probabilities, any shape, floating point.
        target: Labels 0 or 1, the same shape.

    Returns:
        Float64 scalar; NaN for no examples or labels of one class only, where the entropy is 0.

    Raises:
        ValueError: If the shapes differ or a value is not allowed.

    Example:
        >>> normalized_entropy(torch.tensor([0.9, 0.2, 0.2, 0.3]), torch.tensor([1, 0, 0, 0]))
        tensor(0.4038, dtype=torch.float64)

    References:
        .. [1] He et al., 2014, https://doi.org/10.1145/2648584.2648589
    """
    loss = log_loss_sum(preds, target)
    return normalized_entropy_from_sums(loss, target.sum(), torch.tensor(target.numel()))


def calibration(preds: Tensor, target: Tensor) -> Tensor:
    """Expected clicks divided by observed clicks: the sum of probabilities over the sum of labels.

    1 is perfect; 1.1 promises ten percent too many clicks.

    Args:
        preds: Click probabilities, any shape, floating point.
        target: Labels 0 or 1, the same shape.

    Returns:
        Float64 scalar; NaN where there is no click (no examples included).

    Raises:
        ValueError: If the shapes differ or a value is not allowed.

    Example:
        >>> calibration(torch.tensor([0.9, 0.2, 0.2, 0.3]), torch.tensor([1, 0, 0, 0]))
        tensor(1.6000, dtype=torch.float64)
    """
    probability, label = checked_predictions(preds, target)
    return calibration_from_sums(probability.sum(), label.sum())


def calibration_from_sums(expected: Tensor, clicks: Tensor) -> Tensor:
    """Calibration from its sufficient statistics; see :func:`calibration`.

    Args:
        expected: Summed probabilities, scalar.
        clicks: Number of positive labels, scalar.

    Returns:
        Float64 scalar; NaN where ``clicks`` is 0.

    Example:
        >>> calibration_from_sums(torch.tensor(3.0), torch.tensor(2.0))
        tensor(1.5000, dtype=torch.float64)
    """
    ratio = expected.to(torch.float64) / clicks.to(torch.float64)
    return torch.where(clicks > 0, ratio, torch.full_like(ratio, torch.nan))

r"""Maths of gradient thresholding: thresholds from samples, the largest of what was selected, dense messages [1]_ [2]_.

For a worker with gradient g, residual e, and estimate h (what the receivers hold of its gradient), the message is
:math:`u = \eta e + g - h`, of which :math:`\Delta` is sent. Then :math:`h \leftarrow h + \Delta` and
:math:`e \leftarrow e + g - h_{\text{before}} - \Delta`. Error compensation has :math:`h = 0` and :math:`\eta = 1`, EF21
has no e.

References:
    .. [1] Dynamic communication thresholding, KDD 2021, https://arxiv.org/abs/2010.08899
    .. [2] EControl, https://arxiv.org/abs/2311.05645
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_embcomp.kernels.threshold import SMALLEST, kth_largest
from lightning_embcomp.kernels.transfer import on_device

_TAIL = 400
"""Samples above the threshold that are enough: the standard deviation of their number is 5 % of it."""


def wanted_entries(numel: int, density: float) -> int:
    """Entries of a parameter that are sent: its share, at least one.

    Example:
        >>> wanted_entries(1000, 0.01), wanted_entries(20, 0.01)
        (10, 1)
    """
    return max(1, round(numel * density))


def sampled_threshold(
    grad: Tensor,
    residual: Tensor | None,
    estimate: Tensor | None,
    *,
    factor: float,
    gain: float,
    wanted: int,
    samples: int,
    seed: int,
) -> float:
    """Estimate the ``wanted``-th largest absolute value of a message.

    Entries that are not finite are left out.

    Args:
        grad: float32 ``(n,)``.
        residual: Before the gradient is added, float32 ``(n,)`` or None for none.
        estimate: float32 ``(n,)`` or None for none.
        factor: Multiplies the gradient.
        gain: Share of the residual.
        wanted: Entries that are to reach the threshold.
        samples: Entries to look at, drawn with replacement; all of them, exactly, if there are no more. Fewer, where
            400 of them are above the threshold, which tells it within 5 %.
        seed: Of the draw.

    Returns:
        The threshold, at least the smallest normal float32.

    Example:
        >>> sampled_threshold(
        ...     torch.tensor([3.0, -8.0, 1.0, 5.0]), None, None, factor=0.5, gain=1.0, wanted=2, samples=10, seed=0
        ... )
        2.5
    """
    n = grad.numel()
    if wanted >= n:
        return SMALLEST
    size = _sampled_sizes(grad, residual, estimate, factor=factor, gain=gain, wanted=wanted, samples=samples, seed=seed)
    size = size[torch.isfinite(size)]
    if size.numel() == 0:
        return SMALLEST
    rank = min(max(1, round(size.numel() * wanted / n)), size.numel())
    return max(kth_largest(size, rank), SMALLEST)


def threshold_on_device(
    grad: Tensor,
    residual: Tensor | None,
    estimate: Tensor | None,
    *,
    factor: float,
    gain: float,
    wanted: int,
    samples: int,
    seed: int,
) -> Tensor:
    """As :func:`sampled_threshold`, to the bit, without waiting for the device that the gradient is on.

    Args:
        grad: As in :func:`sampled_threshold`.
        residual: As in :func:`sampled_threshold`.
        estimate: As in :func:`sampled_threshold`.
        factor: As in :func:`sampled_threshold`.
        gain: As in :func:`sampled_threshold`.
        wanted: As in :func:`sampled_threshold`.
        samples: As in :func:`sampled_threshold`.
        seed: As in :func:`sampled_threshold`.

    Returns:
        float32 ``(1,)``.

    Example:
        >>> threshold_on_device(
        ...     torch.tensor([3.0, -8.0, 1.0, 5.0]), None, None, factor=0.5, gain=1.0, wanted=2, samples=10, seed=0
        ... )
        tensor([2.5000])
    """
    n = grad.numel()
    if wanted >= n:
        return torch.full((1,), SMALLEST, dtype=torch.float32, device=grad.device)
    size = _sampled_sizes(grad, residual, estimate, factor=factor, gain=gain, wanted=wanted, samples=samples, seed=seed)
    finite = torch.isfinite(size)
    # Below all that counts, so that they do not move a rank: how many there are is not known here.
    size = torch.where(finite, size, -1.0).sort(descending=True).values
    count = finite.sum()
    rank = (count.double() * wanted / n).round().clamp(min=1).long().minimum(count)
    return size.index_select(0, (rank - 1).clamp(min=0).view(1)).clamp(min=SMALLEST)


def _sampled_sizes(
    grad: Tensor,
    residual: Tensor | None,
    estimate: Tensor | None,
    *,
    factor: float,
    gain: float,
    wanted: int,
    samples: int,
    seed: int,
) -> Tensor:
    """Magnitudes of the sampled entries of a message."""
    n = grad.numel()
    if n > samples:
        source = torch.Generator().manual_seed(seed)
        samples = min(samples, -(-_TAIL * n // wanted))
        chosen = on_device(torch.randint(n, (samples,), generator=source), grad.device)
        grad, residual, estimate = (part if part is None else part[chosen] for part in (grad, residual, estimate))  # type: ignore[assignment]
    change = grad * factor if estimate is None else grad * factor - estimate
    size = change
    if residual is not None:
        # In the order of the kernel's operations, so that the entry at the threshold is at the threshold there as well.
        size = residual + change if gain == 1.0 else gain * (residual + change) + (1.0 - gain) * change
    return size.abs()


def largest(values: Tensor, count: int) -> tuple[Tensor, float]:
    """Positions of the values that are largest in absolute value.

    Args:
        values: ``(n,)``, finite.
        count: How many, from 1 to n; of equal ones the first.

    Returns:
        int64 tensor of shape ``(count,)``, rising, and the smallest absolute value among them.

    Example:
        >>> largest(torch.tensor([1.0, -4.0, 2.0, 3.0]), 2)
        (tensor([1, 3]), 3.0)
    """
    sizes = values.abs()
    smallest = kth_largest(sizes, count)
    (kept,) = torch.nonzero(sizes >= smallest, as_tuple=True)
    surplus = kept.numel() - count
    if surplus:
        last_equal = torch.nonzero(sizes[kept] == smallest).flatten()[-surplus:]
        stays = torch.ones_like(kept, dtype=torch.bool)
        stays[last_equal] = False
        kept = kept[stays]
    return kept, smallest


def largest_on_device(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """As :func:`largest`, without waiting for the device that the values are on.

    Args:
        values: As in :func:`largest`.
        count: As in :func:`largest`.

    Returns:
        int64 tensor of shape ``(count,)``, rising, and the smallest absolute value among them, of shape ``(1,)``.

    Example:
        >>> largest_on_device(torch.tensor([1.0, -4.0, 2.0, 3.0]), 2)
        (tensor([1, 3]), tensor([3.]))
    """
    sizes, order = values.abs().sort(descending=True, stable=True)
    return order[:count].sort().values, sizes[count - 1 : count].clone()


def whole_message(
    grad: Tensor, residual: Tensor | None, estimate: Tensor | None, *, factor: float, gain: float, weight: float = 1.0
) -> Tensor:
    """Message of a step in which everything is sent, after the gradient was added to the residual; changes the state.

    Args:
        grad: float32 ``(n,)``.
        residual: With the gradient added and the estimate taken out; what stays of it is left here.
        estimate: Moves towards the message, of which receivers now hold all.
        factor: Multiplies the gradient.
        gain: Share of the residual.
        weight: How far the estimate moves: 1 for all the way. With 1 / t in dense step t it becomes a mean, with less
            noise of single batches than the last message.

    Returns:
        What the receivers are to step along, float32 ``(n,)``: the gradient and the share of the residual.

    Example:
        >>> residual = torch.tensor([3.0])  # 1 before a gradient of 2
        >>> whole_message(torch.tensor([2.0]), residual, None, factor=1.0, gain=1.0), residual
        (tensor([3.]), tensor([0.]))
    """
    if estimate is None:
        if residual is None:
            return grad * factor
        message = residual.clone()
        residual.zero_()
        return message
    message = grad * factor
    if residual is not None:
        residual.sub_(message - estimate)
        message += gain * residual
        residual.mul_(1.0 - gain)
    estimate.lerp_(message, weight)
    return message


def averaged(states: Sequence[Tensor]) -> Tensor:
    """State that every worker starts from when their number has changed.

    Gradients are averaged over workers, so what the workers together still owe the model is the mean of their
    residuals, not the sum; the same holds for estimates.

    Args:
        states: The same tensor of each worker.

    Returns:
        Their mean.

    Example:
        >>> averaged([torch.tensor([1.0]), torch.tensor([2.0])])
        tensor([1.5000])
    """
    return torch.stack([state.double() for state in states]).mean(0).to(states[0].dtype)

"""The maths of mixed precision: groups, penalty, steps, and the choice of widths."""

from __future__ import annotations

import torch
from torch import Tensor

GRANULE = 64
"""Rows that always share a group."""
MIN_STEP = 2.0**-14
"""Smallest step: float16 loses precision below."""


def group_bounds(rows: int, largest: int) -> list[int]:
    """Cut the rows of a table, most frequent first, into groups.

    Sizes double from :data:`GRANULE` rows up to ``largest``, so that frequent rows, which cost few bytes and matter
    most, get widths of their own.

    Args:
        rows: Rows of the table.
        largest: Rows of the largest group, rounded up to a multiple of :data:`GRANULE`.

    Returns:
        First row of every group, and the number of rows.

    Example:
        >>> group_bounds(1000, 256)
        [0, 64, 128, 256, 512, 768, 1000]
        >>> group_bounds(10, 256)
        [0, 10]
    """
    largest = max(GRANULE, -(-largest // GRANULE) * GRANULE)
    bounds = [0]
    while bounds[-1] < rows:
        size = min(max(GRANULE, bounds[-1]), largest)
        bounds.append(min(bounds[-1] + size, rows))
    return bounds


def is_falling(counts: Tensor) -> bool:
    """Whether ids are numbered by falling frequency; id 0, which often is the unknown value, may stand out."""
    return bool((counts[2:] <= counts[1:-1]).all())


def initial_steps(magnitude: Tensor, widths: Tensor) -> Tensor:
    r"""Steps that suit values of a given mean magnitude: :math:`2 \bar{|w|} / \sqrt{2^{b-1}}` [1]_.

    Args:
        magnitude: Mean absolute value per table, ``(T,)``.
        widths: Candidate widths, ``(K,)``.

    Returns:
        Steps ``(T, K)``, at least :data:`MIN_STEP`.

    References:
        .. [1] Learned step size quantization, 2020, https://arxiv.org/abs/1902.08153
    """
    levels = 2.0 ** (widths.clamp(min=1) - 1).to(magnitude.dtype)
    return (2 * magnitude.unsqueeze(1) / levels.sqrt()).clamp(min=MIN_STEP)


def half_steps(log_steps: Tensor) -> Tensor:
    """Steps as tables with a float16 scale hold them, float32."""
    return log_steps.exp().clamp(min=MIN_STEP).half().float()


def softmax_gradient(shares: Tensor, gradient: Tensor, temperature: float) -> Tensor:
    """Gradient by the logits of shares ``softmax(logits / temperature)``, from the one by the shares."""
    mean = (shares * gradient).sum(1, keepdim=True)
    return shares * (gradient - mean) / temperature


def penalty_gradient(widths: Tensor, rows: Tensor, counts: Tensor) -> Tensor:
    r"""Gradient by the shares of the penalty :math:`\sum_g \frac{n_g}{\bar n} \frac{\sum_b p_{gb} b}{c_g / c_{min}}`.

    Groups of equal size make it the penalty of the paper; :math:`c_g` are occurrences per row, rare groups are pressed
    hardest.

    Args:
        widths: Candidate widths ``(K,)``.
        rows: Rows of each group ``(G,)``.
        counts: Occurrences of each group in the training data ``(G,)``.

    Returns:
        ``(G, K)``.
    """
    per_row = (counts.double() / rows.double()).clamp(min=1e-3)
    weight = rows.double() / rows.double().mean() * (per_row.min() / per_row)
    return (weight.unsqueeze(1) * widths.double()).float()


def largest_likely_width(shares: Tensor, widths: Tensor) -> Tensor:
    """Selection rule of the paper: the largest width with at least half of an equal share.

    Args:
        shares: ``(G, K)``.
        widths: Candidate widths, rising, ``(K,)``.

    Returns:
        Index of the width per group, int64 ``(G,)``.

    Example:
        >>> largest_likely_width(torch.tensor([[0.9, 0.06, 0.04], [0.4, 0.4, 0.2]]), torch.tensor([0, 2, 4]))
        tensor([0, 2])
    """
    likely = shares >= 1 / (2 * widths.numel())
    return torch.where(likely, torch.arange(widths.numel()), -1).amax(1)


def cheapest_widths(cost: Tensor, size: Tensor, budget: float) -> Tensor:
    """Widths that cost the loss least among those that fit into a budget, by a Lagrange multiplier.

    Args:
        cost: What each width adds to the loss, ``(G, K)``.
        size: Bits of each group at each width, rising along K, ``(G, K)``.
        budget: Bits for all groups.

    Returns:
        Index of the width per group, int64 ``(G,)``.

    Raises:
        ValueError: If even the smallest widths are too large.

    Example:
        >>> cost = torch.tensor([[9.0, 1.0, 0.0], [0.2, 0.1, 0.0]])
        >>> cheapest_widths(cost, torch.tensor([[0, 20, 40], [0, 20, 40]]), budget=45)
        tensor([2, 0])
    """
    cost, size = cost.double(), size.double()
    if float(size[:, 0].sum()) > budget:
        raise ValueError(f"the smallest widths take {float(size[:, 0].sum()):.0f} bits, the budget is {budget:.0f}")

    def choose(price: float) -> Tensor:
        return (cost + price * size).argmin(1)

    def bits(choice: Tensor) -> float:
        return float(size.gather(1, choice.unsqueeze(1)).sum())

    if bits(choose(0.0)) <= budget:
        return choose(0.0)
    low, high = 0.0, 1e-12
    while bits(choose(high)) > budget:
        low, high = high, high * 4
        if high > 1e30:
            return torch.zeros(cost.shape[0], dtype=torch.int64)
    for _ in range(60):
        middle = (low * high) ** 0.5 if low else high / 2
        low, high = (middle, high) if bits(choose(middle)) > budget else (low, middle)
    return _spend_rest(choose(high), cost, size, budget)


def _spend_rest(choice: Tensor, cost: Tensor, size: Tensor, budget: float) -> Tensor:
    """Widen single groups while bits are left, the most useful per bit first."""
    left = budget - float(size.gather(1, choice.unsqueeze(1)).sum())
    gain = cost.gather(1, choice.unsqueeze(1)) - cost
    extra = size - size.gather(1, choice.unsqueeze(1))
    worth = torch.where((extra > 0) & (gain > 0), gain / extra.clamp(min=1), 0.0)
    best, width = worth.max(1)
    for g in best.argsort(descending=True).tolist():
        if float(best[g]) <= 0:
            break
        if float(extra[g, width[g]]) <= left:
            left -= float(extra[g, width[g]])
            choice[g] = width[g]
    return choice

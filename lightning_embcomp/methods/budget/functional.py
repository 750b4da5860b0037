"""The maths of the budget: what an offer costs, how the price moves, which widths fit into bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST_PRICE, LARGEST_PRICE = 1e-9, 10.0
_LEAST_SAVING = 0.1  # share of the step asked for below which an offer is none
_CREDIT = 0.01  # share of the mean error that every value is credited with


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What a method would make of its next step.

    Args:
        method: Its name.
        size: Bytes after the step.
        ne: Validation NE after the step, before any further training.
    """

    method: str
    size: int
    ne: float


def cost_of(offer: Offer, *, size: int, ne: float) -> float:
    r"""Relative increase of NE per e-fold of bytes: :math:`(NE' / NE - 1) / \ln(B / B')`; infinite if nothing is saved.

    Args:
        offer: The step.
        size: Bytes before it.
        ne: NE before it.

    Example:
        >>> round(cost_of(Offer(method="width", size=500, ne=0.808), size=1000, ne=0.8), 4)
        0.0144
    """
    if offer.size >= size:
        return math.inf
    return (offer.ne / ne - 1) / math.log(size / offer.size)


def saves_enough(offer: Offer, *, size: int, target: int) -> bool:
    """Whether a method did at least a tenth of what was asked of it.

    Args:
        offer: What it did.
        size: Bytes before.
        target: Bytes that were asked for.
    """
    return offer.size < size and offer.size <= size - _LEAST_SAVING * (size - target)


def best_offer(offers: Sequence[Offer], *, size: int, ne: float, limit: float, price: float) -> Offer | None:
    """The cheapest step that the price pays for and the guard allows.

    Steps that lower NE cost nothing; of equally cheap ones the larger is taken.

    Args:
        offers: Steps to choose from.
        size: Bytes before.
        ne: NE before.
        limit: Largest NE allowed.
        price: Largest cost that is paid.

    Example:
        >>> offers = [Offer(method="width", size=800, ne=0.82), Offer(method="precision", size=800, ne=0.801)]
        >>> best_offer(offers, size=1000, ne=0.8, limit=0.81, price=0.01).method
        'precision'
    """

    def cost(offer: Offer) -> float:
        return max(0.0, cost_of(offer, size=size, ne=ne))

    paid = [offer for offer in offers if offer.ne <= limit and cost(offer) <= price]
    return min(paid, key=lambda offer: (cost(offer), offer.size), default=None)


def first_price(max_loss: float, *, size: int, budget: int) -> float:
    """The price at which the allowed loss is used up evenly on the whole way to the budget."""
    return max_loss / math.log(size / budget) if size > budget else max_loss


def next_price(price: float, *, size: int, budget: int, tolerance: float, inside: bool, rate: float) -> float:
    """The multiplier rises while bytes exceed the budget; it falls outside the guard, and where bytes are left over.

    Example:
        >>> [next_price(1.0, size=size, budget=100, tolerance=0.02, inside=inside, rate=0.25)
        ...     for size, inside in ((101, True), (99, True), (97, True), (101, False))]
        [1.25, 1.0, 0.8, 0.8]
    """
    if inside and size > budget:
        price *= 1 + rate
    elif not inside or size < (1 - tolerance) * budget:
        price /= 1 + rate
    return min(LARGEST_PRICE, max(SMALLEST_PRICE, price))


def credited_errors(errors: Tensor, values: Tensor) -> Tensor:
    """Errors of groups, with a little of the mean error of a value added.

    Rows that were not seen while errors were measured have none: without a credit they would lose all bits at once.

    Args:
        errors: float64 ``(G, K)``.
        values: Values of each group ``(G,)``.

    Returns:
        float64 ``(G, K)``.
    """
    per_value = errors.sum(0, keepdim=True) / max(1.0, float(values.sum()))
    return errors + _CREDIT * per_value * values.double().unsqueeze(1)


def widths_within(cost: Tensor, size: Tensor, budget: float) -> Tensor:
    """Widths whose errors are smallest among those that fit, at one price of a byte for all groups.

    Args:
        cost: Error of each group at each width, ``(G, K)``; infinite where a width is not allowed.
        size: Bytes of each group at each width, rising along K, ``(G, K)``.
        budget: Bytes for all groups.

    Returns:
        Index of the width per group, int64 ``(G,)``; the smallest allowed ones if nothing fits.

    Example:
        >>> cost = torch.tensor([[9.0, 1.0, 0.0], [0.2, 0.1, 0.0]])
        >>> widths_within(cost, torch.tensor([[0, 20, 40], [0, 20, 40]]), budget=45)
        tensor([2, 0])
    """
    cost, size = cost.double(), size.double()

    def choose(price: float) -> Tensor:
        # Widest first, so that of equal ones the wider is taken.
        return cost.shape[1] - 1 - (cost + price * size).flip(1).argmin(1)

    def taken(choice: Tensor) -> float:
        return float(size.gather(1, choice.unsqueeze(1)).sum())

    if taken(choose(0.0)) <= budget:
        return choose(0.0)
    low, high = 0.0, 1e-12
    while taken(choose(high)) > budget:
        low, high = high, high * 4
        if high > 1e30:
            return torch.isfinite(cost).long().argmax(1)
    for _ in range(60):
        middle = (low * high) ** 0.5 if low else high / 2
        low, high = (middle, high) if taken(choose(middle)) > budget else (low, middle)
    return choose(high)

r"""Maths of frequency-aware learning rates: how often rows are looked up, and a summary of their rates [1]_.

References:
    .. [1] Frequency-aware SGD for efficient embedding learning with provable benefits, ICLR 2022,
       https://arxiv.org/abs/2110.04844
"""

from __future__ import annotations

import torch
from torch import Tensor


def lookup_frequency(counts: Tensor, steps: float, *, presence: bool) -> Tensor:
    r"""Expected lookups of a row per step, from how often each id occurs in an epoch.

    Ids without an occurrence are taken to occur once. A step draws n = Σ counts / steps ids; the expected number of
    occurrences is :math:`n q_k` with :math:`q_k` the share of id k, the probability of presence
    :math:`1 - (1 - q_k)^n`.

    Args:
        counts: Occurrences per epoch, ``(R,)``, not negative.
        steps: Steps per epoch.
        presence: Whether several occurrences in one step count as one.

    Returns:
        float64 tensor of shape ``(R,)``, positive.

    Example:
        >>> lookup_frequency(torch.tensor([0, 98, 1]), steps=50, presence=False)
        tensor([0.0200, 1.9600, 0.0200], dtype=torch.float64)
        >>> lookup_frequency(torch.tensor([50, 50]), steps=50, presence=True)
        tensor([0.7500, 0.7500], dtype=torch.float64)
    """
    occurrences = counts.double().clamp(min=1.0)
    draws = float(occurrences.sum()) / steps
    if not presence:
        return occurrences / steps
    return -torch.expm1(draws * torch.log1p(-occurrences / occurrences.sum()))


def decile_means(counts: Tensor, rates: Tensor) -> Tensor:
    """Mean rate of the rows in each tenth of the rows, from the rarest to the most frequent.

    Args:
        counts: ``(n,)``.
        rates: ``(n,)``.

    Returns:
        float64 tensor of shape ``(10,)``, or of length n if there are fewer than ten rows.

    Example:
        >>> decile_means(torch.arange(20.0), torch.arange(20.0))[:2]
        tensor([0.5000, 2.5000], dtype=torch.float64)
    """
    ordered = rates.double()[torch.argsort(counts, stable=True)]
    return torch.stack([part.mean() for part in ordered.tensor_split(min(10, ordered.numel()))])

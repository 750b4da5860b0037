r"""Maths of frequency-aware learning rates: multipliers :math:`m_k` of the rate of row k.

The square root law is that of FA-SGD and CF-SGD [1]_.

References:
    .. [1] Frequency-aware SGD for efficient embedding learning with provable benefits, ICLR 2022,
       https://arxiv.org/abs/2110.04844
"""

from __future__ import annotations

import torch
from torch import Tensor


def known_multipliers(frequency: Tensor, horizon: float) -> Tensor:
    r"""FA-SGD: :math:`m_k = 1 / \sqrt{T p_k}`.

    Args:
        frequency: Lookups :math:`p_k` per step, positive.
        horizon: Steps T of the run.

    Example:
        >>> known_multipliers(torch.tensor([1.0, 0.01]), horizon=100)
        tensor([0.1000, 1.0000])
    """
    return (horizon * frequency).rsqrt()


def running_multipliers(counts: Tensor) -> Tensor:
    r"""CF-SGD without a horizon: :math:`m_k = 1 / \sqrt{N_k}`; rows never seen count as seen once.

    Example:
        >>> running_multipliers(torch.tensor([0.0, 1.0, 4.0]))
        tensor([1.0000, 1.0000, 0.5000])
    """
    return counts.clamp(min=1.0).rsqrt()


def horizon_multipliers(counts: Tensor, step: int, horizon: float) -> Tensor:
    r"""CF-SGD as published: :math:`m_k = \sqrt{t / (T N_k)}`, that is FA-SGD with :math:`p_k \approx N_k / t`.

    Args:
        counts: Lookups :math:`N_k` up to and with step t.
        step: Step t, from 1.
        horizon: Steps T of the run.

    Example:
        >>> horizon_multipliers(torch.tensor([1.0, 25.0]), step=25, horizon=100)
        tensor([0.5000, 0.1000])
    """
    return running_multipliers(counts) * (step / horizon) ** 0.5


def decayed_counts(counts: Tensor, seen: Tensor, half_life: float) -> Tensor:
    r"""One step of counts that halve every h steps: :math:`c \leftarrow 2^{-1/h} c + [\text{seen}]`.

    For a row that is looked up with probability p per step they tend to :math:`p / (1 - 2^{-1/h}) \approx p h / \ln 2`.

    Args:
        counts: Counts before the step.
        seen: Lookups of the step.
        half_life: Half-life h in steps.
    """
    return counts * 2.0 ** (-1.0 / half_life) + seen


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

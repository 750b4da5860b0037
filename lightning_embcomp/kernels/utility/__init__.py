"""Accumulate the utility of logical rows from the gradients of the pooled output, and let it decay."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_embcomp.kernels.dispatch import choose
from lightning_embcomp.kernels.types import BagLayout
from lightning_embcomp.kernels.utility import cpu, reference

__all__ = ["UtilityKind", "accumulate_utility", "decay_utility"]

UtilityKind = Literal["gradient", "frequency", "peak_gradient"]


def accumulate_utility(
    utility: Tensor,
    row_start: Tensor,
    indices: Tensor,
    offsets: Tensor,
    layout: BagLayout,
    norms: Tensor,
    weights: Tensor | None,
    kind: UtilityKind,
    seed: int,
    number: Tensor | None = None,
) -> None:
    r"""Add what every occurrence of an id in the batch contributes to its row's utility, in place.

    ``gradient`` adds :math:`\lVert g \rVert_2` per occurrence (frequency times mean gradient), ``frequency`` adds one,
    ``peak_gradient`` keeps the largest norm. Sums are rounded to bfloat16 stochastically, so that small contributions
    to a large sum survive on average; the pseudo-random bits are a hash of ``seed``, the number of the row and the
    sample, hence the same however the tables are sharded.

    Args:
        utility: bfloat16 tensor of shape ``(rows of all tables, parts)``, changed in place.
        row_start: First row of each table in ``utility``, int64 ``(T,)``.
        indices: Logical ids, ``(N,)``, in range.
        offsets: Bag boundaries, ``(bags + 1,)``.
        layout: Features of the bags.
        norms: Norms of :func:`lightning_embcomp.kernels.assemble.bag_norms`, ``(bags, parts)``.
        weights: Per-sample weights ``(N,)``, or None.
        kind: What an occurrence contributes.
        seed: Changes from step to step.
        number: Number of each table's first row, int64 ``(T,)``; ``row_start`` by default.
    """
    kernel = choose(utility.device, cpu.accumulate_utility, reference.accumulate_utility)
    kernel(
        utility,
        row_start,
        indices,
        offsets,
        layout,
        norms,
        weights,
        kind,
        seed,
        row_start if number is None else number,
    )


def decay_utility(values: Tensor, factor: float, seed: int, first: int = 0) -> None:
    """Multiply utilities by a factor, in place.

    Products are rounded to bfloat16 stochastically: neighbouring bfloat16 numbers are up to 0.8 % apart, so rounding to
    nearest would drop a decay by less than half of that altogether. Decays that follow each other need different seeds:
    the same bits would round the same values up each time.

    Args:
        values: Contiguous bfloat16 tensor of non-negative numbers, changed in place.
        factor: From 0 to 1.
        seed: The pseudo-random bits are a hash of it and the position of the value.
        first: Position of the first value.

    Raises:
        ValueError: If the factor is outside 0 to 1, or the values are not contiguous bfloat16.

    Example:
        >>> values = torch.tensor([[1.0], [256.0]], dtype=torch.bfloat16)
        >>> decay_utility(values, 0.5, seed=1)
        >>> values.flatten().tolist()
        [0.5, 128.0]
    """
    if not 0.0 <= factor <= 1.0:
        raise ValueError(f"utilities decay by a factor from 0 to 1, not {factor}")
    if values.dtype != torch.bfloat16 or not values.is_contiguous():
        raise ValueError(f"utilities must be contiguous bfloat16, not {values.dtype} with strides {values.stride()}")
    kernel = choose(values.device, cpu.decay_utility, reference.decay_utility)
    kernel(values, factor, seed, first)

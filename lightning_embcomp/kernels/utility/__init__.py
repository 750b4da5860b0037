"""Accumulate the utility of logical rows from the gradients of the pooled output."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from lightning_embcomp.kernels.dispatch import backend_for
from lightning_embcomp.kernels.types import BagLayout
from lightning_embcomp.kernels.utility import cpu, reference

__all__ = ["UtilityKind", "accumulate_utility"]

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
) -> None:
    r"""Add what every occurrence of an id in the batch contributes to its row's utility, in place.

    ``gradient`` adds :math:`\lVert g \rVert_2` per occurrence (frequency times mean gradient), ``frequency`` adds one,
    ``peak_gradient`` keeps the largest norm. Sums are rounded to bfloat16 stochastically, so that small contributions
    to a large sum survive on average; the pseudo-random bits are a hash of ``seed`` and the position of the id.

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
    """
    kernel = cpu.accumulate_utility if backend_for(utility.device) == "cpu" else reference.accumulate_utility
    kernel(utility, row_start, indices, offsets, layout, norms, weights, kind, seed)

"""Apply the fused optimizer to the rows of a batch, straight from the gradient of the pooled output."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_embcomp.kernels.count.rows import RowCounts
from lightning_embcomp.kernels.dispatch import choose
from lightning_embcomp.kernels.types import BagLayout, ClassColumns, IdRoutes
from lightning_embcomp.kernels.update import cpu, reference
from lightning_embcomp.kernels.update.rule import UpdateRule

__all__ = ["UpdateRule", "update_rows"]


def update_rows(
    tables: Sequence[Tensor],
    states: Sequence[Tensor | None],
    rules: Sequence[UpdateRule],
    grad: Tensor,
    routes: IdRoutes,
    offsets: Tensor,
    weights: Tensor | None,
    layout: BagLayout,
    columns: ClassColumns,
    logical: Tensor | None = None,
    counts: RowCounts | None = None,
    second: Sequence[Tensor | None] | None = None,
    step: int = 1,
) -> None:
    r"""Update every row that the batch looked up, once, with the sum of the gradients of its occurrences.

    With :math:`g` that sum over the stored columns: ``sgd`` does :math:`w \leftarrow w - \eta g`; ``rowwise_adagrad``
    adds :math:`\mathrm{mean}(g^2)` to the row's state :math:`m` and does
    :math:`w \leftarrow w - \eta g / (\sqrt{m} + \epsilon)`; ``adagrad`` the same per weight. These are FBGEMM's rules
    for the same optimizers.

    The others keep moments :math:`m \leftarrow \beta_1 m + (1 - \beta_1) g` and :math:`v \leftarrow \beta_2 v +
    (1 - \beta_2) g^2`, the partial ones the mean of :math:`g^2` over the row instead. After :math:`t` steps of the
    whole table a row that is looked up goes along

    .. math:: r = \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon} + \lambda w,

    ``adam`` by :math:`\eta r`, ``lamb`` by :math:`\eta r \lVert w \rVert / \lVert r \rVert`. Norms are over the columns
    that the row stores, before the step. Where one of them is 0 the quotient counts as 1, so that rows which begin at
    zero can leave it; FBGEMM's stay there.

    With ``counts``, every row is counted first, rows without storage included, and ``sgd`` takes the rate of
    :class:`~lightning_embcomp.kernels.count.rows.RowCounts` for tables that have a gain.

    Args:
        tables: Weights of each class, float32 or float16 ``(rows, width)``, changed in place.
        states: State of each class: None, ``(rows,)`` or ``(rows, width)``, float32, changed in place.
        rules: Optimizer and rates of each class; the optimizer is the same for all.
        grad: Gradient of the pooled output, float32 of ``layout.shape``.
        routes: Class and slot of every id.
        offsets: Bag boundaries, ``(bags + 1,)``.
        weights: Per-sample weights, float32 ``(N,)``, or None.
        layout: Output position of each bag.
        columns: Columns that each class stores.
        logical: Logical ids of the batch, ``(N,)``; needed with ``counts``.
        counts: Counters to move and to take step sizes from.
        second: Second moments of each class, like ``states``, which are the first ones then.
        step: Number of this step, from 1.

    Raises:
        ValueError: If rows with step sizes of their own were to be rounded stochastically.
    """
    if rules[0].stochastic_rounding and counts is not None and bool(counts.gain.numpy().any()):
        raise ValueError("rows with step sizes of their own are rounded to nearest only")
    kernel = choose(grad.device, cpu.update_rows, reference.update_rows)
    kernel(tables, states, rules, grad, routes, offsets, weights, layout, columns, logical, counts, second, step)

"""Pool rows that were looked up one by one into bags, where something happens to them in between."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own habit
from torch import Tensor

from lightning_embcomp.engine.bag_layout import FeatureShapes
from lightning_embcomp.kernels.types import BagLayout


def pool_rows(
    rows: Tensor, offsets: Tensor, weights: Tensor | None, layout: BagLayout, shapes: FeatureShapes
) -> Tensor:
    """Sum (or average) the rows of each bag, and put the features side by side; the host does not wait for a GPU.

    Args:
        rows: ``(N, W)``, feature by feature; W is the largest dim.
        offsets: Bag boundaries ``(bags + 1,)``.
        weights: Per-sample weights ``(N,)``, or None.
        layout: Where the bags go.
        shapes: The features, as the host knows them.

    Returns:
        ``(B, ΣD)``.
    """
    batch, features, widths = layout.shape[0], len(shapes.dims), shapes.dims
    offsets = offsets.long()
    lengths, bag_of_id = offsets.diff(), owners(offsets, rows.shape[0])
    if any(shapes.mean):
        per_bag = torch.where(layout.mean.bool(), 1.0, 0.0).repeat_interleave(batch, output_size=features * batch)
        per_id = torch.where(per_bag > 0, 1.0 / lengths.clamp(min=1), 1.0)[bag_of_id].to(rows.dtype)
        weights = per_id if weights is None else weights * per_id
    single = weights is None and rows.shape[0] == lengths.numel()
    # Whether every bag has one id is not asked of a GPU: pooling is quicker than waiting for the answer.
    if not (single and offsets.device.type == "cpu" and bool((lengths == 1).all())):
        weights = None if weights is None else weights.to(rows.dtype)
        rows = _SumBags.apply(rows, weights, offsets, bag_of_id)
    by_feature = rows.view(features, batch, rows.shape[1])
    if len(set(widths)) == 1:
        return by_feature.transpose(0, 1).reshape(batch, layout.shape[1])
    return torch.cat([by_feature[f, :, :width] for f, width in enumerate(widths)], 1)


def owners(bounds: Tensor, n: int) -> Tensor:
    """Which of several consecutive ranges each of the first ``n`` numbers is in; the host does not wait for a GPU.

    Args:
        bounds: First number of each range, and the number after the last, int64; ``n`` on a CPU.
        n: How many numbers.

    Returns:
        int64 ``(n,)``.

    Example:
        >>> owners(torch.tensor([0, 2, 2, 3]), 3).tolist()
        [0, 0, 2]
    """
    if bounds.device.type == "cpu":
        return torch.arange(bounds.numel() - 1).repeat_interleave(bounds.diff(), output_size=n)
    # Wrong bounds are reported late: until then every number has an owner.
    numbers = torch.arange(n, device=bounds.device)
    return torch.searchsorted(bounds[1:].contiguous(), numbers, right=True).clamp(max=bounds.numel() - 2)


class _SumBags(torch.autograd.Function):
    """Weighted sums of consecutive rows; every row is in one bag, so that its gradient is that of the bag."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor | None, offsets: Tensor, bag_of_id: Tensor) -> Tensor:  # noqa: ANN401
        """Sum."""
        trained = weights is not None and weights.requires_grad
        ctx.save_for_backward(bag_of_id, weights, rows if trained else None)
        ids = torch.arange(rows.shape[0], device=rows.device)
        return F.embedding_bag(ids, rows, offsets, mode="sum", include_last_offset=True, per_sample_weights=weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # noqa: ANN401
        """Hand the gradient of each bag to its rows."""
        bag_of_id, weights, rows = ctx.saved_tensors
        grad = grads[0].index_select(0, bag_of_id)
        by_weight = None if rows is None else (grad * rows).sum(1)
        return grad if weights is None else grad * weights.unsqueeze(1), by_weight, None, None

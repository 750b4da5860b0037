"""Pool rows that were looked up one by one into bags, where something happens to them in between."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own habit
from torch import Tensor

from lightning_embcomp.kernels.types import BagLayout


def pool_rows(rows: Tensor, offsets: Tensor, weights: Tensor | None, layout: BagLayout) -> Tensor:
    """Sum (or average) the rows of each bag, and put the features side by side.

    Args:
        rows: ``(N, W)``, feature by feature; W is the largest dim.
        offsets: Bag boundaries ``(bags + 1,)``.
        weights: Per-sample weights ``(N,)``, or None.
        layout: Where the bags go.

    Returns:
        ``(B, ΣD)``.
    """
    lengths = offsets.diff()
    mean = layout.mean.bool()
    if bool(mean.any()):
        per_feature = layout.bag_start.diff()
        scale = torch.where(mean.repeat_interleave(per_feature), 1.0 / lengths.clamp(min=1), 1.0)
        per_id = scale.repeat_interleave(lengths).to(rows.dtype)
        weights = per_id if weights is None else weights * per_id
    single = weights is None and rows.shape[0] == lengths.numel() and bool((lengths == 1).all())
    if not single:
        ids = torch.arange(rows.shape[0], device=rows.device)
        rows = F.embedding_bag(
            ids,
            rows,
            offsets.to(ids.dtype),
            mode="sum",
            include_last_offset=True,
            per_sample_weights=None if weights is None else weights.to(rows.dtype),
        )
    batch, features, widths = layout.shape[0], layout.width.numel(), layout.width.tolist()
    by_feature = rows.view(features, batch, rows.shape[1])
    if len(set(widths)) == 1:
        return by_feature.transpose(0, 1).reshape(batch, layout.shape[1])
    return torch.cat([by_feature[f, :, :width] for f, width in enumerate(widths)], 1)

"""A stand-in for FBGEMM's table behind a cache, which is there for GPUs only."""

from typing import Any

import torch
from torch import Tensor, nn


class Cached(nn.Module):
    """FBGEMM's cached table with SGD, as far as rows can tell: updates reach storage when it is flushed."""

    def __init__(self, spec: tuple[Any, ...], weights: Tensor, learning_rate: float) -> None:
        super().__init__()
        self.spec, self.weights, self.rate = spec, weights.view(spec[0], spec[1]), learning_rate
        self.cache: Tensor | None = None
        self.anchor = nn.Parameter(torch.zeros(0, device=weights.device))

    def forward(self, slots: Tensor, offsets: Tensor, per_sample_weights: Tensor | None = None) -> Tensor:
        if self.cache is None:
            self.cache = self.weights.clone()
        weights = slots.new_ones(slots.numel()).float() if per_sample_weights is None else per_sample_weights
        pooled: Tensor = _Update.apply(self.anchor, self, slots, offsets, weights)
        return pooled

    def flush(self) -> None:
        assert self.cache is not None
        self.weights.copy_(self.cache)

    def reset_cache_states(self) -> None:
        self.cache = None

    def set_learning_rate(self, rate: float) -> None:
        self.rate = rate


class _Update(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, table: Cached, slots: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
        assert slots.dtype == offsets.dtype == torch.int64 and table.cache is not None
        ctx.table, ctx.slots, ctx.weights = table, slots, weights
        ctx.bag = torch.repeat_interleave(torch.arange(offsets.numel() - 1, device=offsets.device), offsets.diff())
        return weights.new_zeros(offsets.numel() - 1, table.spec[1]).index_add_(
            0, ctx.bag, table.cache[slots] * weights.unsqueeze(1)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.table.cache.index_add_(0, ctx.slots, -ctx.table.rate * grads[0][ctx.bag] * ctx.weights.unsqueeze(1))
        return None, None, None, None, None

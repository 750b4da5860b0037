"""Gradient norms of whole rows, for tables that are cut by columns.

A process that holds some columns of a table sees that part of the gradient only. The process that holds the sample sees
all of it, right before TorchRec sends the parts out: it sends the norm along, one float32 per sample and feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchrec.distributed.comm_ops import get_gradient_division
from torchrec.sparse.jagged_tensor import KeyedTensor

from lightning_embcomp.engine.group import Group


class GradientNorms:
    """Norms of the gradients of the samples of all processes.

    Args:
        group: The processes.
        names: Outputs whose norms are needed: those of tables that are cut by columns.
    """

    def __init__(self, group: Group, names: Sequence[str]) -> None:
        self.group = group
        self.names = tuple(names)
        self.wanted = False
        self._norms: Tensor | None = None

    def of_features(self, names: Sequence[str]) -> Tensor | None:
        """Norms of the backward pass that is under way, float32 ``(features · B, 1)``; None if nobody wants them."""
        if self._norms is None:
            return None
        # Not by a list of rows: on a GPU the host would wait for it to arrive.
        return torch.cat([self._norms[self.names.index(name)] for name in names]).unsqueeze(1)

    def watch(self, pooled: KeyedTensor, batches: Sequence[int] | None = None) -> KeyedTensor:
        """Let the gradient of pooled rows pass by; nothing happens to their values.

        Args:
            pooled: The rows.
            batches: Samples of every process; None if they are not known.
        """
        if not self.wanted or not torch.is_grad_enabled():
            return pooled
        values = _Watch.apply(pooled.values(), self, pooled.keys(), pooled.length_per_key(), batches)
        return KeyedTensor(keys=pooled.keys(), length_per_key=pooled.length_per_key(), values=values)

    def measure(
        self, grad: Tensor, keys: Sequence[str], widths: Sequence[int], batches: Sequence[int] | None = None
    ) -> None:
        """Exchange the norms of one gradient ``(B, ΣD)``."""
        by_name = dict(zip(keys, grad.split(list(widths), 1), strict=True))
        local = torch.stack([by_name[name].float().norm(dim=1) for name in self.names], 1)
        gathered = torch.cat(self.group.gather_uneven(local, batches))
        # TorchRec sends the gradient of the mean over processes.
        self._norms = gathered.t() / (self.group.size if get_gradient_division() else 1)


class _Watch(torch.autograd.Function):
    """Identity that looks at its gradient."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        values: Tensor,
        norms: GradientNorms,
        keys: list[str],
        widths: list[int],
        batches: Sequence[int] | None,
    ) -> Tensor:
        """Nothing happens to the values."""
        ctx.norms, ctx.keys, ctx.widths, ctx.batches = norms, keys, widths, batches
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # noqa: ANN401
        """Measure and hand on."""
        ctx.norms.measure(grads[0], ctx.keys, ctx.widths, ctx.batches)
        return grads[0], None, None, None, None

"""Engines as the lookups of TorchRec's sharded modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from lightning_embcomp.engine.group import Group
from lightning_embcomp.engine.routed import RoutedEmbeddings, RoutedOptions
from lightning_embcomp.engine.sharded.norms import GradientNorms
from lightning_embcomp.engine.sharded.parts import LocalTable


class RoutedLookup(nn.Module):
    """Looks pooled rows of the parts of this process up, for the samples of all processes.

    Args:
        parts: Parts, in the order of the features; empty on a process that holds none.
        options: How rows are stored and trained.
        is_weighted: Whether batches carry per-sample weights.
        norms: Gradient norms of tables that are cut by columns.
    """

    def __init__(
        self,
        parts: Sequence[LocalTable],
        options: RoutedOptions,
        *,
        is_weighted: bool,
        norms: GradientNorms | None = None,
    ) -> None:
        super().__init__()
        self.parts = tuple(parts)
        self.is_weighted = is_weighted
        self.engine: RoutedEmbeddings | None = None
        if parts:
            features = [p for p, part in enumerate(parts) for _ in part.features]
            self.engine = RoutedEmbeddings(
                [part.logical for part in parts], features, [parts[p].mean for p in features], options
            )
            if norms is not None:
                names = [name for part in parts for name in part.features]
                self.engine.whole_norms = lambda: norms.of_features(names)

    def forward(self, sparse_features: KeyedJaggedTensor) -> Tensor:
        """Pooled rows ``(B, ΣD)`` of the parts of this process."""
        if self.engine is None:
            return torch.empty(sparse_features.stride(), 0, device=sparse_features.device(), requires_grad=True)
        weights = sparse_features.weights() if self.is_weighted else None
        return self.engine(sparse_features.values(), sparse_features.offsets(), weights)


class ReplicatedLookup(RoutedLookup):
    """Looks up in copies of tables that every process holds, and keeps the copies equal.

    The backward pass gathers ids and gradients of all processes, so that every copy makes the same update: the fused
    optimizer is the one that was asked for, and statistics see every sample. Where other tables wait for the sizes of
    what they are sent, in the forward pass, these do too; the backward pass waits for nothing.

    Args:
        parts: Whole tables, in the order of the features.
        options: How rows are stored and trained.
        group: The processes.
        is_weighted: Whether batches carry per-sample weights.
    """

    def __init__(self, parts: Sequence[LocalTable], options: RoutedOptions, group: Group, *, is_weighted: bool) -> None:
        super().__init__(parts, options, is_weighted=is_weighted)
        self.group = group

    def forward(self, sparse_features: KeyedJaggedTensor) -> Tensor:
        """Pooled rows ``(B, ΣD)`` for the samples of this process."""
        if self.engine is None or not torch.is_grad_enabled():
            return super().forward(sparse_features)
        weights = sparse_features.weights() if self.is_weighted else None
        if weights is not None and weights.requires_grad:
            raise RuntimeError(
                "per-sample weights of data-parallel tables cannot be trained: detach them, or shard the tables"
            )
        anchor = torch.zeros((), requires_grad=True)
        found: Tensor = _Replicated.apply(self, anchor, sparse_features.values(), sparse_features.offsets(), weights)
        return found


class _Replicated(torch.autograd.Function):
    """Forward on the samples of this process, backward and update on those of all."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        lookup: ReplicatedLookup,
        anchor: Tensor,
        values: Tensor,
        offsets: Tensor,
        weights: Tensor | None,
    ) -> Tensor:
        """Look up."""
        assert lookup.engine is not None
        ctx.lookup, ctx.batch = lookup, (values, offsets, weights)
        ctx.sizes = gather_sizes(lookup.group, len(lookup.engine.feature_tables), offsets)
        return lookup.engine(values, offsets, weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # noqa: ANN401
        """Gather, and train on the samples of all processes."""
        lookup: ReplicatedLookup = ctx.lookup
        engine, group = lookup.engine, lookup.group
        assert engine is not None
        values, offsets, weights = gather_batch(group, ctx.sizes, *ctx.batch)
        grad = torch.cat(group.gather_uneven(grads[0].contiguous(), [bags for bags, *_ in ctx.sizes])) / group.size
        with torch.enable_grad():
            engine(values, offsets, weights).backward(grad)
        return None, None, None, None, None


def gather_sizes(group: Group, features: int, offsets: Tensor) -> list[list[int]]:
    """Sizes of the batches of all processes, for which the host waits.

    Args:
        group: The processes.
        features: Features of the batch.
        offsets: Bag boundaries ``(features · B + 1,)``.

    Returns:
        For every process its number of samples B, and of ids of each feature.
    """
    samples = (offsets.numel() - 1) // features
    ids = offsets.diff().view(features, samples).sum(1)
    found: list[list[int]] = group.gather(torch.cat([ids.new_full((1,), samples), ids])).tolist()
    return found


def gather_batch(
    group: Group, sizes: Sequence[Sequence[int]], values: Tensor, offsets: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Bring the bags of all processes together: feature by feature, within a feature by rank.

    Args:
        group: The processes.
        sizes: From :func:`gather_sizes`.
        values: Ids of this process ``(N,)``.
        offsets: Bag boundaries ``(features · B + 1,)``.
        weights: Per-sample weights ``(N,)``, or None.

    Returns:
        Ids, bag boundaries and weights of all processes.
    """
    per_feature = [list(ids) for _, *ids in sizes]
    features = len(per_feature[0])
    bags = [features * samples for samples, *_ in sizes]
    gathered_lengths = group.gather_uneven(offsets.diff(), bags)
    lengths = [part.view(features, len(part) // features) for part in gathered_lengths]
    # Ids are padded to the longest: one gather of equal sizes is what every backend has.
    total = [sum(ids) for ids in per_feature]
    ids = group.gather_uneven(values, total)

    def interleave(parts: Sequence[Tensor]) -> Tensor:
        pieces = [part.split(counts) for part, counts in zip(parts, per_feature, strict=True)]
        return torch.cat([piece[f] for f in range(features) for piece in pieces])

    in_order = torch.cat(lengths, 1).flatten()
    boundaries = torch.cat([in_order.new_zeros(1), in_order.cumsum(0)]).to(offsets.dtype)
    gathered = None if weights is None else interleave(group.gather_uneven(weights.detach(), total))
    return interleave(ids), boundaries, gathered

"""Autograd of a lookup: over the outputs of class tables, or straight on the class tables."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_embcomp.engine.statistics import RowUtility
from lightning_embcomp.kernels.assemble import assemble, disassemble
from lightning_embcomp.kernels.count import RowCounts
from lightning_embcomp.kernels.count.reference import row_gain
from lightning_embcomp.kernels.pool import pool
from lightning_embcomp.kernels.route import find
from lightning_embcomp.kernels.types import BagLayout, RoutedBatch
from lightning_embcomp.kernels.update import UpdateRule, update_rows

if TYPE_CHECKING:
    from lightning_embcomp.engine.routed import RoutedEmbeddings


@dataclass(frozen=True)
class Call:
    """What the backward pass of one lookup needs to know."""

    engine: RoutedEmbeddings
    layout: BagLayout
    indices: Tensor
    offsets: Tensor
    weights: Tensor | None
    utility: RowUtility | None
    moves: int
    training: bool = True
    multipliers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Distinct slots of a class and the multipliers of their gradients, from the backward pass."""

    def begin_backward(self, grad: Tensor, *, deferred: bool = False) -> RowCounts | None:
        """Count the step, the rows, and feed the row utilities.

        Args:
            grad: Gradient of the pooled output.
            deferred: Whether the kernel that the result is handed to counts the rows.

        Returns:
            Counters and step sizes, if the engine has any.

        Raises:
            RuntimeError: If the slots that were looked up are not those of today.
        """
        if self.moves != self.engine.moves:
            raise RuntimeError(
                "rows have moved (pruning event or load_state_dict) between the lookup and its backward pass: run"
                " backward first"
            )
        self.engine.count_step()
        if self.utility is not None:
            norms = self._whole_norms()
            self.utility.observe(grad, self.indices, self.offsets, self.layout, self.weights, norms)
        counting = self.engine.counting
        if not counting.active:
            return None
        return counting.count(self.indices, self.offsets, self.layout, moving=self.training, deferred=deferred)

    def _whole_norms(self) -> Tensor | None:
        """Norms of the gradients of whole rows, per id of each bag, where the engine sees some columns only."""
        found = None if self.engine.whole_norms is None else self.engine.whole_norms()
        if found is None:
            return None
        features = torch.arange(self.layout.table.numel(), device=self.layout.table.device)
        feature = torch.repeat_interleave(features, self.layout.bag_start.diff())
        lengths = self.offsets.long().diff().clamp(min=1)
        mean = self.layout.mean[feature] == 1
        return (found / torch.where(mean, lengths, 1).unsqueeze(1)).contiguous()


class AssembleClasses(torch.autograd.Function):
    """Zero-padded sum of the class outputs."""

    @staticmethod
    def forward(ctx: Any, call: Call, batch: RoutedBatch, anchor: Tensor, *pooled: Tensor) -> Tensor:  # noqa: ANN401
        """Assemble; ``pooled`` are the outputs of the classes that have bags."""
        ctx.call, ctx.batch = call, batch
        given = iter(pooled)
        aligned = [next(given) if last > first else None for first, last in pairwise(batch.id_start)]
        return assemble(aligned, call.offsets, batch, call.layout, call.engine.columns)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # noqa: ANN401
        """Hand each class its part of the gradient."""
        call: Call = ctx.call
        counts = call.begin_backward(grads[0])
        if counts is not None and call.engine.counting.rates:
            call.multipliers.update(trained_multipliers(call, counts, ctx.batch))
        parts = disassemble(grads[0], call.offsets, ctx.batch, call.layout, call.engine.columns)
        return (None, None, None, *[part for part in parts if part is not None])


class DirectLookup(torch.autograd.Function):
    """Lookup and fused update on the class tables themselves."""

    @staticmethod
    def forward(ctx: Any, call: Call, rules: list[UpdateRule], anchor: Tensor) -> Tensor:  # noqa: ANN401
        """Route and pool."""
        engine = call.engine
        routes = find(call.indices, call.offsets, call.layout, engine.router.tensors, len(engine.classes))
        ctx.call, ctx.rules, ctx.routes = call, rules, routes
        weights = None if call.weights is None else call.weights.float()
        return pool(engine.split_embedding_weights(), routes, call.offsets, weights, call.layout, engine.columns)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # noqa: ANN401
        """Update the rows; there is nothing to hand on."""
        call: Call = ctx.call
        counts = call.begin_backward(grads[0], deferred=True)
        engine = call.engine
        update_rows(
            engine.split_embedding_weights(),
            [state.get("momentum1") for state in engine.get_optimizer_state()],
            ctx.rules,
            grads[0],
            ctx.routes,
            call.offsets,
            None if call.weights is None else call.weights.float(),
            call.layout,
            engine.columns,
            call.indices,
            counts,
        )
        return None, None, None


class ScaleRowGradients(torch.autograd.Function):
    """The parameter of a class as it is; its gradient, dense or sparse, row by row times a multiplier."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, call: Call, row_class: int) -> Tensor:  # noqa: ANN401
        """Nothing happens to the values."""
        ctx.call, ctx.row_class = call, row_class
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # noqa: ANN401
        """Scale the rows of this lookup; all others have no gradient."""
        slots, multipliers = ctx.call.multipliers.pop(ctx.row_class)
        grad = grads[0]
        if grad.is_sparse:
            position = torch.searchsorted(slots, grad._indices()[0])
            values = grad._values() * multipliers[position].to(grad.dtype).unsqueeze(1)
            scaled = torch.sparse_coo_tensor(grad._indices(), values, grad.shape, check_invariants=False)
            return scaled, None, None
        # In place: the lookup is the only reader of what forward returned, so nobody else holds this gradient.
        grad[slots] *= multipliers.to(grad.dtype).unsqueeze(1)
        return grad, None, None


def trained_multipliers(call: Call, counts: RowCounts, batch: RoutedBatch) -> dict[int, tuple[Tensor, Tensor]]:
    """Multipliers of the gradients of the rows that a lookup touched, for each class that another optimizer trains.

    Returns:
        Distinct slots, rising, and float32 multipliers of the same length, by class.
    """
    layout, offsets = call.layout, call.offsets.long()
    ids_per_feature = offsets[layout.bag_start].diff()
    table_of_id = torch.repeat_interleave(layout.table, ids_per_feature)
    found = {}
    for c, rows in enumerate(call.engine.classes):
        span = slice(batch.id_start[c], batch.id_start[c + 1])
        rate = getattr(rows, "learning_rate", None)
        position = batch.positions[span].long()
        if position.numel() == 0:
            continue
        multipliers = torch.ones(position.numel())
        for t, rates in call.engine.counting.rates.items():
            mine = table_of_id[position] == t
            gain = row_gain(counts, t, call.indices[position[mine]].long())
            assert gain is not None
            if math.isfinite(rates.cap):
                if not rate:
                    raise RuntimeError("a largest rate needs the rate of the optimizer, which is not known yet")
                gain = gain.clamp(max=rates.cap / rate)
            multipliers[mine] = gain
        slots, inverse = torch.unique(batch.slots[span].long(), return_inverse=True)
        found[c] = (slots, torch.empty(slots.numel()).scatter_(0, inverse, multipliers))
    return found

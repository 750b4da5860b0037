"""Autograd of a lookup: over the outputs of class tables, or straight on the class tables."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_embcomp.engine.bags import owners
from lightning_embcomp.engine.row_class import FusedRows
from lightning_embcomp.engine.statistics import RowUtility
from lightning_embcomp.kernels.assemble import assemble, disassemble
from lightning_embcomp.kernels.count import RowCounts, row_gains
from lightning_embcomp.kernels.pool import pool
from lightning_embcomp.kernels.route import find
from lightning_embcomp.kernels.transfer import on_device
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
    """Slots of a class that were looked up and the multipliers of their gradients, from the backward pass."""

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
            grad = unscaled(grad, self.engine.loss_scaler)
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
        bags = self.offsets.numel() - 1  # told, so that the host need not wait for it
        feature = torch.repeat_interleave(features, self.layout.bag_start.diff(), output_size=bags)
        lengths = self.offsets.long().diff().clamp(min=1)
        mean = self.layout.mean[feature] == 1
        return (found / torch.where(mean, lengths, 1).unsqueeze(1)).contiguous()


def unscaled(found: Tensor, scaler: torch.amp.GradScaler | None, power: int = 1) -> Tensor:
    """What follows from gradients of the loss, without the factor that 16-bit training gives the loss.

    Args:
        found: The gradients, or what was made from them.
        scaler: Knows the factor; None if there is none.
        power: Power of the factor.

    Returns:
        The same divided by the factor; numbers that the factor has made too large are 0, since their step is skipped.
    """
    if scaler is None:
        return found
    factor = scaler.scale(torch.ones((), device=found.device))  # the host does not wait for it
    return (found / factor**power).nan_to_num(0.0, 0.0, 0.0)


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
        states = engine.get_optimizer_state()
        update_rows(
            engine.split_embedding_weights(),
            [state.get("momentum1") for state in states],
            ctx.rules,
            grads[0],
            ctx.routes,
            call.offsets,
            None if call.weights is None else call.weights.float(),
            call.layout,
            engine.columns,
            call.indices,
            counts,
            [state.get("momentum2") for state in states],
            max(rows.step for rows in engine.classes if isinstance(rows, FusedRows)),
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
        multipliers = multipliers.to(grad.dtype)
        if grad.is_sparse:
            rising, order = slots.sort()
            of_row = order[torch.searchsorted(rising, grad._indices()[0])]
            values = grad._values() * multipliers[of_row].unsqueeze(1)
            scaled = torch.sparse_coo_tensor(grad._indices(), values, grad.shape, check_invariants=False)
            return scaled, None, None
        # In place: the lookup is the only reader of what forward returned, so nobody else holds this gradient. A row
        # that was looked up several times is written several times, with the same values.
        grad[slots] = grad[slots] * multipliers.unsqueeze(1)
        return grad, None, None


def trained_multipliers(call: Call, counts: RowCounts, batch: RoutedBatch) -> dict[int, tuple[Tensor, Tensor]]:
    """Multipliers of the gradients of the rows that a lookup touched, for each class that another optimizer trains.

    Returns:
        Slots that were looked up, as often as they were, and float32 multipliers of the same length, by class.
    """
    caps = _caps(call)
    gains = row_gains(counts, call.indices, call.offsets, call.layout)
    found = {}
    for c, rows in enumerate(call.engine.classes):
        span = slice(batch.id_start[c], batch.id_start[c + 1])
        position = batch.positions[span].long()
        if position.numel() == 0:
            continue
        multipliers = gains[position]
        if caps is not None:
            rate = getattr(rows, "learning_rate", None)
            if not rate:
                raise RuntimeError("a largest rate needs the rate of the optimizer, which is not known yet")
            multipliers = torch.minimum(multipliers, (caps[position] / rate).float())
        found[c] = (batch.slots[span].long(), multipliers)
    return found


def _caps(call: Call) -> Tensor | None:
    """Largest rate of the row of each id, float64; None if no table has one."""
    rates = call.engine.counting.rates
    if all(math.isinf(found.cap) for found in rates.values()):
        return None
    of_table = [rates[t].cap if t in rates else math.inf for t in range(len(call.engine.tables))]
    caps = on_device(torch.tensor(of_table, dtype=torch.float64), call.indices.device)[call.layout.table]
    return caps[owners(call.offsets.long()[call.layout.bag_start], call.indices.numel())]

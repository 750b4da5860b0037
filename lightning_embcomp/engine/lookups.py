"""Autograd of a lookup: over the outputs of class tables, or straight on the class tables."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_embcomp.engine.statistics import RowUtility
from lightning_embcomp.kernels.assemble import assemble, disassemble
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

    def begin_backward(self, grad: Tensor) -> None:
        """Count the step and feed the row utilities.

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
            self.utility.observe(grad, self.indices, self.offsets, self.layout, self.weights)


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
        call.begin_backward(grads[0])
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
        call.begin_backward(grads[0])
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
        )
        return None, None, None

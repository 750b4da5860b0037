"""The tables of TorchRec's fused collections, wherever they are in a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


def fused_tables(model: nn.Module) -> list[Tensor]:
    """Weights of all tables, each ``(rows, columns)``; writing to them changes what is looked up."""
    lookups = [lookup for module in model.modules() for lookup in getattr(module, "_emb_modules", [])]
    return [weight.detach() for lookup in lookups for weight in lookup.split_embedding_weights()]


def fused_states(model: nn.Module) -> list[Tensor]:
    """State of the fused optimizers of all tables."""
    lookups = [lookup for module in model.modules() for lookup in getattr(module, "_emb_modules", [])]
    states = [state for lookup in lookups for state in lookup._emb_module.split_optimizer_states()]
    return [tensor for state in states for tensor in state]


@contextmanager
def replaced(tables: list[Tensor], values: list[Tensor]) -> Iterator[None]:
    """Let tables hold other values for the length of the block.

    Args:
        tables: What :func:`fused_tables` returned.
        values: New values, of the same shapes.
    """
    before = [table.clone() for table in tables]
    try:
        for table, value in zip(tables, values, strict=True):
            table.copy_(value)
        yield
    finally:
        for table, value in zip(tables, before, strict=True):
            table.copy_(value)

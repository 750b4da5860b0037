"""Measure the embedding tables of a model in memory, from the storages that PyTorch allocated."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection, FusedEmbeddingCollection

from lightning_embcomp.engine.hosts import RoutedHost
from lightning_embcomp.engine.layout import LogicalTable
from lightning_embcomp.engine.memory import TableMemory, table_memory
from lightning_embcomp.engine.routed import RoutedEmbeddings
from lightning_embcomp.engine.router import slabs
from lightning_embcomp.engine.row_class import WEIGHT
from lightning_embcomp.report.account import total_memory
from lightning_embcomp.tables import find_hosts


def measure(root: nn.Module, optimizers: Sequence[torch.optim.Optimizer] = ()) -> TableMemory:
    """Bytes of all embedding tables of a model, plain or compressed, by kind.

    What is counted is the memory that PyTorch holds (``untyped_storage().nbytes()``), each storage once, however many
    tensors look at it.

    Args:
        root: Any module, such as a LightningModule.
        optimizers: Optimizers whose state of table parameters is counted; fused optimizers are found by themselves.

    Returns:
        Sums over all tables, called ``total``. For plain tables held and plain bytes are the same.

    Example:
        >>> memory = measure(nn.ModuleDict({"user": nn.EmbeddingBag(10, 4)}))
        >>> memory.weights, memory.total, memory.ratio
        (160, 160, 1.0)
    """
    return total_memory(_measure_host(host.module, optimizers) for host in find_hosts(root))


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind tensors, each storage once.

    Example:
        >>> table = torch.zeros(10, 4)
        >>> storage_bytes([table[:5], table[5:]])
        160
    """
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
    return sum(storages.values())


def live_fractions(engine: RoutedEmbeddings, table: int) -> np.ndarray:
    """Share of its columns that every logical row stores, float32 of shape ``(R,)``.

    Args:
        engine: The engine.
        table: Table index.
    """
    logical = engine.tables[table]
    share = _share_by_code(logical)
    parts = [share[engine.router.read(table, start, stop)[0].long()].numpy() for start, stop in slabs(logical.rows)]
    return np.concatenate(parts)


def _share_by_code(table: LogicalTable) -> Tensor:
    return torch.tensor([len(table.live_chunks(code)) / table.chunks for code in range(table.codes)])


def _measure_host(module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> TableMemory:
    parameters = list(module.parameters())
    trained = [
        value
        for optimizer in optimizers
        for parameter in parameters
        for value in optimizer.state.get(parameter, {}).values()
        if isinstance(value, Tensor) and value.dim() > 0
    ]
    if isinstance(module, RoutedHost):
        return _measure_engine(module.engine, trained)
    weights = storage_bytes(parameters)
    state = storage_bytes(trained)
    if isinstance(module, FusedEmbeddingBagCollection | FusedEmbeddingCollection):
        fused = module.fused_optimizer().state_dict()["state"]
        state += storage_bytes(tensor for table in fused.values() for tensor in table.values())
    rows = sum(parameter.shape[0] for parameter in parameters)
    return TableMemory(
        name="plain",
        rows=rows,
        dim=0,
        weights=weights,
        optimizer_state=state,
        router=0,
        statistics=0,
        plain_weights=weights,
        plain_optimizer_state=state,
    )


def _measure_engine(engine: RoutedEmbeddings, trained: Sequence[Tensor]) -> TableMemory:
    storages = [(name, storage.tensor) for rows in engine.classes for name, storage in rows.storages().items()]
    expected = total_memory(table_memory(engine, t) for t in range(len(engine.tables)))
    return TableMemory(
        name="compressed",
        rows=expected.rows,
        dim=0,
        weights=storage_bytes(tensor for name, tensor in storages if name == WEIGHT),
        optimizer_state=storage_bytes([*trained, *(tensor for name, tensor in storages if name != WEIGHT)]),
        router=storage_bytes([engine.router.tensors.words]),
        statistics=expected.statistics,
        plain_weights=expected.plain_weights,
        plain_optimizer_state=expected.plain_optimizer_state or _plain_state(engine, trained, expected),
    )


def _plain_state(engine: RoutedEmbeddings, trained: Sequence[Tensor], memory: TableMemory) -> int:
    """State that the user's optimizer would hold for plain tables: as much per weight and per row as it does now."""
    parameters = [weight for weight in engine.split_embedding_weights() if weight.numel()]
    shapes = {tuple(weight.shape) for weight in parameters}
    per_weight = sum(t.numel() * t.element_size() for t in trained if tuple(t.shape) in shapes)
    per_row = sum(t.numel() * t.element_size() for t in trained if tuple(t.shape) not in shapes)
    weights = sum(weight.numel() for weight in parameters)
    rows = sum(weight.shape[0] for weight in parameters)
    plain_weights = memory.plain_weights // engine.options.dtype.itemsize
    return round(per_weight / max(1, weights) * plain_weights + per_row / max(1, rows) * memory.rows)

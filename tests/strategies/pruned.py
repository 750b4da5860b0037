"""Small runs of a click model whose sharded tables are pruned, for comparisons between devices."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_embcomp import DimensionPruning, PruningSchedule
from lightning_embcomp.data import SyntheticClickLog, SyntheticClickLogDataModule
from lightning_embcomp.engine.host import EngineHost
from lightning_embcomp.engine.routed import RoutedEmbeddings
from lightning_embcomp.models import ClickModel
from tests.strategies.checks import trainer

ROWS = (40, 300, 900)
KINDS = {
    "sgd": {"*_0": "row_wise", "*_1": "column_wise", "*_2": "data_parallel"},
    "rowwise_adagrad": {"*_0": "data_parallel", "*_1": "table_wise", "*_2": "row_wise"},
}
"""Sharding types by optimizer: by columns, row-wise Adagrad would train otherwise than as a whole."""


def data() -> SyntheticClickLogDataModule:
    return SyntheticClickLogDataModule(
        SyntheticClickLog(num_rows=1600, num_embeddings=ROWS, num_dense=2), batch_size=32
    )


def runner(strategy: Any, epochs: int, **settings: Any) -> pl.Trainer:
    """Five batches per epoch, and pruning events in each."""
    callback = DimensionPruning(target=0.6, schedule=PruningSchedule(every_n_steps=3, early_steps=(2,)))
    return trainer(strategy, callbacks=[callback], max_epochs=epochs, limit_train_batches=5, **settings)


def model(optimizer: str, *, late: bool) -> ClickModel:
    """Its tables are built by the trainer if ``late``."""
    torch.manual_seed(3)
    made = ClickModel(
        embedding_dim=16,
        dense_layers=(8,),
        over_layers=(8,),
        embedding_optimizer=optimizer,  # type: ignore[arg-type]
        features=data().features,
        num_dense=2,
    )
    if not late:
        made.configure_model()
    return made


def hosts(module: ClickModel) -> list[EngineHost]:
    return [part for part in module.modules() if isinstance(part, EngineHost)]


def engines(module: ClickModel) -> list[RoutedEmbeddings]:
    return [engine for host in hosts(module) for engine in host.engines]


def held(module: ClickModel) -> dict[str, Tensor]:
    """All that this process holds, in host memory."""
    found = {name: value.detach().cpu().clone() for name, value in module.named_parameters()}
    for e, engine in enumerate(engines(module)):
        tensors = [storage.tensor for rows in engine.classes for storage in rows.storages().values()]
        assert engine.utility is not None
        tensors += [engine.router.tensors.words, engine.utility.values, engine.utility.gain]
        found |= {f"engine {e} {i}": tensor.cpu().clone() for i, tensor in enumerate(tensors)}
    return found


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        rtol = 2.0**-7 if tensor.dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(tensor, other[name], rtol=rtol, atol=1e-5)


def tables(module: ClickModel) -> list[tuple[int, int, int, Tensor, Tensor]]:
    """Parts of tables in this process: table, first row and column, rows in full, and their codes."""
    found = []
    for host in hosts(module):
        for t in range(len(ROWS)):
            for shard in host.shards(t):
                part = shard.logical
                rows = shard.engine.read_rows(shard.index, 0, part.rows).cpu()
                codes = shard.engine.router.read(shard.index, 0, part.rows)[0].cpu()
                column = 0 if part.shard is None else part.shard.first_column
                found.append((t, shard.first_row, column, rows, codes))
    return found

"""Logged bytes per step."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchrec.distributed.types import CommOp

from lightning_embcomp.methods.dct.codecs import CodecRegistry, EmbeddingTrafficMonitor, PooledThresholding, comm_codecs


class Sharded(nn.Module):
    """Stands in for a sharded collection: exchanges 8 columns per step."""

    def __init__(self, codecs: CodecRegistry | None) -> None:
        super().__init__()
        self.qcomm_codecs_registry = codecs

    def forward(self) -> None:
        if self.qcomm_codecs_registry is not None:
            self.qcomm_codecs_registry[CommOp.POOLED_EMBEDDINGS_ALL_TO_ALL.name].forward.encode(torch.ones(8))


class Module(pl.LightningModule):
    def __init__(self, codecs: CodecRegistry | None) -> None:
        super().__init__()
        copied: Any = codecs and dict(codecs)  # what reaches a sharder may be a copy
        self.one, self.two, self.linear = Sharded(codecs), Sharded(copied), nn.Linear(1, 1)
        self.logged: list[tuple[int, dict[str, float]]] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.one()
        self.two()
        return self.linear(batch[0]).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def log_dict(self, dictionary: Any, **rest: Any) -> None:
        self.logged.append((self.global_step, dict(dictionary)))


def fit(module: Module, monitor: EmbeddingTrafficMonitor) -> None:
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[monitor],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(torch.ones(5, 1)), batch_size=1))


def test_means_per_step() -> None:
    codecs = comm_codecs(PooledThresholding(row_dim=4, forward_density=0.5))
    codecs[CommOp.POOLED_EMBEDDINGS_ALL_TO_ALL.name].forward.encode(torch.ones(80))  # before training
    module = Module(codecs)
    fit(module, EmbeddingTrafficMonitor(every_n_steps=2))
    wanted = {"comm/pooled_forward_bytes": 24.0, "comm/pooled_forward_dense_bytes": 64.0}
    assert module.logged == [(2, wanted), (4, wanted)]


def test_refused() -> None:
    with pytest.raises(ValueError, match="every_n_steps must be at least 1"):
        EmbeddingTrafficMonitor(every_n_steps=0)
    with pytest.raises(RuntimeError, match="no sharded embedding module uses codecs"):
        fit(Module(None), EmbeddingTrafficMonitor())

"""A tiny click log in memory, and a trainer that prints nothing."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

Batch = tuple[torch.Tensor, KeyedJaggedTensor, torch.Tensor]


@dataclass(frozen=True)
class Feature:
    name: str
    num_embeddings: int
    multi_valued: bool = False


class TinyBatches(Dataset[Batch]):
    def __init__(self, num_batches: int, num_dense: int, batch_size: int = 32) -> None:
        self.num_batches, self.num_dense, self.batch_size = num_batches, num_dense, batch_size

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, index: int) -> Batch:
        if index >= len(self):
            raise IndexError(index)
        generator = torch.Generator().manual_seed(index)
        user = torch.randint(0, 20, (self.batch_size,), generator=generator)
        counts = torch.randint(0, 4, (self.batch_size,), generator=generator)
        genres = torch.randint(0, 7, (int(counts.sum()),), generator=generator)
        lengths = torch.cat([torch.ones_like(counts), counts])
        sparse = KeyedJaggedTensor(["type", "genres"], torch.cat([user, genres]), lengths=lengths)
        label = torch.rand(self.batch_size, generator=generator) < torch.where(user < 10, 0.7, 0.2)
        return torch.randn(self.batch_size, self.num_dense, generator=generator), sparse, label.float()


class TinyData(pl.LightningDataModule):
    """``type`` (a name that ``torch.nn.ModuleDict`` would refuse) decides the label; ``genres`` is multi-valued."""

    features = (Feature("type", 20), Feature("genres", 7, multi_valued=True))

    def __init__(self, num_batches: int = 8, num_dense: int = 3) -> None:
        super().__init__()
        self.num_dense = num_dense
        self.batches = TinyBatches(num_batches, num_dense)

    def train_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(self.batches, batch_size=None)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


@pytest.fixture
def tiny_data() -> Callable[..., TinyData]:
    return TinyData


@pytest.fixture
def quiet_trainer() -> Callable[..., pl.Trainer]:
    def make(**kwargs: Any) -> pl.Trainer:
        quiet = {
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "max_epochs": 1,
        }
        return pl.Trainer(**{**quiet, **kwargs})

    return make

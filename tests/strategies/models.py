"""Small models with embedding tables, and their data."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it scripts functions as it is imported
    from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward

ROWS = {"t0": 40, "t1": 30, "t2": 17}
DIM = 8
BATCH = 6
FEATURES = ["f0", "f1", "f2"]

Batch = tuple[Tensor, KeyedJaggedTensor, Tensor]


def configs(pooling: PoolingType = PoolingType.SUM) -> list[EmbeddingBagConfig]:
    return [
        EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=DIM, feature_names=[feature], pooling=pooling)
        for (name, rows), feature in zip(ROWS.items(), FEATURES, strict=True)
    ]


def global_batch(step: int, rows: int) -> Batch:
    """The same on every process."""
    generator = torch.Generator().manual_seed(1000 + step)
    lengths = torch.randint(0, 4, (len(FEATURES), rows), generator=generator)
    values = [
        torch.randint(0, size, (int(count.sum()),), generator=generator)
        for size, count in zip(ROWS.values(), lengths, strict=True)
    ]
    dense = torch.randn(rows, 3, generator=generator)
    label = torch.rand(rows, generator=generator)
    ids = KeyedJaggedTensor(FEATURES, torch.cat(values), lengths=lengths.reshape(-1))
    return dense, ids, label


def part(batch: Batch, rank: int, world: int) -> Batch:
    """Rows of one process, its share of consecutive ones."""
    dense, ids, label = batch
    size = len(label) // world
    rows = range(rank * size, (rank + 1) * size)
    mine = slice(rows.start, rows.stop)
    values, lengths = [], []
    for key in ids.keys():
        jagged = ids[key]
        offsets = jagged.offsets().tolist()
        values.append(jagged.values()[offsets[rows.start] : offsets[rows.stop]])
        lengths.append(jagged.lengths()[mine])
    return dense[mine], KeyedJaggedTensor(ids.keys(), torch.cat(values), lengths=torch.cat(lengths)), label[mine]


class Batches(IterableDataset[Batch]):
    """Batches of this process: ``rows`` rows of each of the global ones."""

    def __init__(self, steps: int, rows: int = BATCH, first: int = 0, whole: bool = False) -> None:
        self.steps, self.rows, self.first, self.whole = steps, rows, first, whole

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        world = 1 if self.whole or not dist.is_initialized() else dist.get_world_size()
        rank = 0 if self.whole or not dist.is_initialized() else dist.get_rank()
        total = dist.get_world_size() if dist.is_initialized() else 1
        for step in range(self.first, self.first + self.steps):
            yield part(global_batch(step, self.rows * total), rank, world)


def loader(steps: int, **kwargs: Any) -> torch.utils.data.DataLoader[Batch]:
    return torch.utils.data.DataLoader(Batches(steps, **kwargs), batch_size=None)


class Clicks(pl.LightningModule):
    """Embedding bags beside dense features, and a layer on top."""

    def __init__(
        self,
        in_backward: Callable[..., Any] | None = None,
        optimizer_kwargs: dict[str, Any] | None = None,
        bags: Callable[[], nn.Module] | None = None,
        dense: bool = True,
        device: str = "cpu",
        lr: float = 0.1,
    ) -> None:
        super().__init__()
        self.bags = bags() if bags else EmbeddingBagCollection(tables=configs(), device=torch.device(device))
        if in_backward is not None:
            apply_optimizer_in_backward(in_backward, self.bags.parameters(), dict(optimizer_kwargs or {}))
        self.over = nn.Linear(3 + DIM * len(ROWS), 1) if dense else None
        self.lr = lr
        self.training_steps = 0
        self.losses: list[float] = []

    def forward(self, dense: Tensor, ids: KeyedJaggedTensor) -> Tensor:
        rows = self.bags(ids).to_dict()
        pooled = torch.cat([rows[feature] for feature in FEATURES], dim=1)
        if self.over is None:
            return pooled.mean(1)
        return self.over(torch.cat([dense, pooled], dim=1)).squeeze(1)

    def loss(self, batch: Batch) -> Tensor:
        dense, ids, label = batch
        return (self(dense, ids) - label).square().mean()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.training_steps += 1
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True, batch_size=len(batch[2]))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch), sync_dist=True, batch_size=len(batch[2]))

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self(batch[0], batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Sequences(pl.LightningModule):
    """An embedding collection: one row for each id."""

    def __init__(self, in_backward: Callable[..., Any] | None = None, **kwargs: Any) -> None:
        super().__init__()
        tables = [
            EmbeddingConfig(name=name, num_embeddings=rows, embedding_dim=DIM, feature_names=[feature])
            for (name, rows), feature in zip(ROWS.items(), FEATURES, strict=True)
        ]
        self.rows = EmbeddingCollection(tables=tables, device=torch.device("cpu"))
        if in_backward is not None:
            apply_optimizer_in_backward(in_backward, self.rows.parameters(), kwargs)
        self.over = nn.Linear(DIM, 1)

    def loss(self, batch: Batch) -> Tensor:
        _, ids, label = batch
        found = self.rows(ids)
        # A sum over the batch's ids, divided by its rows: the same for whole batches and for parts of them.
        return sum(self.over(found[feature].values()).square().sum() for feature in FEATURES) / len(label)  # type: ignore

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.over.parameters(), lr=0.01)


def train_plain(module: Any, batches: Any, steps_of: int = 1, clip: float | None = None) -> None:
    """A loop without Lightning or TorchRec's distribution; the reference."""
    optimizer = module.configure_optimizers()
    optimizer = optimizer[0][0] if isinstance(optimizer, tuple) else optimizer
    for i, batch in enumerate(batches):
        (module.loss(batch) / steps_of).backward()
        if (i + 1) % steps_of == 0:
            if clip is not None:
                nn.utils.clip_grad_norm_(module.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()

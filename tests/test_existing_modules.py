"""Modules as people write them, with a callback added and nothing else changed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor

from lightning_embcomp import DimensionPruning, Granularity, PruningSchedule
from lightning_embcomp.engine.hosts import RoutedEmbedding, RoutedEmbeddingBag
from lightning_embcomp.surgery import UnsupportedTableError, to_plain
from lightning_embcomp.tables import TableView

ROWS, DIM, SCHEDULE = 300, 16, PruningSchedule(every_n_steps=4, early_steps=(2,))
Batch = tuple[Tensor, Tensor, Tensor]
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


def clicks() -> DataLoader[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    ids = (ROWS * torch.rand(192, 4, generator=generator) ** 3).long()
    return DataLoader(
        TensorDataset(ids, torch.rand(192, 4, generator=generator), (ids[:, 0] % 2).float()), batch_size=32
    )


class Sum(pl.LightningModule):
    """One bag per sample; other modules change one thing."""

    def __init__(self) -> None:
        super().__init__()
        self.build()
        self.top = nn.Linear(DIM, 1)

    def build(self) -> None:
        self.table: Any = nn.EmbeddingBag(ROWS, DIM, mode="sum")

    def pooled(self, ids: Tensor, weights: Tensor) -> Tensor:
        return self.table(ids)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        ids, weights, label = batch
        return F.binary_cross_entropy_with_logits(self.top(self.pooled(ids, weights)).squeeze(1), label)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Offsets(Sum):
    """A bag of ids after the other, rows initialised in place, sparse gradients and SGD."""

    def build(self) -> None:
        self.table = nn.EmbeddingBag(ROWS, DIM, sparse=True)
        self.table.weight.data.uniform_(-0.5, 0.5)

    def pooled(self, ids: Tensor, weights: Tensor) -> Tensor:
        return self.table(ids.reshape(-1), torch.arange(0, ids.numel(), ids.shape[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


class ListOfBags(Sum):
    """One table per field in a ModuleList, weights replaced by a new tensor, ids as a list."""

    def build(self) -> None:
        self.table = nn.EmbeddingBag(ROWS, DIM, mode="sum")
        self.table.weight.data = 0.1 * torch.randn(ROWS, DIM)
        self.tables = nn.ModuleList([self.table, nn.EmbeddingBag(ROWS, DIM, mode="sum", padding_idx=0)])

    def pooled(self, ids: Tensor, weights: Tensor) -> Tensor:
        fields = [ids[:, :1], ids[:, 1:]]
        return torch.stack([table(field) for table, field in zip(self.tables, fields, strict=True)]).sum(0)


class OneTableForAllFields(Sum):
    """Rows of an nn.Embedding, found by the field's first row, beside a wide table that is left alone."""

    def build(self) -> None:
        self.table, self.wide = nn.Embedding(ROWS, DIM), nn.Embedding(ROWS, 1)
        nn.init.xavier_uniform_(self.table.weight.data)
        self.first_rows = [0, 0, 0, 0]

    def pooled(self, ids: Tensor, weights: Tensor) -> Tensor:
        rows = (ids + ids.new_tensor(self.first_rows).unsqueeze(0)) % self.table.num_embeddings
        return self.table(rows).sum(1) + self.wide(rows).sum(1)


class Weighted(Sum):
    def pooled(self, ids: Tensor, weights: Tensor) -> Tensor:
        return self.table(ids, None, weights)


class SharedTwice(Sum):
    def build(self) -> None:
        super().build()
        self.offered = self.table

    def pooled(self, ids: Tensor, weights: Tensor) -> Tensor:
        return self.table(ids[:, :2]) + self.offered(ids[:, 2:].int())


class PenaltyOnAll(Sum):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss + 1e-5 * torch.stack([parameter.pow(2).sum() for parameter in self.parameters()]).sum()


class Groups(Sum):
    def configure_optimizers(self) -> Any:
        tables = [parameter for name, parameter in self.named_parameters() if name.startswith("table.")]
        optimizer = torch.optim.AdamW([{"params": tables, "lr": 0.01}, {"params": self.top.parameters(), "lr": 1e-3}])
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)]


class ByHand(Sum):
    """Two optimizers, one of them for sparse gradients, stepped by the module."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def build(self) -> None:
        self.table = nn.EmbeddingBag(ROWS, DIM, mode="sum", sparse=True)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()
        return loss

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.SparseAdam(list(self.table.parameters()), lr=0.01),
            torch.optim.Adam(self.top.parameters()),
        ]


WORKING = [Sum, Offsets, ListOfBags, OneTableForAllFields, Weighted, SharedTwice, PenaltyOnAll, Groups, ByHand]


class Losses(pl.Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        self.values.append(float(outputs["loss"]))


def fit(module: pl.LightningModule, epochs: int, *callbacks: pl.Callback, ckpt_path: Path | None = None) -> pl.Trainer:
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[DimensionPruning(target=0.5, tables=["*", "!wide"], schedule=SCHEDULE), *callbacks]
        if isinstance(module, OneTableForAllFields)
        else [DimensionPruning(target=0.5, schedule=SCHEDULE), *callbacks],
    )
    trainer.fit(module, clicks(), ckpt_path=ckpt_path)
    return trainer


def weights(module: Sum) -> Tensor:
    """All rows of the table, zero where nothing is stored."""
    plain: Any = to_plain(module.table)
    return plain.weight


def stored(module: nn.Module) -> int:
    return sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in module.parameters()}.values())


@pytest.mark.parametrize("kind", WORKING)
def test_they_train_compressed_and_resume(kind: Callable[[], Sum], tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, losses = kind(), Losses()
    plain = stored(module.table)
    trainer = fit(module, 3, losses)
    assert isinstance(module.table, RoutedEmbedding | RoutedEmbeddingBag)
    assert stored(module.table) <= 0.5 * plain
    assert sum(losses.values[-6:]) < sum(losses.values[:6])

    trainer.save_checkpoint(tmp_path / "three.ckpt")
    before, looked_up = weights(module), next(iter(clicks()))
    expected = module.pooled(*looked_up[:2])
    resumed, more = kind(), Losses()
    again = fit(resumed, 3, ckpt_path=tmp_path / "three.ckpt")
    assert again.global_step == trainer.global_step
    torch.testing.assert_close(resumed.pooled(*looked_up[:2]), expected, rtol=0, atol=0)

    fit(resumed, 4, more, ckpt_path=tmp_path / "three.ckpt")
    assert len(more.values) == 6
    assert not torch.equal(weights(resumed), before)  # the rows themselves are trained


def table_of(**options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.EmbeddingBag(ROWS, DIM, **options)


class Scaled(nn.EmbeddingBag):
    def forward(self, *args: Any) -> Tensor:
        return 2 * super().forward(*args)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (table_of(mode="max"), "'table' is pooled by max"),
        (table_of(mode="sum", max_norm=1.0), "'table' uses max_norm"),
        (table_of(mode="sum", scale_grad_by_freq=True), "'table' uses scale_grad_by_freq"),
        (table_of(mode="sum", dtype=torch.float64), "'table' holds torch.float64 tables"),
        (lambda: nn.EmbeddingBag.from_pretrained(torch.zeros(ROWS, DIM)), "'table' is frozen"),
        (lambda: Scaled(ROWS, DIM), "'table' is a Scaled with a forward of its own"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_training(table: Callable[[], nn.Module], message: str) -> None:
    module = Sum()
    module.table = table()
    with pytest.raises(UnsupportedTableError, match=message):
        fit(module, 1)


def test_ids_outside_a_table_are_named() -> None:
    class Shifted(Sum):
        def pooled(self, ids: Tensor, weights: Tensor) -> Tensor:
            return self.table(ids + ROWS)

    with pytest.raises(IndexError, match=f"is outside table .table. with {ROWS} rows"):
        fit(Shifted(), 1)


class Sizes(Sum):
    """Tables of several dims: 20 divides into whole rows only, 8 into two chunks, 1 into none."""

    def build(self) -> None:
        self.table = nn.EmbeddingBag(ROWS, DIM, mode="sum")
        self.narrow = nn.EmbeddingBag(ROWS, 8, mode="sum")
        self.odd = nn.EmbeddingBag(ROWS, 20, mode="sum")
        self.offset = nn.EmbeddingBag(ROWS, 1, mode="sum")

    def pooled(self, ids: Tensor, weights: Tensor) -> Tensor:
        narrow, odd = self.narrow(ids).repeat(1, 2), self.odd(ids)[:, :DIM]
        return self.table(ids) + narrow + odd + self.offset(ids)


def test_each_table_is_cut_as_finely_as_its_dim_allows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = Sizes()
    with pytest.warns(UserWarning, match=r"no multiple of 4 stay as they are: offset \(dim 1\)\..*'!offset'"):
        with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
            trainer = fit(module, 2)
    assert "'narrow' of dim 8 into 2 × 4; 'odd' of dim 20 into 1 × 20 columns" in caplog.text
    engines: list[Any] = [module.table, module.narrow, module.odd]
    assert [table.engine.tables[0].chunks for table in engines] == [4, 2, 1]
    assert isinstance(module.offset, nn.EmbeddingBag)
    kept = sum(stored(module.get_submodule(name)) for name in ("table", "narrow", "odd"))
    assert 0.45 * ROWS * 4 * (DIM + 8 + 20) <= kept <= 0.5 * ROWS * 4 * (DIM + 8 + 20)

    trainer.save_checkpoint(tmp_path / "two.ckpt")
    resumed, looked_up = Sizes(), next(iter(clicks()))
    with pytest.warns(UserWarning, match="stay as they are"):
        fit(resumed, 2, ckpt_path=tmp_path / "two.ckpt")
    torch.testing.assert_close(resumed.pooled(*looked_up[:2]), module.pooled(*looked_up[:2]), rtol=0, atol=0)


@pytest.mark.parametrize("tables", [["*", "offset"], ["offset"]])
def test_a_table_of_one_column_that_is_named_is_refused(tables: list[str]) -> None:
    pruning = DimensionPruning(target=0.5, tables=tables)
    trainer = pl.Trainer(max_epochs=1, callbacks=[pruning], logger=False, accelerator="cpu", enable_checkpointing=False)
    with pytest.raises(ValueError, match="table 'offset' of dim 1 cannot be cut .*its dim must be a multiple of 4"):
        trainer.fit(Sizes(), clicks())


def test_chunks_of_a_collection_without_order_are_as_many_in_all_its_tables() -> None:
    def view(host: str, key: str, dim: int) -> TableView:
        return TableView(host=host, key=key, rows=100, dim=dim, weight=None)

    tables = [view("c", "a", 8), view("c", "b", 16), view("d", "", 16), view("d2", "", 12)]
    callback = DimensionPruning(target=0.5, granularity=Granularity(chunks=4, layout="chunks"))
    assert [cut for cut, _ in callback.table_cuts(tables).values()] == [2, 2, 4, 3]
    assert [len(f.live) for f in callback.footprints(tables).values()] == [2, 2, 4, 3]
    assert [f.row_bytes for f in callback.footprints(tables).values()] == [4, 4, 8, 6]
    callback = DimensionPruning(target=0.5)
    assert [cut for cut, _ in callback.table_cuts(tables).values()] == [2, 4, 4, 3]


class Collection(Sum):
    def build(self) -> None:
        configs = [
            EmbeddingBagConfig(name=name, num_embeddings=ROWS, embedding_dim=dim, feature_names=[name])
            for name, dim in (("a", 8), ("b", DIM))
        ]
        self.table = EmbeddingBagCollection(tables=configs)

    def pooled(self, ids: Tensor, weights: Tensor) -> Tensor:
        values = torch.cat([ids.reshape(-1), ids.reshape(-1)])
        lengths = torch.full((2 * len(ids),), ids.shape[1])
        found = self.table(KeyedJaggedTensor(["a", "b"], values, lengths=lengths)).to_dict()
        return found["a"].repeat(1, 2) + found["b"]


@pytest.mark.parametrize("layout", ["prefix", "chunks"])
def test_a_collection_of_several_dims_is_pruned(layout: Any) -> None:
    module = Collection()
    pruning = DimensionPruning(target=0.5, schedule=SCHEDULE, granularity=Granularity(layout=layout))
    options: Any = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    pl.Trainer(max_epochs=1, logger=False, accelerator="cpu", callbacks=[pruning], **options).fit(module, clicks())
    assert [table.chunks for table in module.table.engine.tables] == [2, 2 if layout == "chunks" else 4]
    assert stored(module.table) <= 0.5 * ROWS * 4 * (8 + DIM)

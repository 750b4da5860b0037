"""Evaluating a fresh module: from a checkpoint of a compressed run, never one that was not trained compressed."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_embcomp import DimensionPruning, MixedPrecisionSearch, SetupError
from lightning_embcomp.callback import CompressionCallback
from lightning_embcomp.engine.hosts import RoutedEmbeddingBag

OPTIONS: dict[str, Any] = {
    "max_epochs": 1,
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*DataLoader.*across ranks")


class Model(pl.LightningModule):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.EmbeddingBag(300, 16, mode="sum")
        self.same = self.table
        self.top = nn.Linear(16, 1)
        self.outputs: list[Tensor] = []

    def forward(self, ids: Tensor) -> Tensor:
        return self.top(self.table(ids))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.outputs.append(self(batch[0]))

    test_step = validation_step

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.outputs.append(self(batch[0]))
        return self.outputs[-1]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def loader() -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(torch.arange(640).remainder(300).view(320, 2)), batch_size=64)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    path, model = tmp_path_factory.mktemp("run") / "last.ckpt", Model()
    trainer = pl.Trainer(callbacks=[DimensionPruning(target=0.6)], **OPTIONS)
    trainer.fit(model, loader(), loader())
    trainer.save_checkpoint(path)
    model.eval()
    with torch.no_grad():
        return path, torch.cat([model(ids) for (ids,) in loader()])


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_a_fresh_model_is_evaluated_from_a_checkpoint(stage: str, trained: tuple[Path, Tensor]) -> None:
    path, expected = trained
    model = Model(seed=7)
    plain = weakref.ref(model.table)
    trainer = pl.Trainer(callbacks=[DimensionPruning(target=0.6)], **OPTIONS)
    getattr(trainer, stage)(model, loader(), ckpt_path=path)
    assert isinstance(model.table, RoutedEmbeddingBag)
    torch.testing.assert_close(torch.cat(model.outputs), expected, rtol=0, atol=0)
    gc.collect()
    assert plain() is None


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_without_a_checkpoint_it_is_refused_and_stays_plain(stage: str, trained: tuple[Path, Tensor]) -> None:
    model = Model()
    table, before = model.table, copy.deepcopy(model.state_dict())
    callbacks: list[Any] = [DimensionPruning(target=0.6), MixedPrecisionSearch(bits=8)]
    trainer = pl.Trainer(callbacks=callbacks, **OPTIONS)
    with pytest.raises(SetupError, match=f": {stage} would compress table 'table' of a plain model.*Give ckpt_path"):
        getattr(trainer, stage)(model, loader())
    assert model.table is table and model.same is table
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(callback.owned for callback in callbacks if isinstance(callback, CompressionCallback))

    again = pl.Trainer(callbacks=[DimensionPruning(target=0.6)], **OPTIONS)
    again.fit(model, loader(), loader())  # the same module trains compressed all the same
    getattr(again, stage)(model, loader())  # and is evaluated without a checkpoint


def test_a_checkpoint_of_an_earlier_run_does_not_count(trained: tuple[Path, Tensor]) -> None:
    trainer = pl.Trainer(callbacks=[DimensionPruning(target=0.6)], **OPTIONS)
    trainer.validate(Model(), loader(), ckpt_path=trained[0])
    with pytest.raises(SetupError, match="validate would compress"):
        trainer.validate(Model(), loader())


def test_a_checkpoint_that_does_not_exist_leaves_the_model_plain(tmp_path: Path) -> None:
    model = Model()
    table = model.table
    with pytest.raises(FileNotFoundError):
        pl.Trainer(callbacks=[DimensionPruning(target=0.6)], **OPTIONS).test(
            model, loader(), ckpt_path=tmp_path / "none.ckpt"
        )
    assert model.table is table


def test_copies_of_a_callback_leave_the_plain_tables_behind() -> None:
    class Copying(pl.Callback):
        def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
            mine = next(c for c in trainer.callbacks if isinstance(c, DimensionPruning))  # type: ignore[attr-defined]
            assert mine._plain is not None
            self.copies = [copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))]

    copying = Copying()
    with pytest.raises(SetupError, match="would compress"):
        pl.Trainer(callbacks=[DimensionPruning(target=0.6), copying], **OPTIONS).validate(Model(), loader())
    assert [copied._plain for copied in copying.copies] == [None, None]

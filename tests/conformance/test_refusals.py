"""Combinations with the trainer that callbacks refuse, and two that they must not break."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from lightning_embcomp import DimensionPruning, FrequencyAwareLR, Granularity, PruningSchedule, SetupError
from lightning_embcomp.data import SyntheticClickLog, SyntheticClickLogDataModule
from lightning_embcomp.methods.fiited.module import BudgetError
from lightning_embcomp.models import ClickModel

OPTIONS: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "max_epochs": 1}
OPTIONS |= {"enable_progress_bar": False, "enable_model_summary": False}


class TwoHosts(pl.LightningModule):
    """Two stand-alone tables, built in configure_model."""

    def __init__(self) -> None:
        super().__init__()
        self.a: nn.EmbeddingBag | None = None

    def configure_model(self) -> None:
        if self.a is None:
            self.a, self.b = nn.EmbeddingBag(500, 16), nn.EmbeddingBag(400, 16)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        assert self.a is not None
        return (self.a(batch[0]) * self.b(batch[0])).sum(1).square().mean()

    validation_step = training_step  # type: ignore[assignment]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


class FusedByHand(pl.LightningModule):
    """A fused collection under manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        config = EmbeddingBagConfig(name="t", num_embeddings=500, embedding_dim=16, feature_names=["f"])
        self.bags = FusedEmbeddingBagCollection([config], torch.optim.SGD, {"lr": 0.1}, device=torch.device("cpu"))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        ids = batch[0].flatten()
        sparse = KeyedJaggedTensor(["f"], ids, lengths=torch.ones(ids.numel(), dtype=torch.int64))
        self.manual_backward(self.bags(sparse).values().square().mean())

    def configure_optimizers(self) -> None:
        return None


def loader() -> DataLoader:  # type: ignore[type-arg]
    ids = torch.arange(640).remainder(400).view(320, 2)
    return DataLoader(TensorDataset(ids), batch_size=32)


def test_a_table_that_no_glob_selects_is_stored_whole() -> None:
    model = TwoHosts()
    pl.Trainer(callbacks=[DimensionPruning(target=0.8, tables="a")], **OPTIONS).fit(model, loader(), loader())
    held = {name: sum(p.numel() for p in getattr(model, name).parameters()) for name in ("a", "b")}
    assert held["b"] == 400 * 16 and held["a"] <= 0.2 * 500 * 16


def test_evaluating_a_plain_model_is_refused_and_leaves_it_plain() -> None:
    model = TwoHosts()
    model.configure_model()
    with pytest.raises(SetupError, match="would compress table 'a'"):
        pl.Trainer(callbacks=[DimensionPruning(target=0.8)], **OPTIONS).validate(model, loader())
    assert isinstance(model.a, nn.EmbeddingBag)


@pytest.mark.parametrize(("setting", "value"), [("gradient_clip_val", 1.0), ("accumulate_grad_batches", 2)])
def test_settings_that_do_not_reach_fused_tables_are_refused(setting: str, value: float) -> None:
    config = EmbeddingBagConfig(name="t", num_embeddings=500, embedding_dim=16, feature_names=["f"])

    class Fused(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.bags = FusedEmbeddingBagCollection([config], torch.optim.SGD, {"lr": 0.1}, device=torch.device("cpu"))
            self.top = nn.Linear(16, 1)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            raise AssertionError("must not be reached")

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.top.parameters(), lr=0.1)

    trainer = pl.Trainer(callbacks=[DimensionPruning(target=0.5)], **OPTIONS, **{setting: value})
    with pytest.raises(SetupError, match=setting):
        trainer.fit(Fused(), loader())


@pytest.mark.filterwarnings("ignore:.*returned `None`")
def test_events_happen_under_manual_optimization() -> None:
    callback = DimensionPruning(target=0.5, schedule=PruningSchedule(every_n_steps=4, early_steps=()))
    trainer = pl.Trainer(callbacks=[callback], **OPTIONS)
    trainer.fit(FusedByHand(), loader())
    assert callback.state_dict()["events"] == 2  # of 10 batches, after the 4th and the 8th


def test_two_rates_for_one_collection_are_refused() -> None:
    features = [{"name": name, "num_embeddings": 100} for name in ("a", "b")]
    model = ClickModel(features=features, num_dense=1)
    callbacks = [
        DimensionPruning(target=0.5, tables=f"t_{name}", granularity=Granularity(rate_power=power))
        for name, power in (("a", 0.0), ("b", 1.0))
    ]
    trainer = pl.Trainer(callbacks=callbacks, **OPTIONS)
    with pytest.raises(ValueError, match="rate_power=0.0 already"):
        callbacks[0].setup(trainer, model, "fit")


def test_counters_of_another_callback_count_in_a_byte_budget() -> None:
    model = ClickModel(embedding_optimizer="sgd", embedding_dim=16)
    log = SyntheticClickLog(num_rows=1_000, num_embeddings=(10_000,), num_dense=2)
    trainer = pl.Trainer(callbacks=[FrequencyAwareLR(), DimensionPruning(budget=36_000)], **OPTIONS)
    with pytest.raises(BudgetError, match="36,000 bytes is not above the 40,"):
        trainer.fit(model, SyntheticClickLogDataModule(log, batch_size=512))

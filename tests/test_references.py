"""Attributes and optimizers that hold on to a plain table are found before, or as, a run starts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_embcomp import DimensionPruning, SetupError

ROWS, DIM = 200, 8
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:Attribute 'table' is an instance of `nn.Module`"
)


class Model(pl.LightningModule):
    def __init__(self, table: nn.Module | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.part: Any = nn.Module()
        self.part.table = nn.EmbeddingBag(ROWS, DIM, mode="sum") if table is None else table
        self.top = nn.Linear(DIM, 1)
        self.note = [{"widths": [DIM, 1]}, self.top]

    def pooled(self, ids: Tensor) -> Tensor:
        found: Tensor = self.part.table(ids)
        return found

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.binary_cross_entropy_with_logits(self.top(self.pooled(batch[0])).squeeze(1), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def fit(model: pl.LightningModule, **options: Any) -> pl.Trainer:
    ids = torch.arange(256).remainder(ROWS).view(64, 4)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[DimensionPruning(target=0.5)],
        **options,
    )
    trainer.fit(model, DataLoader(TensorDataset(ids, (ids[:, 0] % 2).float()), batch_size=16))
    return trainer


def keep(name: str, value: Callable[[Any], Any]) -> Callable[[Model], None]:
    return lambda model: vars(model).__setitem__(name, value(model.part.table))


KEPT = {
    "a list": (keep("kept", lambda table: [table]), r"kept\[0\]"),
    "a tuple": (keep("kept", lambda table: (1, table)), r"kept\[1\]"),
    "a dict": (keep("kept", lambda table: {"user": table}), r"kept\['user'\]"),
    "a set": (keep("kept", lambda table: {table}), r"kept\[0\]"),
    "a bound method": (keep("look", lambda table: table.forward), "look"),
    "a partial": (keep("look", lambda table: partial(table.forward, offsets=None)), "look"),
    "its weight in a list": (keep("raw", lambda table: [table.weight]), r"raw\[0\]"),
    "parameter groups": (
        keep("groups", lambda table: [{"params": [table.weight], "lr": 1.0}]),
        r"groups\[0\]\['params'\]\[0\]",
    ),
    "an attribute of a submodule": (lambda model: model.top.__dict__.update(table=model.part.table), "top.table"),
}


@pytest.mark.parametrize("kept", KEPT)
def test_a_table_that_an_attribute_keeps_is_refused_before_anything_changes(kept: str) -> None:
    model = Model()
    entry: Any = KEPT[kept]
    hold, where = entry
    hold(model)
    table = model.part.table
    with pytest.raises(SetupError, match=rf"table 'part.table' is also kept in {where}, which would go on"):
        fit(model)
    assert model.part.table is table


def test_hyperparameters_and_other_attributes_are_no_references() -> None:
    fit(Model(nn.EmbeddingBag(ROWS, DIM, mode="sum")))


def test_a_compiled_table_is_refused_and_a_compiled_module_around_it_trains() -> None:
    inner = nn.EmbeddingBag(ROWS, DIM, mode="sum")
    with pytest.raises(SetupError, match="is also kept in part.table"):
        compiled_table: Any = torch.compile(inner, backend="eager")
        fit(Model(compiled_table))

    def trained(compiled: bool) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        layers: Any = nn.Sequential(nn.EmbeddingBag(ROWS, DIM, mode="sum", padding_idx=0), nn.Linear(DIM, DIM))
        wrapped: Any = torch.compile(layers, backend="eager") if compiled else layers
        model = Model(wrapped)
        fit(model)
        return model.top.weight.detach(), model.pooled(torch.arange(80).view(20, 4)).detach()

    for compiled, eager in zip(trained(True), trained(False), strict=True):
        torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-6)


class BuiltEarly(Model):
    def __init__(self) -> None:
        super().__init__()
        self.built = self.optimizer()

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)

    def configure_optimizers(self) -> Any:
        return self.built


class DenseEarly(BuiltEarly):
    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.top.parameters())


def test_an_optimizer_of_the_plain_table_is_refused() -> None:
    with pytest.raises(SetupError, match="no optimizer trains the rows of table 'part.table'.*configure_optimizers"):
        fit(BuiltEarly())
    fit(DenseEarly())  # leaves the rows alone, which is for the user to say


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "16-true"])
def test_other_dtypes_for_all_weights_are_refused(precision: str) -> None:
    with pytest.raises(SetupError, match=f"precision='{precision}' changes the dtype .* Use precision='32-true'"):
        fit(Model(), precision=precision)


def test_a_stand_in_has_the_plain_attributes_and_says_why_it_has_no_weight() -> None:
    for plain in (
        nn.EmbeddingBag(ROWS, DIM, mode="mean", padding_idx=3, sparse=True),
        nn.Embedding(ROWS, DIM, padding_idx=3, sparse=True),
    ):
        names = ["num_embeddings", "embedding_dim", "padding_idx", "sparse", "max_norm", "norm_type"]
        names += [
            "scale_grad_by_freq",
            *(("mode", "include_last_offset") if isinstance(plain, nn.EmbeddingBag) else ()),
        ]
        model = Model(plain)
        model.pooled = lambda ids, model=model: model.part.table(ids).view(len(ids), -1, DIM).sum(1)  # type: ignore
        model.configure_optimizers = lambda model=model: torch.optim.SGD(model.parameters(), lr=0.1)  # type: ignore
        fit(model)
        table = model.part.table
        assert {name: getattr(table, name) for name in names} == {name: getattr(plain, name) for name in names}
        assert table.device == torch.device("cpu")
        with pytest.raises(AttributeError, match=r"'part.table' is compressed and has no full weight .*!part.table"):
            _ = table.weight
        with pytest.raises(AttributeError, match="has no attribute 'other'"):
            _ = table.other

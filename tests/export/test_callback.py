"""Exports at the end of a fit: which weights, what is refused before the first step, and what the guard is given."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_embcomp import MixedPrecisionSearch, ModelExport, PrecisionSearch
from lightning_embcomp.export import ExportError, build, hosts_of, load_model, read, write
from lightning_embcomp.export.checkpoint import hosts_of_checkpoint
from lightning_embcomp.models import ClickModel
from lightning_embcomp.report.checkpoint import open_checkpoint
from lightning_embcomp.tables import UnknownTableError

from .pipeline import DIM, PRUNING, ROWS, Clicks, bag_collection, click_model, fitted, same_exports, trainer


def test_callback_exports_the_last_weights(tmp_path: Path) -> None:
    export = ModelExport(str(tmp_path / "out"), format="packed", bits=8)
    model, _ = fitted(tmp_path, PRUNING(), export)
    report = export.report
    assert report is not None and report.guard is not None and report.folder == tmp_path / "out"
    assert report.guard.rows == 384 and report.guard.ne_loss <= 0.0005
    assert report.disk.total == sum(
        (tmp_path / "out" / name).stat().st_size for name in ("manifest.json", "tables.safetensors")
    )
    assert report.plain == 4 * DIM * sum(ROWS.values())
    exported = load_model(tmp_path / "out", click_model())
    dense, sparse, _ = Clicks().batches[0]
    with torch.no_grad():
        difference = (exported(dense, sparse) - model(dense, sparse)).abs().max()
    assert difference <= report.guard.max_logit_difference + 1e-6
    assert report.manifest.source["global_step"] == 12


class Spoiler(pl.Callback):
    """Ruins the weights after the best checkpoint was kept."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        with torch.no_grad():
            for module in pl_module.modules():
                if isinstance(module, nn.Linear):
                    module.bias += 1


@pytest.mark.parametrize("pruned", [False, True])
def test_callback_exports_the_best_weights(tmp_path: Path, pruned: bool) -> None:
    best = ModelCheckpoint(dirpath=tmp_path, filename="best", monitor="val_ne")
    export = ModelExport(str(tmp_path / "out"), bits=32, checkpoint="best")
    model, _ = fitted(tmp_path, *([PRUNING()] if pruned else []), best, Spoiler(), export)
    ruined = {key: value.clone() for key, value in model.state_dict().items()}
    path = tmp_path / "best.ckpt"
    hosts, dense = hosts_of_checkpoint(open_checkpoint(path), path)
    same_exports(read(tmp_path / "out"), build(hosts, 32, dense=dense))
    assert read(tmp_path / "out").manifest.source["checkpoint"] == "best.ckpt"
    again = model.state_dict()
    assert all(torch.equal(ruined[key], again[key]) for key in ruined)
    bias = next(key for key in dense if key.endswith("bias"))
    assert not torch.equal(dense[bias], ruined[bias])


def test_weights_come_back_if_the_best_cannot_be_loaded(tmp_path: Path) -> None:
    class Damage(pl.Callback):
        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            checkpoint = torch.load(tmp_path / "best.ckpt", weights_only=False)
            key = next(key for key in checkpoint["state_dict"] if key.endswith("bias"))
            checkpoint["state_dict"][key] = torch.zeros(99)
            torch.save(checkpoint, tmp_path / "best.ckpt")

    best = ModelCheckpoint(dirpath=tmp_path, filename="best", monitor="val_ne")
    export = ModelExport(str(tmp_path / "out"), checkpoint="best")
    model = click_model()
    last: dict[str, Any] = {}

    class Keep(pl.Callback):
        def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            last.update({key: value.clone() for key, value in pl_module.state_dict().items()})

    with pytest.raises(RuntimeError, match="size mismatch"):
        trainer(best, Spoiler(), Damage(), Keep(), export, folder=tmp_path).fit(model, datamodule=Clicks())
    again = model.state_dict()
    assert last.keys() == again.keys() and all(torch.equal(last[key], again[key]) for key in last)
    assert not (tmp_path / "out").exists()


class Searching(pl.Callback):
    searches = True


SEARCH = partial(MixedPrecisionSearch, ratio=20, search=PrecisionSearch(frequency="rank"))


@pytest.mark.parametrize("search", [Searching, SEARCH], ids=["any", "mpe"])
@pytest.mark.parametrize(
    ("settings", "limits", "error", "message"),
    [
        ({"tables": {"t_usr": 4}}, {}, UnknownTableError, "no embedding table matches 't_usr'"),
        ({}, {"limit_val_batches": 0}, ExportError, "no validation data for the NE guard"),
        ({"checkpoint": "best"}, {}, ExportError, "checkpoint='best' may choose one from the search phase of"),
    ],
)
def test_callback_finds_out_before_the_first_step(
    tmp_path: Path, search: Callable[[], pl.Callback], settings: Any, limits: Any, error: type[Exception], message: str
) -> None:
    best = ModelCheckpoint(dirpath=tmp_path, monitor="val_ne")
    runner = trainer(search(), best, ModelExport(str(tmp_path / "out"), **settings), folder=tmp_path, **limits)
    with pytest.raises(error, match=message):
        runner.fit(click_model(), datamodule=Clicks())
    assert runner.global_step == 0


def test_callback_guards_a_fit_that_never_validated(tmp_path: Path) -> None:
    export = ModelExport(str(tmp_path / "out"))
    trainer(export, folder=tmp_path, check_val_every_n_epoch=2).fit(click_model(), datamodule=Clicks())
    assert export.report is not None and export.report.guard is not None and export.report.guard.rows == 384


class Hooked(ClickModel):
    """Batches need their hooks."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        dense, sparse, label = batch
        return dense + 1, sparse, label

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        dense, sparse, label = batch
        return 5 * dense, sparse, label


def test_callback_guards_with_the_batches_of_a_validation_step(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Hooked(embedding_dim=DIM, features=Clicks.features, num_dense=2, over_layers=(16,), dense_lr=0.02)
    export = ModelExport(str(tmp_path / "out"))
    runner = trainer(export, folder=tmp_path)
    runner.fit(model, Clicks().train_dataloader(), Clicks().val_dataloader())
    assert export.report is not None and export.report.guard is not None
    assert export.report.guard.ne_before == pytest.approx(float(runner.callback_metrics["val_ne"]), abs=1e-7)


def test_callback_refuses_before_the_training(tmp_path: Path) -> None:
    write(build(hosts_of(bag_collection()), 4), tmp_path / "out")
    with pytest.raises(ExportError, match="there is an export already"):
        fitted(tmp_path, ModelExport(str(tmp_path / "out")))
    with pytest.raises(ExportError, match="needs a ModelCheckpoint with monitor"):
        fitted(tmp_path, ModelExport(str(tmp_path / "new"), checkpoint="best"))
    with pytest.raises(ExportError, match="strict has no effect"):
        ModelExport("x", max_ne_loss=None, strict=True)
    with pytest.raises(ExportError, match="checkpoint must be"):
        ModelExport("x", checkpoint="first")  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="bits is 3"):
        ModelExport("x", bits=3)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_callback_without_validation_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export = ModelExport(str(tmp_path / "out"))
    with pytest.raises(ExportError, match="no validation data for the NE guard"):
        trainer(export, folder=tmp_path).fit(click_model(), train_dataloaders=Clicks().train_dataloader())
    said: list[str] = []
    monkeypatch.setattr("lightning_embcomp.export.callback.rank_zero_info", said.append)
    free = ModelExport(str(tmp_path / "out"), max_ne_loss=None)
    trainer(free, folder=tmp_path).fit(click_model(), train_dataloaders=Clicks().train_dataloader())
    assert free.report is not None and free.report.guard is None
    assert "NE guard: switched off" in said[-1] and "(-c)" not in said[-1]

"""Criteo's display advertising log: train, export in both formats, load, validate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_embcomp import ModelExport
from lightning_embcomp.data import ClickLogDataModule, Split
from lightning_embcomp.engine.precision import TablePrecision
from lightning_embcomp.export import ExportOptions, export_module, load_model
from lightning_embcomp.models import ClickModel

from .pipeline import compressed, trainer


@pytest.fixture(scope="module")
def data(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> ClickLogDataModule:
    path = real_data / "criteo_kaggle_80k" / "train_first10k.raw.txt.xz"
    if not path.exists():
        pytest.skip(f"{path} is missing")
    return ClickLogDataModule(
        path=str(path),
        format="criteo",
        batch_size=512,
        split=Split(kind="chronological", validation=0.2, test=0.1),
        cache_dir=str(tmp_path_factory.mktemp("cache")),
    )


def validated(model: Any, data: ClickLogDataModule) -> dict[str, float]:
    [found] = trainer().validate(model, datamodule=data, verbose=False)
    return dict(found)


def rounding(rows: int, dim: int) -> TablePrecision:
    """A few frequent ids at 8 bits, more at 4 and 2, the tail not at all."""
    bounds = torch.tensor([0, rows // 20, rows // 8, rows // 2, rows])
    bits = torch.tensor([8, 4, 2, 0], dtype=torch.uint8)
    return TablePrecision(bounds=bounds, bits=bits, steps={8: 2**-10, 4: 2**-7, 2: 2**-6}, offset=torch.zeros(dim))


@pytest.mark.slow
def test_train_export_load_validate(data: ClickLogDataModule, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ClickModel(over_layers=(32,))
    plain = ModelExport(str(tmp_path / "int8"), bits=8)
    trainer(plain, folder=tmp_path).fit(model, datamodule=data)
    report = plain.report
    assert report is not None and report.guard is not None
    assert report.guard.ne_loss <= 0.0005 and report.guard.rows == 2000
    assert report.disk_ratio > 2.5 and report.serving_ratio > 2.5

    before = validated(compressed(model, round_with=rounding), data)
    measured: list[Tensor] = []
    for form in ("fbgemm", "packed"):
        options = ExportOptions(format=form, max_ne_loss=1e-6, strict=True)  # type: ignore[arg-type]
        small = export_module(model, tmp_path / form, options, batches=list(data.val_dataloader()))
        assert small.guard is not None and small.guard.max_logit_difference < 5e-6
        served = load_model(tmp_path / form, ClickModel(**{**model.hparams, "over_layers": (32,)}))
        after = validated(served, data)
        assert after["val_auc"] == pytest.approx(before["val_auc"], abs=1e-4)
        assert after["val_ne"] == pytest.approx(before["val_ne"], abs=1e-6)
        measured.append(torch.tensor(small.disk_ratio))
    assert measured[1] > 1.5 * measured[0] > 15

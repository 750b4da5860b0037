"""The data modules in a Lightning trainer and in its command line."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_embcomp.data import ClickLogDataModule, ClickLogSchema, SyntheticClickLog, SyntheticClickLogDataModule
from lightning_embcomp.data.batches import Batch


class Recorder(pl.LightningModule):
    """Notes what it is given and learns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, int, float, int]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        dense, sparse, label = batch
        self.seen.append((self.current_epoch, batch_idx, float(dense.sum()), int(sparse.values().sum())))
        return self.weight * label.sum()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        pass

    def predict_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        return batch[2]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def data() -> SyntheticClickLogDataModule:
    log = SyntheticClickLog(num_rows=9000, num_embeddings=(50, 60))
    return SyntheticClickLogDataModule(log, batch_size=1500, shuffle=True)


def trainer(*callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(callbacks),
        callbacks=list(callbacks),
        **settings,
    )


def fit(*callbacks: pl.Callback, checkpoint: Path | None = None, **settings: Any) -> list[tuple[int, int, float, int]]:
    model = Recorder()
    trainer(*callbacks, max_epochs=3, **settings).fit(model, data(), ckpt_path=checkpoint)
    return model.seen


# The resumed run writes no checkpoints of its own.
@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., callbacks used to create")
@pytest.mark.parametrize("settings", [{}, {"limit_train_batches": 3}])
@pytest.mark.parametrize("when", [{"every_n_train_steps": 2}, {"every_n_epochs": 1}])
def test_resumed_run_sees_the_same_batches(tmp_path: Path, settings: dict[str, Any], when: dict[str, Any]) -> None:
    whole = fit(ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, **when), **settings)
    assert len({row[2] for row in whole}) == len(whole)  # every epoch has batches of its own
    checkpoints = sorted(tmp_path.glob("*.ckpt"))
    assert len(checkpoints) >= 3
    for checkpoint in checkpoints:
        step = int(checkpoint.stem.removeprefix("step="))
        assert fit(checkpoint=checkpoint, **settings) == whole[step:]


def test_overfitting_does_not_shuffle() -> None:
    seen = fit(overfit_batches=2)
    assert len(seen) == 6
    assert [row[2:] for row in seen[:2]] == [row[2:] for row in seen[2:4]]


def test_predict() -> None:
    module = data()
    (predicted,) = [trainer().predict(Recorder(), module)]
    assert predicted is not None
    assert sum(len(batch) for batch in predicted) == 900


def test_batch_is_moved() -> None:
    module = data()
    dense, sparse, label = module.transfer_batch_to_device(
        next(iter(module.train_dataloader())), torch.device("meta"), dataloader_idx=0
    )
    assert {dense.device.type, sparse.values().device.type, sparse.lengths().device.type, label.device.type} == {"meta"}


def test_command_line(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        f"""
data:
  class_path: lightning_embcomp.data.ClickLogDataModule
  init_args:
    path: {tmp_path}/log.csv
    format: table
    batch_size: 2
    split: {{kind: random, validation: 0.25, test: 0.25, seed: 3}}
    schema:
      label: rating
      positive_from: 4
      categorical: [user, city]
      multi_valued: {{tags: "|"}}
      dialect: {{separator: ";"}}
      side: [{{path: {tmp_path}/users.csv, key: user, columns: [city]}}]
"""
    )
    (tmp_path / "log.csv").write_text("rating;user;tags\n5;a;x|y\n1;b;\n4;a;x\n2;c;y\n")
    (tmp_path / "users.csv").write_text("user;city\na;Rome\nb;Oslo\n")
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(pl.LightningDataModule, "data")
    module = parser.instantiate_classes(parser.parse_args(["--config", str(config)])).data
    assert isinstance(module, ClickLogDataModule)
    module.prepare_data()
    module.setup("fit")
    assert [feature.name for feature in module.features] == ["user", "city", "tags"]
    assert module.log.meta.rows == (2, 1, 1) and sum(module.log.meta.positives) == 2


def test_command_line_of_the_synthetic_log() -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(pl.LightningDataModule, "data")
    arguments = ["--data=SyntheticClickLogDataModule", "--data.log.num_embeddings=[10,20]", "--data.log.drift=0.5"]
    module = parser.instantiate_classes(parser.parse_args(arguments)).data
    assert module.log == SyntheticClickLog(num_embeddings=(10, 20), drift=0.5)


def test_settings_are_checked() -> None:
    schema = ClickLogSchema(label="y", categorical=("c",))
    for settings in ({"batch_size": 0}, {"min_count": 0}, {"max_rows": 0}, {"num_workers": -1}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            ClickLogDataModule("log.csv", format="table", schema=schema, **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="on_bad_rows"):
        ClickLogDataModule("log.csv", on_bad_rows="ignore")  # type: ignore[arg-type]

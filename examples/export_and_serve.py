"""From training to serving: `python examples/export_and_serve.py`.

Trains a small click model whose tables are pruned while they train, writes them as INT4 rows, loads them into a fresh
model and compares the predictions. `ModelExport` does the same at the end of a `fit`, and `embcomp export` from a
checkpoint.
"""

import tempfile
from pathlib import Path

import lightning.pytorch as pl
import torch

from lightning_embcomp import DimensionPruning
from lightning_embcomp.data import SyntheticClickLog, SyntheticClickLogDataModule
from lightning_embcomp.export import ExportOptions, export_module, load, load_model
from lightning_embcomp.models import ClickModel


def main() -> None:
    """Train, export, load, compare."""
    torch.manual_seed(0)
    log = SyntheticClickLog(num_rows=20_000, num_embeddings=(200, 20_000), num_dense=2)
    data = SyntheticClickLogDataModule(log, batch_size=512)
    model = ClickModel(over_layers=(32,))
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[DimensionPruning(target=0.5)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data)
    batches = list(data.val_dataloader())

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "served"
        # Validation batches let the NE guard compare before and after; a table that costs too much gets more bits.
        report = export_module(model, path, ExportOptions(format="packed", bits=4), batches=batches)
        assert report.guard is not None
        print(f"plain float32 tables:   {report.plain:>9,} bytes")
        print(f"tables on disk:         {report.disk.total:>9,} bytes, {report.disk_ratio:.1f} times fewer")
        print(f"tables while serving:   {report.serving.total:>9,} bytes, {report.serving_ratio:.1f} times fewer")
        print(f"validation NE:          {report.guard.ne_before:.5f} before, {report.guard.ne_after:.5f} after")

        # The tables alone, with the interface of the collection that they replace ...
        tables = load(path)
        dense, sparse, _ = batches[0]
        print(f"pooled embeddings:      {tuple(tables(sparse).values().shape)}")

        # ... or the whole model: tables of a model that is not built yet are never allocated in full.
        served = load_model(path, ClickModel(features=data.features, num_dense=2, over_layers=(32,)))
        with torch.inference_mode():
            difference = (served(dense, sparse) - model(dense, sparse)).abs().max().item()
        print(f"largest logit change:   {difference:.4f}")


if __name__ == "__main__":
    main()

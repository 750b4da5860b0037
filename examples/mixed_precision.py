"""Search the bits that each group of rows needs: `python examples/mixed_precision.py`.

The first epoch searches, the second trains the tables at the widths that were found. The tables are then written to
disk bit by bit, and served.
"""

import tempfile
from pathlib import Path

import lightning.pytorch as pl
import torch

from lightning_embcomp import MixedPrecisionSearch
from lightning_embcomp.data import SyntheticClickLog, SyntheticClickLogDataModule
from lightning_embcomp.export import ExportOptions, export_module, load_model
from lightning_embcomp.models import ClickModel


def main() -> None:
    """Search, retrain, export, serve."""
    torch.manual_seed(0)
    log = SyntheticClickLog(num_rows=40_000, num_embeddings=(200, 2_000, 20_000), num_dense=2)
    data = SyntheticClickLogDataModule(log, batch_size=512)
    model = ClickModel(over_layers=(32,))
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=[MixedPrecisionSearch(ratio=20)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data)
    print(f"bits per value: {trainer.callback_metrics['mpe/average_bits']:.2f} on average")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "served"
        report = export_module(model, path, ExportOptions(format="packed"))
        print(f"float32 tables: {report.plain:,} bytes, on disk: {report.disk.total:,} bytes")
        served = load_model(path, ClickModel(features=data.features, num_dense=2, over_layers=(32,)))
        dense, sparse, _ = next(iter(data.val_dataloader()))
        model.eval()
        with torch.inference_mode():
            difference = (served(dense, sparse) - model(dense, sparse)).abs().max().item()
        print(f"largest difference of a logit: {difference}")


if __name__ == "__main__":
    main()

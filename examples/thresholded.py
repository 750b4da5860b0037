"""Two processes that exchange the largest gradients and pooled values only: `python examples/thresholded.py`.

What crosses between them is counted, and compared with what plain training would send.
"""

import lightning.pytorch as pl

from lightning_embcomp import GradientThresholding, PooledThresholding, TorchRecStrategy, comm_codecs
from lightning_embcomp.data import SyntheticClickLog, SyntheticClickLogDataModule
from lightning_embcomp.models import ClickModel


def main() -> None:
    """Train, and say what was sent."""
    data = SyntheticClickLogDataModule(SyntheticClickLog(num_rows=20_000), batch_size=256)
    gradients = GradientThresholding(density=0.01, warmup_steps=5)
    rows = comm_codecs(PooledThresholding(forward_density=0.25, row_dim=16))
    trainer = pl.Trainer(
        strategy=TorchRecStrategy(sharding={"*": "table_wise"}, codecs=rows),
        accelerator="cpu",
        devices=2,
        max_epochs=1,
        callbacks=[gradients],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(ClickModel(embedding_lr=0.05), datamodule=data)
    dense = gradients.total
    pooled = rows.traffic()["pooled/forward"]
    print(
        f"process {trainer.global_rank}: gradients {dense.sent:,} of {dense.dense:,} bytes, pooled rows"
        f" {pooled.encoded:,} of {pooled.dense:,} bytes",
        flush=True,
    )


if __name__ == "__main__":
    main()

"""One byte per row in the place of an adaptive optimizer: `python examples/frequency_lr.py`.

Trains the same model with plain SGD, row-wise Adagrad (4 bytes of state per row) and frequency-aware SGD (1 byte), and
prints the validation loss of each, at the best of a few rates.
"""

import warnings

import lightning.pytorch as pl
import torch

from lightning_embcomp import FrequencyAwareLR
from lightning_embcomp.data import SyntheticClickLog, SyntheticClickLogDataModule
from lightning_embcomp.models import ClickModel

LOG = SyntheticClickLog(num_rows=60_000, num_embeddings=(200, 20_000), num_dense=2)
RUNS = {
    "SGD": ("sgd", 50.0, False),
    "row-wise Adagrad": ("rowwise_adagrad", 0.005, False),
    "frequency-aware SGD": ("sgd", 100.0, True),
}


def validation_loss(optimizer: str, rate: float, frequency_aware: bool) -> tuple[float, dict[str, float]]:
    """Train for three epochs.

    Returns:
        Normalised entropy of the validation rows, and the logged rates.
    """
    torch.manual_seed(0)
    model = ClickModel(embedding_dim=8, over_layers=(32,), embedding_optimizer=optimizer, embedding_lr=rate)  # type: ignore[arg-type]
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[FrequencyAwareLR(log_every_n_steps=20)] if frequency_aware else [],
    )
    trainer.fit(model, datamodule=SyntheticClickLogDataModule(LOG, batch_size=512))
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return metrics["val_ne"], {name: value for name, value in metrics.items() if name.startswith("frequency_lr/")}


def main() -> None:
    """Train all three and compare."""
    warnings.filterwarnings("ignore")
    for name, run in RUNS.items():
        loss, logged = validation_loss(*run)
        print(f"{name}: validation NE {loss:.4f}")
        if logged:
            print(
                f"  {logged['frequency_lr/bytes_per_row']:g} byte of state per row; mean rate"
                f" {logged['frequency_lr/rate_decile_0']:.2f} for the rarest tenth of the rows,"
                f" {logged['frequency_lr/rate_decile_9']:.2f} for the most frequent"
            )


if __name__ == "__main__":
    main()

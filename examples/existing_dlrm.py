"""TorchRec's own DLRM, with two lines added to its trainer: `python examples/existing_dlrm.py`.

The model is `torchrec.models.dlrm` as it comes, its tables are trained in the backward pass. The run is stopped,
resumed from its checkpoint, and predicts.
"""

import tempfile
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from lightning_embcomp import DimensionPruning, PruningSchedule  # added
from lightning_embcomp.report.live import measure

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it scripts functions as it is imported
    from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward

ROWS = {"user": 50_000, "item": 20_000, "hour": 24}
Batch = tuple[Tensor, KeyedJaggedTensor, Tensor]


class Clicks(pl.LightningModule):
    """TorchRec's DLRM as a LightningModule."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        tables = [
            EmbeddingBagConfig(name=f"t_{name}", num_embeddings=rows, embedding_dim=dim, feature_names=[name])
            for name, rows in ROWS.items()
        ]
        self.dlrm = DLRM(EmbeddingBagCollection(tables), 4, [32, dim], [64, 1])
        apply_optimizer_in_backward(RowWiseAdagrad, self.dlrm.sparse_arch.parameters(), {"lr": 0.05})

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Log loss of a batch."""
        dense, sparse, label = batch
        loss = torch.nn.functional.binary_cross_entropy_with_logits(self.dlrm(dense, sparse).squeeze(1), label)
        self.log("train_loss", loss)
        return loss

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Click probabilities `(B,)`."""
        dense, sparse, _ = batch
        return torch.sigmoid(self.dlrm(dense, sparse).squeeze(1))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Only what is not trained in backward."""
        return torch.optim.Adam([*self.dlrm.dense_arch.parameters(), *self.dlrm.over_arch.parameters()], lr=1e-3)


def batches(count: int, size: int) -> DataLoader[Batch]:
    """Make up clicks in which few users and items are popular."""
    made = []
    for _ in range(count):
        ids = torch.stack([(rows * torch.rand(size) ** 5).long() for rows in ROWS.values()])
        sparse = KeyedJaggedTensor(list(ROWS), ids.flatten(), lengths=torch.ones(ids.numel(), dtype=torch.int64))
        made.append((torch.rand(size, 4), sparse, (ids[0] % 2).float()))
    return DataLoader(made, batch_size=None)  # type: ignore[arg-type]


def trainer(epochs: int) -> pl.Trainer:
    """The trainer as it was, with one callback."""
    return pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=[DimensionPruning(target=0.8, schedule=PruningSchedule(every_n_steps=20))],  # added
    )


def main() -> None:
    """Train, stop, resume, predict."""
    torch.manual_seed(0)
    data, first = batches(40, 512), trainer(epochs=1)
    first.fit(Clicks(), data)
    print(f"loss after one epoch:  {first.callback_metrics['train_loss']:.3f}")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "stopped.ckpt"
        first.save_checkpoint(checkpoint)
        resumed, again = Clicks(), trainer(epochs=3)
        again.fit(resumed, data, ckpt_path=checkpoint)
        print(f"loss after two more:   {again.callback_metrics['train_loss']:.3f}")
    clicks = again.predict(resumed, data)
    assert clicks is not None
    print(f"predictions:           {sum(len(batch) for batch in clicks):,}")
    memory = measure(resumed)
    print(f"embedding bytes:       {memory.plain_total:,} plain, {memory.total:,} held in training")


if __name__ == "__main__":
    main()

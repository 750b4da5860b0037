"""Train a table that would not fit into memory: it never exists in full.

    python examples/out_of_core_table.py --rows 100_000_000 --dim 64 --target 0.97

The module builds its table in `configure_model`, so that the callback can leave it unallocated and store live rows
only. Beside these, a row costs about 3 bytes: where its columns are, and how useful they have been.
"""

import argparse
import resource
import sys
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from lightning_embcomp import DimensionPruning
from lightning_embcomp.report.live import measure


class LargeTable(pl.LightningModule):
    """One table and a linear layer."""

    def __init__(self, rows: int, dim: int) -> None:
        super().__init__()
        self.rows, self.dim = rows, dim
        self.bags: nn.Module | None = None
        self.top = nn.Linear(dim, 1)

    def configure_model(self) -> None:
        """Build the table, once; in `__init__` it would be allocated in full."""
        if self.bags is None:
            table = EmbeddingBagConfig(
                name="t_item", num_embeddings=self.rows, embedding_dim=self.dim, feature_names=["item"]
            )
            self.bags = FusedEmbeddingBagCollection([table], RowWiseAdagrad, {"lr": 0.02}, device=torch.device("cpu"))

    def training_step(self, batch: tuple[KeyedJaggedTensor, Tensor], batch_idx: int) -> Tensor:
        """Log loss of a batch."""
        assert self.bags is not None
        sparse, label = batch
        return nn.functional.binary_cross_entropy_with_logits(self.top(self.bags(sparse).values()).squeeze(1), label)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Only what is not trained in backward."""
        return torch.optim.Adam(self.top.parameters())


def batches(rows: int, count: int, size: int) -> list[tuple[KeyedJaggedTensor, Tensor]]:
    """Make up batches in which few items are popular."""
    made = []
    for _ in range(count):
        ids = (rows * torch.rand(size, dtype=torch.float64) ** 8).long()
        made.append((KeyedJaggedTensor(["item"], ids, lengths=torch.ones_like(ids)), (ids % 2).float()))
    return made


def peak_rss() -> int:
    """Most memory that the process ever held, in bytes."""
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Train, and compare the process's peak with what the table would have taken."""
    parser = argparse.ArgumentParser(description="Train a table that would not fit into memory.")
    parser.add_argument("--rows", type=int, default=200_000, help="rows of the table")
    parser.add_argument("--dim", type=int, default=64, help="columns of the table")
    parser.add_argument("--target", type=float, default=0.95, help="fraction of the weights not to store")
    parser.add_argument("--steps", type=int, default=40, help="training steps")
    args = parser.parse_args()
    torch.manual_seed(0)
    before = peak_rss()
    model = LargeTable(args.rows, args.dim)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[DimensionPruning(target=args.target)],
    )
    loader: DataLoader[Any] = DataLoader(batches(args.rows, args.steps, 1024), batch_size=None)  # type: ignore[arg-type]
    trainer.fit(model, loader)
    memory = measure(model)
    mb = 1e6
    print(f"the table in full, with optimizer state: {memory.plain_total / mb:,.1f} MB")
    print(f"held in training:                        {memory.total / mb:,.1f} MB")
    print(f"peak RSS of the process:                 {peak_rss() / mb:,.1f} MB, {before / mb:,.1f} MB before the table")


if __name__ == "__main__":
    main()

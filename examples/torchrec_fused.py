"""TorchRec's tables with a fused optimizer, pruned while they train: `python examples/torchrec_fused.py`.

The user's large table keeps a fifth of its weight bytes; the small one is left alone.
"""

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from lightning_embcomp import DimensionPruning, PruningSchedule
from lightning_embcomp.report.live import measure

ROWS = {"user": 50_000, "country": 200}


class TwoTables(pl.LightningModule):
    """Logistic regression over two pooled embeddings; the tables train in backward."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        tables = [
            EmbeddingBagConfig(name=f"t_{name}", num_embeddings=rows, embedding_dim=dim, feature_names=[name])
            for name, rows in ROWS.items()
        ]
        self.bags = FusedEmbeddingBagCollection(tables, RowWiseAdagrad, {"lr": 0.02}, device=torch.device("cpu"))
        self.top = nn.Linear(2 * dim, 1)

    def training_step(self, batch: tuple[KeyedJaggedTensor, Tensor], batch_idx: int) -> Tensor:
        """Log loss of a batch."""
        sparse, label = batch
        return nn.functional.binary_cross_entropy_with_logits(self.top(self.bags(sparse).values()).squeeze(1), label)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Only what is not trained in backward."""
        return torch.optim.Adam(self.top.parameters())


def batches(count: int, size: int) -> list[tuple[KeyedJaggedTensor, Tensor]]:
    """Make up batches in which few users are active."""
    made = []
    for _ in range(count):
        ids = torch.stack([(rows * torch.rand(size) ** 5).long() for rows in ROWS.values()])
        sparse = KeyedJaggedTensor(list(ROWS), ids.flatten(), lengths=torch.ones(ids.numel(), dtype=torch.int64))
        made.append((sparse, (ids[0] % 2).float()))
    return made


def main() -> None:
    """Train and say what the tables hold."""
    torch.manual_seed(0)
    model = TwoTables()
    plain = measure(model)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[DimensionPruning(target=0.8, tables="t_user", schedule=PruningSchedule(every_n_steps=20))],
    )
    trainer.fit(model, torch.utils.data.DataLoader(batches(60, 512), batch_size=None))  # type: ignore[arg-type]
    held = measure(model)
    print(f"embedding bytes in training: {plain.total:,} -> {held.total:,}")
    print(
        f"weights {held.weights:,}, optimizer state {held.optimizer_state:,}, router {held.router:,},"
        f" statistics {held.statistics:,}"
    )


if __name__ == "__main__":
    main()

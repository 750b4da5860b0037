"""A trainer that exists already, plus two lines: `python examples/existing_trainer.py`.

The module uses plain `nn.EmbeddingBag` tables and Adam from `configure_optimizers`; nothing of it is changed.
"""

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_embcomp import DimensionPruning  # added


class Recommender(pl.LightningModule):
    """Click probability from the items that a user has seen and the item that is offered."""

    def __init__(self, items: int = 20_000, dim: int = 32) -> None:
        super().__init__()
        self.history = nn.EmbeddingBag(items, dim, mode="mean")
        self.offer = nn.EmbeddingBag(items, dim, mode="sum")
        self.top = nn.Sequential(nn.Linear(2 * dim, 64), nn.ReLU(), nn.Linear(64, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Log loss of a batch: items seen `(B, 8)`, item offered `(B, 1)`, label `(B,)`."""
        seen, offered, label = batch
        logit = self.top(torch.cat([self.history(seen), self.offer(offered)], dim=1)).squeeze(1)
        return nn.functional.binary_cross_entropy_with_logits(logit, label)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam over everything, the tables included."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def main() -> None:
    """Train on made-up clicks, where few items are popular."""
    torch.manual_seed(0)
    items = (20_000 * torch.rand(6_400, 9) ** 6).long()
    label = (items[:, 8] % 2).float()
    loader = DataLoader(TensorDataset(items[:, :8], items[:, 8:], label), batch_size=128)
    model = Recommender()
    before = sum(p.numel() for p in (model.history.weight, model.offer.weight))

    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[DimensionPruning(target=0.9)],  # added
    )
    trainer.fit(model, loader)

    after = sum(p.numel() for table in (model.history, model.offer) for p in table.parameters())
    print(f"table weights: {before:,} -> {after:,}; Adam keeps two more numbers for each")


if __name__ == "__main__":
    main()

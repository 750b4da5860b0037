"""One of two processes that train with and without moving tables."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torch.utils.data import DataLoader, IterableDataset
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
from torchrec.optim import RowWiseAdagrad
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from lightning_embcomp import DimensionPruning
from lightning_embcomp.strategies import ShardingError, TorchRecStrategy
from lightning_embcomp.strategies.resharding import ReshardOnImbalance

ROWS = {"a": 60, "b": 50, "c": 40, "d": 30}
LENGTHS = {"a": 6, "b": 5, "c": 1, "d": 1}  # the tables that are looked up most start on one rank
DIM = 16


class Model(pl.LightningModule):
    def __init__(self, optimizer: type[torch.optim.Optimizer] | None = RowWiseAdagrad, fused: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        configs = [
            EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=DIM, feature_names=[f"f_{name}"])
            for name, rows in ROWS.items()
        ]
        self.bags: Any = EmbeddingBagCollection(tables=configs)
        if fused:
            self.bags = FusedEmbeddingBagCollection(configs, RowWiseAdagrad, {"lr": 0.1}, device=torch.device("cpu"))
        elif optimizer is not None:
            _apply_optimizer_in_backward(optimizer, self.bags.parameters(), {"lr": 0.1})
        self.out = nn.Linear(DIM * len(ROWS), 1)
        self.losses: list[float] = []
        self.placed: list[dict[str, int]] = []

    def training_step(self, batch: KeyedJaggedTensor, batch_idx: int) -> Tensor:
        pooled = self.bags(batch).to_dict()
        loss = self.out(torch.cat([pooled[f"f_{name}"] for name in ROWS], 1)).square().mean()
        self.losses.append(float(loss))
        plan = self.bags.module_sharding_plan
        self.placed.append({name: plan[name].ranks[0] for name in ROWS})
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Batches(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[KeyedJaggedTensor]:
        for step in range(12):
            generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
            values = [torch.randint(0, ROWS[name], (8 * LENGTHS[name],), generator=generator) for name in ROWS]
            lengths = torch.tensor([LENGTHS[name] for name in ROWS for _ in range(8)])
            yield KeyedJaggedTensor([f"f_{name}" for name in ROWS], torch.cat(values), lengths=lengths)


def fit(model: Model, callbacks: list[pl.Callback], sharding: str = "table_wise") -> Any:
    strategy = TorchRecStrategy(sharding={"*": sharding}, planner=Skewed)
    trainer = pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=2,
        max_epochs=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(Batches(), batch_size=None))
    return trainer


def Skewed(**kwargs: Any) -> Any:  # noqa: N802 - stands for a planner's class
    """TorchRec's plan, but a and b on rank 0."""
    from torchrec.distributed.planner import EmbeddingShardingPlanner

    def skew(options: list[Any]) -> list[Any]:
        for option in options:
            if option.sharding_type == "table_wise":
                option.shards[0].rank = 0 if option.name in "ab" else 1
        return options

    return EmbeddingShardingPlanner(**kwargs, callbacks=[skew], stats=[], debug=False)


def refused(callbacks: list[pl.Callback], model: Model, message: str, sharding: str = "table_wise") -> None:
    try:
        fit(model, callbacks, sharding)
    except ShardingError as error:
        assert message in str(error), str(error)
        return
    raise AssertionError(f"not refused: {message}")


def moved(fused: bool) -> None:
    plain, moving = Model(fused=fused), Model(fused=fused)
    fit(plain, [])
    trainer = fit(moving, [ReshardOnImbalance(every_n_steps=3)])
    assert plain.losses == moving.losses, (plain.losses, moving.losses)
    assert moving.placed[:3] == plain.placed[:3] == [{"a": 0, "b": 0, "c": 1, "d": 1}] * 3
    assert moving.placed[3] == {"a": 0, "b": 1, "c": 1, "d": 0}, moving.placed
    assert moving.placed[-1] == moving.placed[3]
    assert trainer.callback_metrics["reshard/moved"] == 0
    assert trainer.callback_metrics["reshard/imbalance"] < 1.2


def main() -> None:
    for fused in (False, True):
        moved(fused)
    watched = ReshardOnImbalance(every_n_steps=3)
    refused([watched], Model(), "is sharded row_wise; TorchRec moves whole tables", "row_wise")
    refused([watched], Model(None), "is trained from configure_optimizers")
    refused([watched, DimensionPruning(target=0.5)], Model(), "are compressed, and do not move")
    del os.environ["PYTHONHASHSEED"]
    refused([watched], Model(), "PYTHONHASHSEED=0")


if __name__ == "__main__":
    main()
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)

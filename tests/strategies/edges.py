"""What the processes of test_edges do."""

from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchrec.modules.embedding_configs import PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
from torchrec.optim import RowWiseAdagrad
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from lightning_embcomp import DimensionPruning, Granularity, PooledThresholding
from lightning_embcomp.checkpoints import ranks
from lightning_embcomp.strategies import ShardingError, TorchRecStrategy
from lightning_embcomp.strategies.fused_state import rates
from lightning_embcomp.strategies.optimizers import fused_optimizers
from lightning_embcomp.strategies.resharding import move_tables
from tests.strategies.checks import assert_same, start_values, trainer
from tests.strategies.evaluating import Rows, collate
from tests.strategies.models import (
    FEATURES,
    Batches,
    Clicks,
    apply_optimizer_in_backward,
    configs,
    loader,
)
from tests.strategies.training import SGD

CPU = torch.device("cpu")


class Squares(Clicks):
    """Every output counts, whatever it is called."""

    def forward(self, dense: Tensor, ids: KeyedJaggedTensor) -> Tensor:
        rows = self.bags(ids).to_dict()
        return torch.cat([rows[name] for name in sorted(rows)], 1).square().mean(1)


def averages() -> None:
    """Bags that are averaged, beside others that are not, with a feature in two tables."""
    dist.init_process_group("gloo")
    mixed, all_mean = [PoolingType.MEAN, PoolingType.SUM, PoolingType.SUM], [PoolingType.MEAN] * 3
    both = {"t0": "row_wise", "t[12]": "table_wise"}
    for sharding, poolings, fused in (
        (both, mixed, False),
        (both, all_mean, True),
        ({"*": "row_wise"}, mixed, False),
    ):

        def tables(poolings: list[PoolingType] = poolings) -> Any:
            found = configs()
            for config, pooling in zip(found, poolings, strict=True):
                config.pooling = pooling
            found[0].feature_names = ["f0", "f2"]
            return found

        def whole(tables: Any = tables) -> nn.Module:
            return EmbeddingBagCollection(tables=tables(), device=CPU)

        def in_one(tables: Any = tables) -> nn.Module:
            return FusedEmbeddingBagCollection(tables(), torch.optim.SGD, {"lr": 0.3}, device=CPU)

        module = Squares(bags=in_one, dense=False) if fused else Squares(bags=whole, dense=False, **SGD)
        module.configure_optimizers = lambda: None  # type: ignore[method-assign]
        plain = Squares(bags=whole, dense=False, **SGD)
        plain.load_state_dict(start_values(module))
        for batch in Batches(5, whole=True):
            plain.loss(batch).backward()
        trainer(TorchRecStrategy(sharding=sharding)).fit(module, loader(5))
        assert_same(module, plain.state_dict(), tolerance=1e-6)


def few_rows(folder: str) -> None:
    """Fewer rows than processes: the state of an optimizer of configure_optimizers is saved and comes back."""
    dist.init_process_group("gloo")

    def bags() -> nn.Module:
        tables = configs()
        tables[2].num_embeddings = 1
        return EmbeddingBagCollection(tables=tables, device=CPU)

    class First(Clicks):
        def forward(self, dense: Tensor, ids: KeyedJaggedTensor) -> Tensor:
            return super().forward(dense, KeyedJaggedTensor(ids.keys(), ids.values() * 0, lengths=ids.lengths()))

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=0.01)

    module, wanted = First(bags=bags), First(bags=bags)
    start = start_values(module)
    module.load_state_dict(start)
    wanted.load_state_dict(start)
    optimizer = wanted.configure_optimizers()
    for batch in Batches(6, whole=True):
        wanted.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    run = trainer(TorchRecStrategy(sharding={"*": "row_wise"}))
    run.fit(module, loader(3))
    run.save_checkpoint(f"{folder}/few.ckpt")
    fresh = First(bags=bags)
    again = trainer(TorchRecStrategy(sharding={"*": "row_wise"}), max_epochs=2)
    again.fit(fresh, loader(3, first=3), ckpt_path=f"{folder}/few.ckpt")
    assert_same(fresh, wanted.state_dict(), tolerance=1e-6)


def copies() -> None:
    """Copies of compressed tables are equal, although the processes were not seeded alike."""
    dist.init_process_group("gloo")
    torch.manual_seed(dist.get_rank())

    class Late(Clicks):
        """Builds its tables where they are left unallocated."""

        def __init__(self) -> None:
            super().__init__(bags=nn.Identity)

        def configure_model(self) -> None:
            if isinstance(self.bags, nn.Identity):
                self.bags = EmbeddingBagCollection(tables=configs(), device=CPU)
                apply_optimizer_in_backward(torch.optim.SGD, self.bags.parameters(), {"lr": 0.3})

    for module in (Clicks(**SGD), Late()):
        pruning = DimensionPruning(target=0.5, granularity=Granularity(chunks=2))
        trainer(TorchRecStrategy(sharding={"*": "data_parallel"}), callbacks=[pruning]).fit(module, loader(4))
        [engine] = module.bags.engines  # type: ignore[union-attr]
        mine = [weights.clone() for weights in engine.split_embedding_weights()]
        found: list[Any] = [None, None]
        dist.all_gather_object(found, mine)
        assert sum(weights.numel() for weights in mine) > 100
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def earlier_runs() -> None:
    """What a second strategy asks for, and cannot have."""
    dist.init_process_group("gloo")
    module = Clicks(**SGD)
    trainer(TorchRecStrategy(sharding={"*": "table_wise"}, timeout=timedelta(seconds=77))).fit(module, loader(2))
    assert ranks._group is not None and ranks._group[1] == timedelta(seconds=77)
    trainer(TorchRecStrategy(sharding={"t*": ["row_wise", "table_wise"]})).fit(module, loader(2))
    with pytest.raises(ShardingError, match="asks for row_wise for table 't1', which an earlier run of this module"):
        trainer(TorchRecStrategy(sharding={"t1": "row_wise"})).fit(module, loader(2))
    with pytest.raises(ShardingError, match="'u.'.* matches no table; there are t0, t1, t2"):
        trainer(TorchRecStrategy(sharding={"u*": "table_wise"})).validate(module, loader(2))
    half, byte = (PooledThresholding(forward=name, backward="bf16") for name in ("fp16", "bf16"))  # type: ignore[arg-type]
    with pytest.raises(ShardingError, match="codecs come too late for 'bags', which was sharded before with no codecs"):
        trainer(TorchRecStrategy(codecs=half)).fit(module, loader(2))
    other = Clicks(**SGD)
    trainer(TorchRecStrategy(codecs=half)).fit(other, loader(2))
    for same in (None, PooledThresholding(forward="fp16", backward="bf16")):
        trainer(TorchRecStrategy(codecs=same)).fit(other, loader(2))
    with pytest.raises(ShardingError, match="sharded before with other codecs and keeps them. Leave codecs out"):
        trainer(TorchRecStrategy(codecs=byte)).fit(other, loader(2))


def keywords() -> None:
    """Features given by name, on processes with different numbers of batches."""
    dist.init_process_group("gloo")

    class Named(Clicks):
        def forward(self, dense: Tensor, ids: KeyedJaggedTensor) -> Tensor:
            rows = self.bags(features=ids).to_dict()
            return torch.cat([rows[name] for name in FEATURES], 1).mean(1)

    module = Named(dense=False, **SGD)
    data = DataLoader(Rows(13), batch_size=6, collate_fn=collate)
    predicted = trainer(TorchRecStrategy(), use_distributed_sampler=True).predict(module, data)
    assert [len(p) for p in predicted] == ([6, 1] if dist.get_rank() == 0 else [6])
    # Built for a GPU, but not allocated: TorchRec would copy what is not there.
    unallocated = Named(dense=False, device="meta", **SGD)
    unallocated.bags._device = torch.device("cuda", 0)
    predicted = trainer(TorchRecStrategy(), use_distributed_sampler=True).predict(unallocated, data)
    assert all(torch.isfinite(p).all() for p in predicted)


def moved_rates() -> None:
    """Tables with rates of their own, which a schedule has changed, keep them on other ranks."""
    dist.init_process_group("gloo")
    module = Clicks()
    for number, weight in enumerate(module.bags.parameters()):
        apply_optimizer_in_backward(RowWiseAdagrad, [weight], {"lr": 0.1 * (number + 1)})

    def held() -> dict[str, dict[str, float]]:
        found: list[Any] = [None, None]
        dist.all_gather_object(found, rates({"bags": module.bags}))
        return {table: entry for of_process in found for table, entry in of_process.items()}

    class Move(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step != 2:
                return
            strategy = trainer.strategy
            for optimizer in fused_optimizers([module.bags], []):
                for group in optimizer.param_groups:
                    group["lr"] = group["lr"] / 10
                optimizer.step()
            before = held()
            wanted = {f"bags/embedding_bags.t{t}.weight": pytest.approx(0.01 * (t + 1)) for t in range(3)}
            assert {table: entry["lr"] for table, entry in before.items()} == wanted
            plan: Any = module.bags.module_sharding_plan
            move_tables(strategy, "bags", {name: 1 - choice.ranks[0] for name, choice in plan.items()})
            assert held() == before

    trainer(TorchRecStrategy(sharding={"*": "table_wise"}), callbacks=[Move()]).fit(module, loader(4))
    assert module.training_steps == 4

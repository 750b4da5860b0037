"""What the processes of test_evaluation do."""

import dataclasses
from collections import namedtuple
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from lightning_embcomp.strategies import ShardingError, TorchRecStrategy
from lightning_embcomp.strategies.sharders import BagSharder
from tests.strategies.checks import assert_same, kinds, start_values, trainer
from tests.strategies.models import Batch, Batches, Clicks, configs, global_batch, loader, part, train_plain
from tests.strategies.training import SGD, THREE


class Rows(Dataset[int]):
    """Row numbers, to which Lightning adds a sampler."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> int:
        return row


def collate(rows: list[int]) -> Batch:
    whole = global_batch(0, 13)
    parts = [part(whole, row, 13) for row in rows]
    ids = [p[1] for p in parts]
    values = torch.cat([torch.cat([k[key].values() for k in ids]) for key in ids[0].keys()])
    lengths = torch.cat([torch.cat([k[key].lengths() for k in ids]) for key in ids[0].keys()])
    return (
        torch.cat([p[0] for p in parts]),
        KeyedJaggedTensor(ids[0].keys(), values, lengths=lengths),
        torch.cat([p[2] for p in parts]),
    )


def evaluation() -> None:
    """Validate, test and predict as one process does, sharded for the first time or after a fit."""
    dist.init_process_group("gloo")
    module = Clicks(**SGD)
    plain = Clicks(**SGD)
    plain.load_state_dict(start_values(module))
    plain.eval()
    whole = global_batch(0, 12)
    with torch.no_grad():
        expected = plain(whole[0], whole[1])
        loss = plain.loss(whole)
    strategy = TorchRecStrategy(sharding=THREE)
    run = trainer(strategy)
    [logged] = run.validate(module, loader(1))
    assert logged["val_loss"] == pytest.approx(float(loss), rel=1e-5)
    [logged] = run.test(module, loader(1))
    assert logged["test_loss"] == pytest.approx(float(loss), rel=1e-5)
    [predicted] = run.predict(module, loader(1))
    torch.testing.assert_close(predicted, expected[dist.get_rank() * 6 :][:6])

    # 13 rows: Lightning's sampler gives process 0 one more, and with that one more batch.
    data = DataLoader(Rows(13), batch_size=6, collate_fn=collate)
    predicted = trainer(TorchRecStrategy(), use_distributed_sampler=True).predict(module, data)
    assert [len(p) for p in predicted] == ([6, 1] if dist.get_rank() == 0 else [6])
    whole = global_batch(0, 13)
    with torch.no_grad():
        expected = plain(whole[0], whole[1])
    torch.testing.assert_close(torch.cat(predicted), expected[dist.get_rank() :: 2])

    # Validation inside a fit does not disturb it.
    fitted, plain = Clicks(**SGD), Clicks(**SGD)
    plain.load_state_dict(start_values(fitted))
    train_plain(plain, Batches(8, whole=True))
    trainer(TorchRecStrategy(sharding=THREE), val_check_interval=2, num_sanity_val_steps=2).fit(
        fitted, loader(8), loader(3)
    )
    assert_same(fitted, plain.state_dict())
    batches()
    options()


def batches() -> None:
    """Batches of any form are moved, by the hooks of the module."""

    @dataclasses.dataclass(frozen=True)
    class Frozen:
        dense: Tensor
        ids: KeyedJaggedTensor
        label: Tensor

    class Forms(Clicks):
        seen: list[str] = []

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            self.seen.append(type(batch).__name__)
            if isinstance(batch, Frozen):
                return batch.dense, batch.ids, batch.label
            return tuple(batch.values()) if isinstance(batch, dict) else tuple(batch)

    Named = namedtuple("Named", ["dense", "ids", "label"])
    own = [part(global_batch(step, 12), dist.get_rank(), 2) for step in range(4)]
    forms = [Frozen(*own[0]), Named(*own[1]), dict(zip("abc", own[2], strict=True)), list(own[3])]
    module, plain = Forms(**SGD), Clicks(**SGD)
    plain.load_state_dict(start_values(module))
    train_plain(plain, Batches(4, whole=True))
    trainer(TorchRecStrategy(sharding=THREE)).fit(module, DataLoader(forms, batch_size=None))  # type: ignore
    assert module.seen == ["Frozen", "Named", "dict", "list"]
    assert_same(module, plain.state_dict())


class Pair(pl.LightningModule):
    """Two collections, one of them in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first = EmbeddingBagCollection(tables=configs(), device=torch.device("cpu"))
        self.blocks = nn.ModuleList([nn.Module(), nn.Module()])
        tables = [c for c in configs() if c.name == "t0"]
        tables[0].name = "other"
        self.blocks[0].bags = EmbeddingBagCollection(tables=tables, device=torch.device("cpu"))
        self.blocks[1].bags = self.blocks[0].bags

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        _, ids, label = batch
        total = self.first(ids).to_dict()["f1"].sum(1)
        for block in self.blocks:
            total = total + block.bags(ids).to_dict()["f0"].sum(1)
        return (total - label).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def options() -> None:
    """Codecs, sharders by path, shared modules, a callback that shards before the strategy does."""
    module, plain = Clicks(**SGD), Clicks(**SGD)
    plain.load_state_dict(start_values(module))
    train_plain(plain, Batches(20, whole=True))
    half = QCommsConfig(forward_precision=CommType.FP16, backward_precision=CommType.FP16)
    trainer(TorchRecStrategy(sharding={"*": "table_wise"}, codecs=half)).fit(module, loader(20))
    assert_same(module, plain.state_dict(), tolerance=1e-2)
    with pytest.raises(AssertionError):
        assert_same(module, plain.state_dict(), tolerance=1e-6)

    class Sharder(BagSharder):
        def sharding_types(self, compute_device_type: str) -> list[str]:
            return ["row_wise"]

    class Earlier(pl.Callback):
        paths: list[str] = []

        def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
            def choose(path: str, module: nn.Module) -> Any:
                self.paths.append(path)
                return Sharder({"optimizer": "sgd"}) if path == "first" else None

            trainer.strategy.shard(pl_module, sharder_for=choose)  # type: ignore[attr-defined]
            assert trainer.strategy.sharded_paths == ["first", "blocks.0.bags", "blocks.1.bags"]  # type: ignore

    class Fused(Pair):
        def __init__(self) -> None:
            super().__init__()
            for bags in (self.first, self.blocks[0].bags):
                torch.distributed.optim._apply_optimizer_in_backward(torch.optim.SGD, bags.parameters(), {"lr": 0.05})

    for cls in (Pair, Fused):
        shared, whole = cls(), cls()
        whole.load_state_dict(start_values(shared))
        optimizer = whole.configure_optimizers()
        for batch in Batches(10, whole=True):
            Pair.training_step(whole, batch, 0).backward()
            optimizer.step()
            optimizer.zero_grad()
        strategy = TorchRecStrategy()
        if cls is Fused:
            # A module that is looked up twice before its backward pass is updated twice there; SGD does not mind.
            trainer(strategy, callbacks=[Earlier()]).fit(shared, loader(10))
            assert kinds(strategy)["t0"] == "row_wise"
            assert "blocks" in Earlier.paths
        else:
            trainer(strategy).fit(shared, loader(10))
        assert shared.blocks[0].bags is shared.blocks[1].bags
        assert_same(shared, whole.state_dict())

    class Wrong(pl.Callback):
        def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
            choose = lambda path, module: BagSharder() if path == "over" else None  # noqa: E731
            trainer.strategy.shard(pl_module, sharder_for=choose)  # type: ignore[attr-defined]

    with pytest.raises(ShardingError, match="'over' is a Linear, but the sharder given for it"):
        trainer(TorchRecStrategy(), callbacks=[Wrong()]).fit(Clicks(), loader(1))

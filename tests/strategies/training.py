"""What the processes of test_training do."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from lightning_embcomp.strategies import ShardingError, TorchRecStrategy
from tests.strategies.checks import assert_same, from_first, kinds, start_values, trainer
from tests.strategies.models import (
    BATCH,
    Batches,
    Clicks,
    Sequences,
    configs,
    loader,
    train_plain,
)

STEPS = 50
THREE = {"t0": "table_wise", "t1": "row_wise", "t2": "column_wise"}
NO_COLUMNS = {"t[02]": "table_wise", "t1": "row_wise"}
SGD = {"in_backward": torch.optim.SGD, "optimizer_kwargs": {"lr": 0.3}}
# The epsilons of PyTorch's and FBGEMM's Adagrad differ.
ADAGRAD = {"in_backward": RowWiseAdagrad, "optimizer_kwargs": {"lr": 0.1, "eps": 1e-8}}


def compare(
    sharding: Any, settings: dict[str, Any], plain_settings: dict[str, Any] | None = None, steps: int = STEPS
) -> Clicks:
    torch.manual_seed(10 + int(torch.randint(0, 1000, ())))
    module = Clicks(**settings)
    wanted = Clicks(**(plain_settings or settings))
    wanted.load_state_dict(start_values(module))
    train_plain(wanted, Batches(steps, whole=True))
    strategy = TorchRecStrategy(sharding=sharding)
    trainer(strategy).fit(module, loader(steps))
    assert module.training_steps == steps
    assert_same(module, wanted.state_dict())
    if sharding:
        assert kinds(strategy) == {t: next(v for k, v in sharding.items() if _fits(t, k)) for t in ("t0", "t1", "t2")}
    return module


def _fits(name: str, pattern: str) -> bool:
    import fnmatch

    return fnmatch.fnmatchcase(name, pattern)


def optimizers_in_backward() -> None:
    """As one process with the whole batch, for each kind of sharding."""
    dist.init_process_group("gloo")
    # Processes that are not seeded alike build different tables: those of process 0 count.
    torch.manual_seed(dist.get_rank())
    compare(THREE, SGD)
    compare(NO_COLUMNS, ADAGRAD)
    compare(None, ADAGRAD)

    def fused() -> nn.Module:
        return FusedEmbeddingBagCollection(configs(), torch.optim.SGD, {"lr": 0.3}, device=torch.device("cpu"))

    class FusedClicks(Clicks):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.over.parameters(), lr=self.lr)  # type: ignore[union-attr]

    module = FusedClicks(bags=fused)
    wanted = Clicks(**SGD)
    wanted.load_state_dict(start_values(module))
    train_plain(wanted, Batches(STEPS, whole=True))
    trainer(TorchRecStrategy(sharding=THREE)).fit(module, loader(STEPS))
    assert_same(module, wanted.state_dict())

    # The optimizer of the strategy, for tables that have none.
    module = Clicks()
    wanted = Clicks(**SGD)
    wanted.load_state_dict(start_values(module))
    train_plain(wanted, Batches(STEPS, whole=True))
    strategy = TorchRecStrategy(sharding=THREE, fused_params={"optimizer": "sgd", "learning_rate": 0.3})
    trainer(strategy).fit(module, loader(STEPS))
    assert_same(module, wanted.state_dict())
    # A second fit of the sharded module, by another trainer, goes on from there.
    again = TorchRecStrategy()
    trainer(again).fit(module, loader(5, first=STEPS))
    train_plain(wanted, Batches(5, first=STEPS, whole=True))
    assert_same(module, wanted.state_dict())
    assert again.sharded_paths == ["bags"] and kinds(again)["t1"] == "row_wise"


def optimizers_of_the_module() -> None:
    """Tables without an optimizer of their own train in that of configure_optimizers; clipping, accumulation."""
    dist.init_process_group("gloo")
    compare(THREE, {})
    compare({"t*": "data_parallel"}, {})

    class Adam(Clicks):
        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=0.01)

    for sharding in (THREE, {"t0": "data_parallel", "t[12]": "row_wise"}):
        for clip, steps_of in ((None, 1), (0.05, 1), (None, 2), (0.05, 2)):
            module, wanted = Adam(), Adam()
            wanted.load_state_dict(start_values(module))
            train_plain(wanted, Batches(10, whole=True), steps_of=steps_of, clip=clip)
            trainer(TorchRecStrategy(sharding=sharding), gradient_clip_val=clip, accumulate_grad_batches=steps_of).fit(
                module, loader(10)
            )
            assert_same(module, wanted.state_dict())

    # Two halves of a batch, accumulated, are the whole batch.
    module, wanted = Clicks(), Clicks()
    wanted.load_state_dict(start_values(module))
    train_plain(wanted, Batches(4, whole=True), steps_of=2)
    trainer(TorchRecStrategy(sharding=THREE), accumulate_grad_batches=2).fit(module, loader(4))
    assert_same(module, wanted.state_dict())


def other_modules() -> None:
    """Sequence embeddings, modules without dense parameters, precision, hooks."""
    dist.init_process_group("gloo")
    settings = {"in_backward": torch.optim.SGD, "lr": 0.01}
    module, wanted = Sequences(**settings), Sequences(**settings)
    wanted.load_state_dict(start_values(module))
    train_plain(wanted, Batches(20, whole=True))
    trainer(TorchRecStrategy(sharding=THREE)).fit(module, loader(20))
    assert_same(module, wanted.state_dict())

    class Nothing(Clicks):
        def configure_optimizers(self) -> None:
            return None

    class Itself(Clicks):
        def configure_optimizers(self) -> Any:
            return (
                self.bags.fused_optimizer if hasattr(self.bags, "fused_optimizer") else super().configure_optimizers()
            )

    for cls in (Nothing, Itself):
        module = cls(dense=False, **SGD)
        plain = Clicks(dense=False, **SGD)
        plain.load_state_dict(start_values(module))
        train_plain(plain, Batches(20, whole=True))
        trainer(TorchRecStrategy(sharding=THREE)).fit(module, loader(20))
        assert module.training_steps == 20
        assert_same(module, plain.state_dict())

    torch.manual_seed(3)
    module = Clicks(**SGD)
    trainer(TorchRecStrategy(), precision="bf16-mixed").fit(module, loader(60))
    assert sum(module.losses[-20:]) < 0.8 * sum(module.losses[:20])
    comm_hooks()


def comm_hooks() -> None:
    calls = []

    def hook(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        calls.append(bucket.buffer().numel())
        work = dist.all_reduce(bucket.buffer() / dist.get_world_size(), async_op=True)
        future = work.get_future()
        return future.then(lambda done: done.value()[0])

    class Early(pl.Callback):
        def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.strategy.register_comm_hook(None, hook)

    module, wanted = Clicks(**SGD), Clicks(**SGD)
    wanted.load_state_dict(start_values(module))
    train_plain(wanted, Batches(10, whole=True))
    trainer(TorchRecStrategy(), callbacks=[Early()]).fit(module, loader(10))
    assert len(calls) == 10
    assert_same(module, wanted.state_dict())
    calls.clear()
    trainer(TorchRecStrategy(ddp_comm_hook=hook)).fit(Clicks(**SGD), loader(10))
    assert len(calls) == 10
    with pytest.raises(ShardingError, match="takes one communication hook, and hook is set already"):
        trainer(TorchRecStrategy(ddp_comm_hook=hook), callbacks=[Early()]).fit(Clicks(**SGD), loader(1))


class Scheduled(Clicks):
    """One optimizer for tables and the rest, made of TorchRec's parts, with a schedule."""

    def configure_optimizers(self) -> Any:
        if not hasattr(self.bags, "fused_optimizer"):
            optimizer: Any = torch.optim.SGD(
                [{"params": self.over.parameters(), "lr": 0.1}, {"params": self.bags.parameters(), "lr": 0.3}]  # type: ignore[union-attr]
            )
        else:
            dense = KeyedOptimizerWrapper(dict(self.over.named_parameters()), lambda p: torch.optim.SGD(p, lr=0.1))  # type: ignore[union-attr]
            optimizer = CombinedOptimizer([("dense", dense), ("", self.bags.fused_optimizer)])
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def optimizer_kinds() -> None:
    """Closures run once, schedules reach fused tables in time, manual optimization works."""
    dist.init_process_group("gloo")
    module, wanted = Scheduled(**SGD), Scheduled()
    start = start_values(module)
    wanted.load_state_dict(start)
    [optimizer], [schedule] = wanted.configure_optimizers()
    for batch in Batches(20, whole=True):
        wanted.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule["scheduler"].step()
    trainer(TorchRecStrategy(sharding=THREE)).fit(module, loader(20))
    assert module.training_steps == 20
    assert_same(module, wanted.state_dict())

    class Manual(Clicks):
        def __init__(self) -> None:
            super().__init__(**SGD)
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [
                torch.optim.SGD([self.over.weight, *self.bags.parameters()], lr=0.1),  # type: ignore[union-attr,list-item]
                torch.optim.SGD([self.over.bias], lr=0.1),  # type: ignore[union-attr]
            ]

    module, plain = Manual(), Clicks(**SGD)
    plain.load_state_dict(start_values(module))
    train_plain(plain, Batches(20, whole=True))
    trainer(TorchRecStrategy(sharding=THREE)).fit(module, loader(20))
    assert_same(module, plain.state_dict())


def refusals() -> None:
    """Settings that would be ignored in silence are errors, with the mend."""
    dist.init_process_group("gloo")

    class Mine(EmbeddingBagCollection):
        pass

    def refused(message: str, module: pl.LightningModule, strategy: TorchRecStrategy, **settings: Any) -> None:
        with pytest.raises(ShardingError, match=message):
            trainer(strategy, **settings).fit(module, loader(2))

    fused = lambda: Clicks(**SGD)  # noqa: E731
    refused("gradient_clip_val=0.1.*fused tables 't0', 't1', 't2'", fused(), TorchRecStrategy(), gradient_clip_val=0.1)
    refused("accumulate_grad_batches=2", fused(), TorchRecStrategy(), accumulate_grad_batches=2)
    scheduler = pl.callbacks.GradientAccumulationScheduler({0: 1, 1: 2})
    refused("accumulate_grad_batches", fused(), TorchRecStrategy(), callbacks=[scheduler])
    refused("converts all parameters", fused(), TorchRecStrategy(), precision="bf16-true")
    refused("cannot be data_parallel", fused(), TorchRecStrategy(sharding={"t0": "data_parallel"}))
    refused("matches no table; there are t0, t1, t2", fused(), TorchRecStrategy(sharding={"user": "row_wise"}))
    refused("cannot be sharded grid_shard on cpu", fused(), TorchRecStrategy(sharding={"t0": "grid_shard"}))
    refused("The largest, 't0', needs", fused(), TorchRecStrategy(ddr=100))
    refused("hbm=1000000000 has no effect on cpu", fused(), TorchRecStrategy(hbm="1GB"))
    refused("a subclass of EmbeddingBagCollection", Clicks(bags=lambda: Mine(configs())), TorchRecStrategy())
    refused("no kernel on the CPU that hands gradients of single rows", Sequences(), TorchRecStrategy())
    plain = Clicks(bags=lambda: nn.Linear(1, 1))
    refused("to shard: use strategy='ddp'", plain, TorchRecStrategy())
    tied = Clicks()
    tied.over.weight = tied.bags.embedding_bags["t0"].weight  # type: ignore
    refused("the same tensor as table", tied, TorchRecStrategy())

    class Newton(Clicks):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.over.parameters())  # type: ignore[union-attr]

    uneven = Clicks(**SGD)
    with pytest.raises(ShardingError, match=r"the processes have \[2, 3\] training batches"):
        trainer(TorchRecStrategy()).fit(uneven, loader(2 + dist.get_rank()))
    refused("LBFGS runs the backward pass several times", Newton(**SGD), TorchRecStrategy())
    assert from_first(BATCH) == BATCH  # nobody waits for anybody

"""What the processes of test_resuming do."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_embcomp.checkpoints import CheckpointError, Slice, is_checkpoint
from lightning_embcomp.models import ClickModel
from lightning_embcomp.strategies import ShardingError, TorchRecStrategy
from tests.strategies.checks import assert_same, from_first, kinds, start_values, trainer
from tests.strategies.models import BATCH, FEATURES, Batch, Clicks, global_batch, part
from tests.strategies.models import ROWS as TABLE_ROWS
from tests.strategies.training import ADAGRAD, NO_COLUMNS, THREE

ROWS = 12
"""Rows of a global batch, for any number of processes."""


class Stateful:
    """A loader that can go on in the middle of an epoch; the global batches do not depend on the processes."""

    def __init__(self, steps: int, first: int = 0) -> None:
        self.steps, self.first, self.position = steps, first, 0

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        world = dist.get_world_size() if dist.is_initialized() else 1
        rank = dist.get_rank() if dist.is_initialized() else 0
        first, self.position = self.position, 0
        for step in range(first, self.steps):
            self.position = (step + 1) % self.steps
            yield part(global_batch(self.first + step, ROWS), rank, world)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


class Counting(pl.Callback):
    """State that is another on every process."""

    def __init__(self) -> None:
        self.rows = 0
        self.loaded: int | None = None

    def on_train_batch_end(self, *args: Any) -> None:
        self.rows += 1 + dist.get_rank()

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows = self.loaded = state["rows"]


class Noisy(Clicks):
    """Draws random numbers of all kinds in every step; Adam for the dense rest, or for all."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.drawn: list[float] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.drawn.append(float(torch.rand(())) + random.random() + float(np.random.rand()))
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.95**step)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


SETTINGS: dict[str, dict[str, Any]] = {"fused": ADAGRAD, "dense": {}}
PLACES: dict[str, dict[str, str]] = {
    "three": THREE,
    "rows": {"*": "row_wise"},
    "tables": {"*": "table_wise"},
    "mixed": NO_COLUMNS,
}


def plain_run(settings: dict[str, Any], start: Any, steps: int) -> Noisy:
    """One process with whole batches, by hand."""
    module = Noisy(**settings)
    module.load_state_dict(start)
    [optimizer], [schedule] = module.configure_optimizers()
    for step in range(steps):
        module.loss(global_batch(step, ROWS)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule["scheduler"].step()
    return module


def begin() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(5)
    random.seed(dist.get_rank())
    np.random.seed(dist.get_rank())


def save(folder: str, kind: str, places: str) -> None:
    """Seven steps of ten, in the middle of an epoch, with everything that has state."""
    begin()
    module = Noisy(**SETTINGS[kind])
    start = start_values(module)
    counting = Counting()
    strategy = TorchRecStrategy(sharding=PLACES[places])
    keep = pl.callbacks.ModelCheckpoint(dirpath=folder, filename="run", every_n_train_steps=7)
    run = trainer(strategy, max_steps=7, callbacks=[counting, keep], enable_checkpointing=True)
    run.fit(module, Stateful(10))
    # What an uninterrupted run goes on with.
    drawn = [float(torch.rand(())) + random.random() + float(np.random.rand()) for _ in range(3)]
    torch.save({"drawn": drawn, "rows": counting.rows}, f"{folder}/own{dist.get_rank()}.pt")
    assert is_checkpoint(f"{folder}/run.ckpt")
    assert_same(module, plain_run(SETTINGS[kind], start, 7).state_dict())
    if dist.get_rank() == 0:
        torch.save(start, f"{folder}/start.pt")


def load(folder: str, kind: str, places: str, same: str) -> None:
    """Go on to ten steps, as if nothing had happened."""
    begin()
    module = Noisy(**SETTINGS[kind])
    counting = Counting()
    strategy = TorchRecStrategy(sharding=PLACES[places])
    run = trainer(strategy, max_steps=10, callbacks=[counting])
    run.fit(module, Stateful(10), ckpt_path=f"{folder}/run.ckpt")
    assert (module.training_steps, run.global_step) == (3, 10), (module.training_steps, run.global_step)
    start = torch.load(f"{folder}/start.pt")
    assert_same(module, plain_run(SETTINGS[kind], start, 10).state_dict())
    assert kinds(strategy)["t1"] == next(v for k, v in PLACES[places].items() if k in ("*", "t1"))
    if same == "same":
        own = torch.load(f"{folder}/own{dist.get_rank()}.pt", weights_only=False)
        assert module.drawn == own["drawn"]
        assert counting.loaded == own["rows"]
    else:
        assert counting.loaded == 7
    # Weights alone, for evaluation.
    fresh = Noisy(**SETTINGS[kind])
    run = trainer(TorchRecStrategy(sharding=PLACES[places]))
    run.validate(fresh, Stateful(1), ckpt_path=f"{folder}/run.ckpt", verbose=False)
    assert_same(fresh, plain_run(SETTINGS[kind], start, 7).state_dict())


def plain_files(folder: str) -> None:
    """Files of unsharded runs load, and what does not fit is refused."""
    begin()
    for kind in ("dense", "fused"):
        settings = (
            SETTINGS[kind] if kind == "dense" else {"in_backward": torch.optim.SGD, "optimizer_kwargs": {"lr": 0.3}}
        )
        module = Noisy(**settings)
        start = start_values(module)
        path = f"{folder}/{kind}.ckpt"
        if dist.get_rank() == 0:
            plain = Noisy(**settings)
            plain.load_state_dict(start)
            alone = pl.Trainer(
                accelerator="cpu",
                devices=1,
                max_steps=7,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                strategy=pl.strategies.SingleDeviceStrategy("cpu"),
            )
            alone.fit(plain, torch.utils.data.DataLoader([global_batch(s, ROWS) for s in range(10)], batch_size=None))  # type: ignore
            alone.save_checkpoint(path)
            torch.save(plain.state_dict(), f"{folder}/{kind}.pt")
        dist.barrier()
        strategy = TorchRecStrategy(sharding=THREE)
        run = trainer(strategy, max_epochs=2)
        run.fit(module, Stateful(3, first=7), ckpt_path=path)
        assert run.global_step == 10
        assert_same(module, plain_run(settings, start, 10).state_dict())
        fresh = Noisy(**settings)
        trainer(TorchRecStrategy()).validate(fresh, Stateful(1), ckpt_path=f"{folder}/{kind}.pt", verbose=False)
        assert_same(fresh, plain_run(settings, start, 7).state_dict())

    # Another model, weights alone, another optimizer.
    run = trainer(TorchRecStrategy(), max_steps=2)
    module = Noisy(**ADAGRAD)
    run.fit(module, Stateful(4))
    run.save_checkpoint(f"{folder}/weights.ckpt", weights_only=True)
    run.save_checkpoint(f"{folder}/full.ckpt")
    with pytest.raises((ShardingError, KeyError), match="weights alone|only the model"):
        trainer(TorchRecStrategy()).fit(Noisy(**ADAGRAD), Stateful(4), ckpt_path=f"{folder}/weights.ckpt")
    with pytest.raises(ShardingError, match="had another fused optimizer"):
        trainer(TorchRecStrategy(), max_steps=9).fit(
            Noisy(in_backward=torch.optim.Adagrad, optimizer_kwargs={"lr": 0.1}),
            Stateful(4),
            ckpt_path=f"{folder}/full.ckpt",
        )

    class More(Noisy):
        def __init__(self) -> None:
            super().__init__(**ADAGRAD)
            self.extra = torch.nn.Linear(1, 1)

    with pytest.raises(ShardingError, match="it lacks .'extra.bias', 'extra.weight'."):
        trainer(TorchRecStrategy()).validate(More(), Stateful(1), ckpt_path=f"{folder}/full.ckpt")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        trainer(TorchRecStrategy()).validate(Noisy(**ADAGRAD), Stateful(1), ckpt_path=f"{folder}/none.ckpt")
    reference_model(folder)
    saved_by_modules(folder)
    kept_by_callbacks(folder)


def reference_model(folder: str) -> None:
    """The state of the fused optimizer, which ClickModel saves by itself, goes into shards as well."""

    def model() -> ClickModel:
        features: Any = [
            {"name": name, "num_embeddings": rows} for name, rows in zip(FEATURES, TABLE_ROWS.values(), strict=True)
        ]
        return ClickModel(features=features, num_dense=3, embedding_dim=8, dense_layers=(8,), over_layers=(8,))

    whole: Any = [global_batch(step, ROWS) for step in range(7)]
    path = f"{folder}/reference.ckpt"
    if dist.get_rank() == 0:
        plain = model()
        alone = trainer(pl.strategies.SingleDeviceStrategy("cpu"), devices=1)
        alone.fit(plain, torch.utils.data.DataLoader(whole, batch_size=None))
        alone.save_checkpoint(path)
        rest: Any = [global_batch(step, ROWS) for step in range(7, 10)]
        again = model()
        on = trainer(pl.strategies.SingleDeviceStrategy("cpu"), devices=1, max_epochs=2)
        on.fit(again, torch.utils.data.DataLoader(rest, batch_size=None), ckpt_path=path)
        torch.save(again.state_dict(), f"{folder}/reference.pt")
    dist.barrier()
    module = model()
    strategy = TorchRecStrategy(sharding={"t_f0": "row_wise", "t_f[12]": "table_wise"})
    trainer(strategy, max_epochs=2).fit(module, Stateful(3, first=7), ckpt_path=path)
    assert_same(module, torch.load(f"{folder}/reference.pt"))


def saved_by_modules(folder: str) -> None:
    """Modules with a form of their own save and load themselves."""

    class Own(Clicks):
        pass

    module = Own(**ADAGRAD)
    run = trainer(TorchRecStrategy(sharding=THREE), max_steps=1)
    run.fit(module, Stateful(2))

    def attach(bags: Any) -> Any:
        rank = dist.get_rank()
        bags.codes = torch.full((2,), rank, dtype=torch.uint8)
        bags.distributed_state = lambda: {"codes": Slice((4,), (2 * rank,), bags.codes)}

        def load(prefix: str, reader: Any) -> None:
            found = torch.empty(4, dtype=torch.uint8)
            reader.read_into({f"{prefix}codes": found})
            bags.found = (prefix, found.tolist())

        bags.load_distributed_state = load

    attach(module.bags)
    run.save_checkpoint(f"{folder}/own.ckpt")
    fresh = Own(**ADAGRAD)

    class Attach(pl.Callback):
        def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
            trainer.strategy.shard(pl_module)  # type: ignore[attr-defined]
            attach(pl_module.bags)

    trainer(TorchRecStrategy(sharding=THREE), max_steps=2, callbacks=[Attach()]).fit(
        fresh, Stateful(2), ckpt_path=f"{folder}/own.ckpt"
    )
    assert fresh.bags.found == ("compressed/bags/", [0, 0, 1, 1])


def kept_by_callbacks(folder: str) -> None:
    """ModelCheckpoint keeps the best, removes the rest, and finds the last."""

    def keep() -> pl.callbacks.ModelCheckpoint:
        return pl.callbacks.ModelCheckpoint(dirpath=f"{folder}/kept", monitor="val_loss", save_top_k=1, save_last=True)

    run = trainer(TorchRecStrategy(), max_epochs=3, callbacks=[keep()], enable_checkpointing=True)
    module = Clicks(**ADAGRAD)
    run.fit(module, Stateful(4), Stateful(1))
    dist.barrier()
    names = sorted(path.name for path in Path(f"{folder}/kept").iterdir() if not path.name.startswith("."))
    assert len(names) == 2 and "last.ckpt" in names
    fresh = Clicks(**ADAGRAD)
    run = trainer(TorchRecStrategy(), max_epochs=4, callbacks=[keep()], enable_checkpointing=True)
    run.fit(fresh, Stateful(4), Stateful(1), ckpt_path="last")
    assert fresh.training_steps == 4 and run.global_step == 16
    assert from_first(BATCH) == BATCH


def columns_to_rows(folder: str) -> None:
    """The accumulators of column shards become those of whole rows, by their mean."""
    begin()
    module = Clicks(**ADAGRAD)
    run = trainer(TorchRecStrategy(sharding={"*": "column_wise"}), max_steps=5)
    run.fit(module, Stateful(6))
    run.save_checkpoint(f"{folder}/columns.ckpt")
    state = module.bags.fused_optimizer.state_dict()["state"]["embedding_bags.t0.weight"]["t0.momentum1"]  # type: ignore
    halves: list[Any] = [None, None]
    dist.all_gather_object(halves, [s.tensor.clone() for s in state.local_shards()])
    mean = torch.stack([half[0] for half in halves]).mean(0)
    fresh = Clicks(**ADAGRAD)
    rows = trainer(TorchRecStrategy(sharding={"*": "row_wise"}), max_steps=5)
    rows.fit(fresh, Stateful(6), ckpt_path=f"{folder}/columns.ckpt")
    state = fresh.bags.fused_optimizer.state_dict()["state"]["embedding_bags.t0.weight"]["t0.momentum1"]  # type: ignore
    for shard in state.local_shards():
        first = shard.metadata.shard_offsets[0]
        torch.testing.assert_close(shard.tensor.flatten(), mean[first : first + len(shard.tensor)].flatten())

"""What the processes of test_sharded do."""

import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, IterableDataset
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from lightning_embcomp import (
    EmbeddingTrafficMonitor,
    GradientThresholding,
    MixedPrecisionSearch,
    PooledThresholding,
    PrecisionSearch,
    ReshardOnImbalance,
)
from lightning_embcomp.data import ClickLogDataModule, Split
from lightning_embcomp.engine.host import EngineHost
from lightning_embcomp.engine.layout import LogicalTable, Shard
from lightning_embcomp.models import ClickModel
from lightning_embcomp.strategies import TorchRecStrategy, checkpointing
from lightning_embcomp.strategies.weights import local_pieces
from lightning_embcomp.surgery import part_of
from tests.conformance.cases import CASES, data, trainer
from tests.conformance.matrix import on_one_rank

STEPS, ROWS = 25, 128
EXCHANGES: dict[str, tuple[pl.Callback, dict[str, Any]]] = {
    "GradientThresholding": (GradientThresholding(1.0, warmup_steps=2), {}),
    "EmbeddingTrafficMonitor": (
        EmbeddingTrafficMonitor(),
        {"codecs": PooledThresholding(forward="fp32", backward="fp32")},
    ),
    "ReshardOnImbalance": (
        ReshardOnImbalance(every_n_steps=5),
        {"planner": on_one_rank, "fused_params": {"optimizer": "sgd", "learning_rate": 1.0}},
    ),
}
"""Callbacks of what processes exchange, and what the strategy needs for them; alone there is nothing to compare."""
Batch = tuple[torch.Tensor, KeyedJaggedTensor, torch.Tensor]


class Shares(IterableDataset[Batch]):
    """Each process gets its share of the same batches."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        alone = not dist.is_initialized()
        rank, world = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())
        for dense, sparse, label in self.batches:
            size = label.numel() // world
            mine = slice(rank * size, (rank + 1) * size)
            values, lengths = [], []
            for key in sparse.keys():
                offsets = sparse[key].offsets()
                values.append(sparse[key].values()[offsets[mine.start] : offsets[mine.stop]])
                lengths.append(sparse[key].lengths()[mine])
            ids = KeyedJaggedTensor(sparse.keys(), torch.cat(values), lengths=torch.cat(lengths))
            yield dense[mine], ids, label[mine]


def criteo(path: str, cache: str) -> ClickLogDataModule:
    split = Split(kind="chronological", validation=0.1, test=0.25)
    found = ClickLogDataModule(path=path, format="criteo", batch_size=ROWS, split=split, cache_dir=cache)
    if os.environ["WORLD_SIZE"] == "1":
        found.prepare_data()
    return found


class ShareDataModule(pl.LightningDataModule):
    """The first batches of a click log."""

    def __init__(self, folder: str, cache: str, steps: int = STEPS) -> None:
        super().__init__()
        source: Any = data() if folder == "synthetic" else criteo(folder, cache)
        source.setup("fit")
        steps = steps if folder == "synthetic" else 12
        self.features, self.num_dense = source.features, source.num_dense
        self.id_counts = source.id_counts
        batches = []
        for batch in source.train_dataloader():
            batches.append(batch)
            if len(batches) == steps:
                break
        self.batches = batches

    def train_dataloader(self) -> Any:
        return DataLoader(Shares(self.batches), batch_size=None)


def module(name: str, optimizer: str, source: ShareDataModule) -> ClickModel:
    """The same start everywhere."""
    torch.manual_seed(7)
    settings: dict[str, Any] = {"features": source.features, "num_dense": source.num_dense}
    settings |= {"embedding_dim": 16, "dense_layers": (8,), "over_layers": (16,), "dense_optimizer": "sgd"}
    if name in CASES:
        optimizer = CASES[name].optimizers.get(optimizer, optimizer)
    rates = {"embedding_lr": 1.0 if optimizer == "sgd" else 0.05, "dense_lr": 0.05}
    if name == "ReshardOnImbalance":
        optimizer = "none"  # the strategy gives the tables theirs; in one process they are trained from outside
    built = ClickModel(embedding_optimizer=optimizer, **settings, **rates)
    built.configure_model()
    return built


class Killer(pl.Callback):
    """Kills process 1: in the second epoch, or while its checkpoint is written."""

    def __init__(self, saving: bool) -> None:
        self.saving = saving

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.current_epoch != 1 or os.environ["RANK"] != "1":
            return
        if not self.saving:
            os.kill(os.getpid(), signal.SIGKILL)
        # Right before its tensors are written, when the others are already in the save.
        checkpointing.save_checkpoint = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)


def callbacks_of(name: str) -> list[pl.Callback]:
    if name == "plain":
        return []
    if name in EXCHANGES:
        return [EXCHANGES[name][0]] if os.environ["WORLD_SIZE"] != "1" else []
    if name == "mpe":
        # Tables that start anew after the search draw other numbers on each process.
        search = PrecisionSearch(steps=2, groups=16, frequency="rank", reset=False)
        return [MixedPrecisionSearch(ratio=60, search=search)]
    return [CASES[name].active()]


def fit(
    name: str, optimizer: str, source: ShareDataModule, strategy: Any, ckpt_path: Path | None = None, **settings: Any
) -> tuple[ClickModel, pl.Trainer]:
    found = module(name, optimizer, source)
    more = settings.pop("callbacks", [])
    runner = trainer(*callbacks_of(name), *more, strategy=strategy, use_distributed_sampler=False, **settings)
    runner.fit(found, datamodule=source, ckpt_path=ckpt_path)
    return found, runner


def fit_sharded(
    name: str, optimizer: str, kind: str, source: ShareDataModule, **settings: Any
) -> tuple[ClickModel, pl.Trainer]:
    sharding: Any = {"*": kind}
    if kind == "mixed":
        first, second = (feature.name for feature in source.features[:2])
        sharding = {f"*{first}": "row_wise", f"*{second}": "column_wise", "*": "table_wise"}
    more: dict[str, Any] = EXCHANGES[name][1] if name in EXCHANGES else {}
    strategy = TorchRecStrategy(sharding=sharding, timeout=timedelta(seconds=100), **more)
    return fit(name, optimizer, source, strategy, devices=int(os.environ["WORLD_SIZE"]), **settings)


def host_of(model: torch.nn.Module) -> Any:
    return next(part for part in model.modules() if isinstance(part, EngineHost))


def dense_of(found: ClickModel) -> dict[str, torch.Tensor]:
    assert found.model is not None
    return {k: v.detach() for k, v in found.model.named_parameters() if "embedding_bag" not in k}


def tables_of(found: ClickModel) -> Iterator[tuple[int, LogicalTable, torch.Tensor]]:
    """Index, part and rows of what this process holds of each table."""
    host = next((part for part in found.modules() if isinstance(part, EngineHost)), None)
    if host is not None:
        for t in range(len(host.logical_tables)):
            for shard in host.shards(t):
                yield t, shard.logical, shard.engine.read_rows(shard.index, 0, shard.logical.rows)
        return
    state = {key: value for key, value in found.state_dict().items() if "embedding_bags" in key}
    for t, value in enumerate(state.values()):
        for (row, column), rows in local_pieces(value):
            whole = Shard(rows=value.shape[0], dim=value.shape[1], first_row=row, first_column=column)
            yield t, LogicalTable(name="t", rows=rows.shape[0], dim=rows.shape[1], shard=whole), rows


def differences(found: ClickModel, wanted: dict[str, Any]) -> dict[str, float]:
    """Largest differences of what this process holds from an unsharded run."""
    worst = {"dense": 0.0, "rows": 0.0, "stored": 0.0}
    for key, value in dense_of(found).items():
        worst["dense"] = max(worst["dense"], float((value - wanted["dense"][key]).abs().max()))
    for t, part, rows in tables_of(found):
        if rows.numel():
            whole = part_of(wanted["tables"][t], part)
            worst["rows"] = max(worst["rows"], float((rows - whole).abs().max()))
            worst["stored"] += float(((rows == 0) != (whole == 0)).sum())
    return worst


def bits_of(found: ClickModel) -> list[torch.Tensor]:
    """Everything that this process holds of the tables."""
    tensors = []
    for engine in host_of(found).engines:
        tensors += [storage.tensor for rows in engine.classes for storage in rows.storages().values()]
        tensors.append(engine.router.tensors.words)
        if engine.utility is not None:
            tensors += [engine.utility.values, engine.utility.gain]
        for state in engine.attached.values():
            tensors += state.held(len(engine.tables))
    return [tensor.clone() for tensor in tensors] + [value.clone() for value in dense_of(found).values()]


def reference(name: str, optimizer: str, source: ShareDataModule, path: Path) -> None:
    """One process on the whole batches, for one epoch and for two."""
    for epochs in (1, 2):
        found, _ = fit(name, optimizer, source, "auto", devices=1, max_epochs=epochs)
        tables = [rows for _, _, rows in tables_of(found)]
        torch.save({"tables": tables, "dense": dense_of(found)}, path.with_suffix(f".{epochs}.pt"))


def run(what: str, spec: str, source: ShareDataModule, folder: Path) -> Any:
    """Run one spec ``callback:optimizer[:sharding]``."""
    name, optimizer, *rest = spec.split(":")
    kind = rest[0] if rest else ""
    path = folder / f"{name}-{optimizer}"
    checkpoint = folder / f"{name}-{optimizer}-{kind}.ckpt"
    rank = os.environ["RANK"]
    if what == "reference":
        return reference(name, optimizer, source, path)
    if what == "compare":
        found, _ = fit_sharded(name, optimizer, kind, source)
        return differences(found, torch.load(path.with_suffix(".1.pt")))
    if what == "save":
        _, runner = fit_sharded(name, optimizer, kind, source)
        runner.save_checkpoint(checkpoint)
        through, _ = fit_sharded(name, optimizer, kind, source, max_epochs=2)
        torch.save(bits_of(through), checkpoint.with_suffix(f".{rank}.pt"))
        return differences(through, torch.load(path.with_suffix(".2.pt")))
    if what.startswith("killed"):
        last = ModelCheckpoint(dirpath=folder, save_last=True, save_top_k=-1)
        killer = Killer(saving=what == "killed-saving")
        fit_sharded(name, optimizer, kind, source, max_epochs=2, callbacks=[killer, last], enable_checkpointing=True)
        raise AssertionError("the run went on without its second process")
    assert what == "resume"
    saved = folder / ("last.ckpt" if rest[1] == "last" else f"{name}-{optimizer}-{rest[1]}.ckpt")
    found, _ = fit_sharded(name, optimizer, kind, source, max_epochs=2, ckpt_path=saved)
    if rest[1] == kind and len(rest) == 3:
        wanted = torch.load(saved.with_suffix(f".{rank}.pt"))
        assert len(wanted) == len(bits_of(found))
        assert all(torch.equal(a, b) for a, b in zip(bits_of(found), wanted, strict=True))
    return differences(found, torch.load(path.with_suffix(".2.pt")))


if __name__ == "__main__":
    action, log, file, *specs = sys.argv[1:]
    clicks = ShareDataModule(log, file)
    said = {spec: run(action, spec, clicks, Path(file)) for spec in specs}
    print("RESULT", json.dumps(said), flush=True)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    os._exit(0)

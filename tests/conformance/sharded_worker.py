"""What the processes of test_sharded do."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from lightning_embcomp.data import ClickLogDataModule
from lightning_embcomp.engine.host import EngineHost
from lightning_embcomp.engine.hosts import RoutedHost
from lightning_embcomp.models import ClickModel
from lightning_embcomp.strategies import TorchRecStrategy
from lightning_embcomp.surgery import part_of
from tests.conformance.cases import CASES, data, trainer

STEPS, ROWS = 50, 128
COLUMN_WISE = "column_wise"
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


class ShareDataModule(pl.LightningDataModule):
    """The first batches of a click log."""

    def __init__(self, folder: str, steps: int = STEPS) -> None:
        super().__init__()
        source: Any = data() if folder == "synthetic" else ClickLogDataModule(folder, batch_size=ROWS)
        source.setup("fit")
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
    if name != "plain":
        optimizer = CASES[name].optimizers.get(optimizer, optimizer)
    rates = {"embedding_lr": 1.0 if optimizer == "sgd" else 0.05, "dense_lr": 0.05}
    built = ClickModel(embedding_optimizer=optimizer, **settings, **rates)
    built.configure_model()
    return built


def fit(name: str, optimizer: str, source: ShareDataModule, strategy: Any, **settings: Any) -> tuple[ClickModel, Any]:
    found = module(name, optimizer, source)
    callbacks = [] if name == "plain" else [CASES[name].active()]
    runner = trainer(*callbacks, strategy=strategy, use_distributed_sampler=False, **settings)
    runner.fit(found, datamodule=source)
    return found, runner


def host_of(model: torch.nn.Module) -> Any:
    return next(part for part in model.modules() if isinstance(part, EngineHost))


def compare(name: str, optimizer: str, kind: str, source: ShareDataModule, reference: Path) -> dict[str, Any]:
    """Largest difference of the rows of this process, and of the dense parameters, from an unsharded run."""
    sharding: Any = (
        {"*": kind} if kind != "mixed" else {"t_0": "row_wise", "t_1": COLUMN_WISE, "*": "table_wise"}
    )
    if kind == "mixed":
        names = [feature.name for feature in source.features]
        sharding = {f"*{names[0]}": "row_wise", f"*{names[1]}": COLUMN_WISE, "*": "table_wise"}
    strategy = TorchRecStrategy(sharding=sharding, timeout=timedelta(seconds=100))
    found, _ = fit(name, optimizer, source, strategy, devices=dist_world())
    wanted = torch.load(reference, weights_only=False)
    worst = 0.0
    for key, value in found.model.named_parameters():
        if "embedding_bag" not in key:
            worst = max(worst, float((value - wanted["dense"][key]).abs().max()))
    result: dict[str, Any] = {"dense": worst, "rows": 0.0, "codes": 0}
    host = host_of(found)
    for t in range(len(host.logical_tables)):
        for shard in host.shards(t):
            rows = shard.engine.read_rows(shard.index, 0, shard.logical.rows)
            whole = part_of(wanted["tables"][t], shard.logical)
            result["rows"] = max(result["rows"], float((rows - whole).abs().max()) if rows.numel() else 0.0)
            result["codes"] += int(((rows == 0) != (whole == 0)).sum())
    return result


def dist_world() -> int:
    return int(os.environ["WORLD_SIZE"])


def reference(name: str, optimizer: str, source: ShareDataModule, path: Path) -> None:
    found, _ = fit(name, optimizer, source, "auto", devices=1)
    host: RoutedHost = host_of(found)
    torch.save(
        {
            "tables": [host.engine.read_rows(t, 0, table.rows) for t, table in enumerate(host.logical_tables)],
            "dense": {k: v.detach() for k, v in found.model.named_parameters() if "embedding_bag" not in k},
        },
        path,
    )


if __name__ == "__main__":
    what, folder, file, *runs = sys.argv[1:]
    clicks = ShareDataModule(folder)
    said = {}
    for run in runs:
        name, optimizer, *kind = run.split(":")
        path = Path(file) / f"{name}-{optimizer}.pt"
        if what == "reference":
            reference(name, optimizer, clicks, path)
        else:
            said[run] = compare(name, optimizer, kind[0], clicks, path)
    print("RESULT", json.dumps(said), flush=True)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    os._exit(0)

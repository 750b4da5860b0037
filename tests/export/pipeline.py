"""A small click pipeline, compressed tables with a known rounding, and the ways from a model to an export."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from lightning_embcomp import DimensionPruning, PruningSchedule
from lightning_embcomp.engine.hosts import RoutedHost
from lightning_embcomp.engine.plan import FixedPlan
from lightning_embcomp.engine.precision import TablePrecision
from lightning_embcomp.export.expansion import expand
from lightning_embcomp.kernels.types import BagLayout
from lightning_embcomp.models import ClickModel
from lightning_embcomp.surgery import build_host, fill, replace
from lightning_embcomp.tables import find_hosts

ROWS = {"user": 1500, "item": 600, "tags": 70}
DIM = 16


class Clicks(pl.LightningDataModule):
    """``user`` and ``item`` are single-valued, ``tags`` is multi-valued; ids are numbered by frequency."""

    features = [{"name": name, "num_embeddings": rows} for name, rows in ROWS.items()]
    num_dense = 2

    def __init__(self, batches: int = 12, size: int = 64) -> None:
        super().__init__()
        self.batches = [self.batch(seed, size) for seed in range(batches)]

    def batch(self, seed: int, size: int) -> tuple[Tensor, KeyedJaggedTensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.ones(3, size, dtype=torch.int64)
        lengths[2] = torch.randint(0, 5, (size,), generator=generator)
        ids = [
            (rows * torch.rand(int(n), generator=generator) ** 3).long()
            for rows, n in zip(ROWS.values(), lengths.sum(1), strict=True)
        ]
        label = torch.rand(size, generator=generator) < torch.where(ids[0] % 3 == 0, 0.7, 0.2)
        sparse = KeyedJaggedTensor(list(ROWS), torch.cat(ids), lengths=lengths.flatten())
        return torch.randn(size, 2, generator=generator), sparse, label.float()

    def train_dataloader(self) -> Any:
        return DataLoader(self.batches, batch_size=None)

    def val_dataloader(self) -> Any:
        return DataLoader(self.batches[:6], batch_size=None)


def click_model(**settings: Any) -> ClickModel:
    torch.manual_seed(0)
    given = {"embedding_dim": DIM, "features": Clicks.features, "num_dense": 2, "over_layers": (16,), **settings}
    return ClickModel(**given)


def built_model(**settings: Any) -> ClickModel:
    """With tables that are not nearly zero, so that rounding shows."""
    model = click_model(**settings)
    model.configure_model()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for view in find_hosts(model):
            for table in view.tables:
                assert table.weight is not None
                table.weight.copy_(0.3 * torch.randn(table.rows, table.dim, generator=generator))
    return model.eval()


def trainer(*callbacks: pl.Callback, folder: Path | None = None, **settings: Any) -> pl.Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
        "num_sanity_val_steps": 0,
        "default_root_dir": folder,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**quiet, **settings})


class Rounded:
    """A rounding of the rows of an engine that is given, and saved like that of a method."""

    def __init__(self, precisions: Sequence[TablePrecision]) -> None:
        self.precisions = precisions

    def tensors(self, table: int) -> dict[str, Tensor]:
        precision = self.precisions[table]
        steps = torch.tensor([precision.steps.get(bits, 0.0) for bits in range(9)])
        found = {"bounds": precision.bounds, "bits": precision.bits, "steps": steps, "offset": precision.offset}
        return found if precision.group is None else {**found, "group": precision.group}

    def table_bytes(self, table: int) -> int:
        return sum(tensor.nbytes for tensor in self.tensors(table).values())

    def restored(self) -> None:
        pass

    def precision(self, table: int) -> TablePrecision:
        return self.precisions[table]

    def apply(self, rows: Tensor, indices: Tensor, layout: BagLayout, **_: Any) -> Tensor:
        """Rows one by one, by the definition."""
        out, at = torch.zeros_like(rows), 0
        for t, count in enumerate(layout.bag_start.diff().tolist()):
            for i in range(at, at + count):
                one = self.precisions[t].round(rows[i : i + 1], start=int(indices[i]))
                out[i] = one[0]
            at += count
        return out


def precision_of(
    rows: int, dim: int, *, shuffled: bool = False, widths: Sequence[int] = (8, 4, 2, 0)
) -> TablePrecision:
    generator = torch.Generator().manual_seed(rows)
    groups = len(widths)
    return TablePrecision(
        bounds=torch.linspace(0, rows, groups + 1).long(),
        bits=torch.tensor(widths, dtype=torch.uint8),
        steps={b: float(torch.tensor(0.8 / 2 ** (b - 1)).half()) for b in widths if 0 < b <= 8},
        offset=0.05 * torch.randn(dim, generator=generator),
        group=torch.randint(0, groups, (rows,), dtype=torch.uint8, generator=generator) if shuffled else None,
    )


def compressed(root: nn.Module, *, round_with: Any = None, chunks: int = 1, code: int | None = None) -> nn.Module:
    """Put engines under all tables of a module, with the same values.

    ``round_with(rows, dim)`` gives the precision of a table; rows keep ``code`` of ``chunks`` column chunks.
    """
    for view in find_hosts(root):
        cuts = {table.name: (chunks, "prefix") for table in view.tables}
        routed = build_host(view, cuts, torch.device("cpu"))  # type: ignore[arg-type]
        engine = routed.engine
        engine.move(FixedPlan([chunks if code is None else code for _ in engine.tables]))
        engine.clear_row_state()
        for t in range(len(engine.tables)):
            fill(routed, t, view)
        if round_with is not None:
            engine.round_values(Rounded([round_with(table.rows, table.dim) for table in engine.tables]))
        if not view.path:
            return routed.eval()
        replace(root, view.path, routed)
    return root.eval()


def engines(root: nn.Module) -> list[Any]:
    return [module.engine for module in root.modules() if isinstance(module, RoutedHost)]


def bag_collection(mean: bool = False, weighted: bool = False) -> EmbeddingBagCollection:
    torch.manual_seed(2)
    pooling = PoolingType.MEAN if mean else PoolingType.SUM
    configs = [
        EmbeddingBagConfig(name="t_a", num_embeddings=300, embedding_dim=16, feature_names=["a", "b"], pooling=pooling),
        EmbeddingBagConfig(name="t_c", num_embeddings=50, embedding_dim=8, feature_names=["c"], pooling=pooling),
    ]
    return EmbeddingBagCollection(configs, is_weighted=weighted)


def collection() -> EmbeddingCollection:
    torch.manual_seed(2)
    configs = [
        EmbeddingConfig(name="t_a", num_embeddings=300, embedding_dim=16, feature_names=["a", "b"]),
        EmbeddingConfig(name="t_c", num_embeddings=50, embedding_dim=16, feature_names=["c"]),
    ]
    return EmbeddingCollection(configs, need_indices=True)


def features(seed: int = 0, weighted: bool = False) -> KeyedJaggedTensor:
    """Keys in another order than that of the tables, and one too many."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 5, (4, 7), generator=generator)
    limits = {"c": 50, "b": 300, "extra": 9, "a": 300}
    ids = [
        torch.randint(0, limit, (int(n),), generator=generator)
        for limit, n in zip(limits.values(), lengths.sum(1), strict=True)
    ]
    values = torch.cat(ids)
    weights = torch.rand(values.numel(), generator=generator) + 0.5 if weighted else None
    return KeyedJaggedTensor(list(limits), values, lengths=lengths.flatten(), weights=weights)


PRUNING = partial(DimensionPruning, target=0.6, schedule=PruningSchedule(every_n_steps=4, early_steps=(2,)))


def fitted(folder: Path, *callbacks: pl.Callback, **settings: Any) -> tuple[pl.LightningModule, Path]:
    model = click_model(**settings)
    runner = trainer(*callbacks, folder=folder)
    runner.fit(model, datamodule=Clicks())
    runner.save_checkpoint(folder / "last.ckpt")
    return model, folder / "last.ckpt"


def same_exports(one: Any, other: Any) -> None:
    first, second = expand(one), expand(other)
    assert [s.format for s in one.manifest.classes] == [s.format for s in other.manifest.classes]
    assert all(torch.equal(a, b) for a, b in zip(first.rows, second.rows, strict=True))
    assert one.dense.keys() == other.dense.keys()
    assert all(torch.equal(one.dense[key], other.dense[key]) for key in one.dense)

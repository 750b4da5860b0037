"""The callbacks that every conformance test runs with, and a small pipeline to run them in.

A new callback joins by one entry in :data:`CASES`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_embcomp import (
    CompressionCallback,
    CounterSettings,
    DimensionPruning,
    FrequencyAwareLR,
    Granularity,
    MixedPrecisionSearch,
    PrecisionSearch,
    PruningSchedule,
)
from lightning_embcomp.callbacks.budget import CompressionBudget
from lightning_embcomp.data import SyntheticClickLog, SyntheticClickLogDataModule
from lightning_embcomp.engine.hosts import RoutedHost
from lightning_embcomp.engine.memory import engine_bytes
from lightning_embcomp.methods.budget.config import BudgetControl
from lightning_embcomp.models import ClickModel

OFTEN = PruningSchedule(every_n_steps=10, early_steps=(2, 5))
ROWS = (40, 300, 3000)
DIM = 16


@dataclass(frozen=True)
class CallbackCase:
    """A callback under test.

    Args:
        active: Makes the callback with an effect; ``tables`` restricts it.
        neutral: Makes it with settings under which training must be that of the plain model.
        fragment: Its configuration fragment.
        ratio: Bytes that it holds at most, over those of the plain tables with row-wise optimizer state.
        settings: Model settings that it needs.
        optimizers: Embedding optimizers that it refuses, and what its tests use in their place.
    """

    active: Callable[..., CompressionCallback | CompressionBudget]
    neutral: Callable[[], CompressionCallback | CompressionBudget]
    fragment: str
    ratio: float
    settings: Mapping[str, Any] = field(default_factory=dict)
    optimizers: Mapping[str, str] = field(default_factory=dict)

    def model(self, built: bool = False, **settings: Any) -> ClickModel:
        """The small click model, with what the callback needs."""
        optimizer = settings.pop("embedding_optimizer", "rowwise_adagrad")
        optimizer = self.optimizers.get(optimizer, optimizer)
        return model(built, embedding_optimizer=optimizer, **self.settings, **settings)


SOON = BudgetControl(every_n_steps=5, step=2.0)


def _budget(**kwargs: Any) -> CompressionBudget:
    """A budget that is met within an epoch."""
    search = PrecisionSearch(steps=2, groups=16, frequency="rank", reset=False)
    return CompressionBudget(ratio=15, start=0.35, schedule=OFTEN, search=search, control=SOON, **kwargs)


CASES = {
    "fiited": CallbackCase(
        active=lambda **kwargs: DimensionPruning(target=0.7, schedule=OFTEN, **kwargs),
        neutral=lambda: DimensionPruning(target=0.0, schedule=OFTEN),
        fragment="callbacks/fiited.yaml",
        ratio=0.4,
    ),
    "fiited-chunks": CallbackCase(
        active=lambda **kwargs: DimensionPruning(
            target=0.7, schedule=OFTEN, granularity=Granularity(layout="chunks"), **kwargs
        ),
        neutral=lambda: DimensionPruning(target=0.0, schedule=OFTEN, granularity=Granularity(layout="chunks")),
        fragment="callbacks/fiited.yaml",
        ratio=0.5,
    ),
    "mpe": CallbackCase(
        active=lambda **kwargs: MixedPrecisionSearch(
            ratio=60, search=PrecisionSearch(steps=2, groups=16, frequency="rank"), **kwargs
        ),
        neutral=lambda: MixedPrecisionSearch(bits=32),
        fragment="callbacks/mpe.yaml",
        ratio=0.6,  # master weights stay in float32 while they train; rows of width 0 go
    ),
    "frequency_lr": CallbackCase(
        active=lambda **kwargs: FrequencyAwareLR(counter=CounterSettings(half_life=20.0), **kwargs),
        # Multipliers of at least 1, and no rate above that of the tables.
        neutral=lambda: FrequencyAwareLR(
            form="horizon",
            horizon=1,
            max_rate=1.0,
            counter=CounterSettings(encoding="exact", counted="presence"),
        ),
        fragment="callbacks/frequency_lr.yaml",
        ratio=0.97,  # a byte per row and a quarter for the router in place of four
        settings={"dense_optimizer": "sgd", "embedding_lr": 1.0, "dense_lr": 0.05},
        optimizers={"rowwise_adagrad": "sgd"},
    ),
    # Without the guard first: it stands for the method where a test has no validation data.
    "budget-unguarded": CallbackCase(
        active=lambda **kwargs: _budget(max_ne_loss=None, **kwargs),
        neutral=lambda: CompressionBudget(memory="1GB", of="training", schedule=OFTEN, control=SOON),
        fragment="callbacks/budget.yaml",
        ratio=0.45,
    ),
    "budget": CallbackCase(
        active=lambda **kwargs: _budget(max_ne_loss=0.05, **kwargs),
        neutral=lambda: CompressionBudget(memory="1GB", of="training", schedule=OFTEN, control=SOON),
        fragment="callbacks/budget.yaml",
        ratio=0.45,
    ),
}


def data(num_rows: int = 4000) -> SyntheticClickLogDataModule:
    return SyntheticClickLogDataModule(
        SyntheticClickLog(num_rows=num_rows, num_embeddings=ROWS, num_dense=2), batch_size=128
    )


def model(built: bool = False, **settings: Any) -> ClickModel:
    """A small click model; ``built`` has its tables before the trainer sees it."""
    torch.manual_seed(3)
    small: dict[str, Any] = {"embedding_dim": DIM, "dense_layers": (8,), "over_layers": (16,)}
    if settings.get("architecture") == "dcn":
        small |= {"cross_layers": 1, "cross_rank": 4}
    if built:
        settings |= {"features": data().features, "num_dense": 2}
    click_model = ClickModel(**{**small, **settings})
    if built:
        click_model.configure_model()
    return click_model


def trainer(*callbacks: pl.Callback, folder: Path | None = None, **settings: Any) -> pl.Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
        "num_sanity_val_steps": 0,
        "default_root_dir": folder,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**quiet, **settings})


def fit(module: pl.LightningModule, *callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    torch.manual_seed(4)
    runner = trainer(*callbacks, **settings)
    runner.fit(module, datamodule=data())
    return runner


def hosts(module: torch.nn.Module) -> list[RoutedHost]:
    return [part for part in module.modules() if isinstance(part, RoutedHost)]


def held_bytes(module: torch.nn.Module) -> int:
    return sum(engine_bytes(host.engine) for host in hosts(module))


def state_of(module: torch.nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def assert_equal_states(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [key for key in one if not torch.equal(one[key], other[key])]
    assert not different, different


def logits(module: ClickModel) -> Tensor:
    """Logits of the first validation batch."""
    source = data()
    source.setup("validate")
    loader: Any = source.val_dataloader()
    dense, sparse, _ = next(iter(loader))
    module.eval()
    with torch.no_grad():
        found: Tensor = module(dense, sparse)
    module.train()
    return found

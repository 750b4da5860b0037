"""Small fits with callbacks, on the CPU, on a GPU, or on one that is not there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor

from lightning_embcomp import (
    BudgetControl,
    CompressionBudget,
    CounterSettings,
    DimensionPruning,
    FrequencyAwareLR,
    MixedPrecisionSearch,
    PrecisionSearch,
    PruningSchedule,
    RowQuantization,
)
from lightning_embcomp.data import SyntheticClickLog, SyntheticClickLogDataModule
from lightning_embcomp.models import ClickModel

ROWS = (40, 300, 2000)
SEARCH = 6
"""Steps of a search."""

Callbacks = Callable[[], Sequence[pl.Callback]]


def _pruning() -> DimensionPruning:
    return DimensionPruning(target=0.6, schedule=PruningSchedule(every_n_steps=4, early_steps=()))


SGD = {"embedding_optimizer": "sgd"}
CASES: dict[str, tuple[Callbacks, dict[str, Any]]] = {
    "sensitivity": (lambda: [MixedPrecisionSearch(ratio=12, search=PrecisionSearch(steps=SEARCH))], {}),
    "softmax": (
        lambda: [MixedPrecisionSearch(ratio=12, search=PrecisionSearch(steps=SEARCH, method="softmax", reset=False))],
        {},
    ),
    "one_width": (
        lambda: [MixedPrecisionSearch(bits=4, quantization=RowQuantization(offset=True))],
        {"embedding_optimizer": "none"},
    ),
    "running": (lambda: [FrequencyAwareLR(log_every_n_steps=5)], SGD),
    "half_life": (lambda: [FrequencyAwareLR(counter=CounterSettings(half_life=1.5), log_every_n_steps=0)], SGD),
    "horizon": (
        lambda: [
            FrequencyAwareLR(
                form="horizon", max_rate=0.5, counter=CounterSettings(encoding="exact"), log_every_n_steps=0
            )
        ],
        SGD,
    ),
    "known": (lambda: [FrequencyAwareLR(form="known", log_every_n_steps=0)], SGD),
    "not_fused": (
        lambda: [FrequencyAwareLR(max_rate=0.05, log_every_n_steps=0)],
        {"embedding_optimizer": "none", "dense_optimizer": "sgd"},
    ),
    "together": (
        lambda: [
            _pruning(),
            FrequencyAwareLR(log_every_n_steps=0),
            MixedPrecisionSearch(ratio=12, search=PrecisionSearch(steps=SEARCH)),
        ],
        SGD,
    ),
    "measured": (
        lambda: [_pruning(), MixedPrecisionSearch(ratio=12, search=PrecisionSearch(steps=100))],
        {"embedding_optimizer": "none"},
    ),
    "budget": (
        lambda: [
            CompressionBudget(
                ratio=6,
                max_ne_loss=0.5,
                control=BudgetControl(every_n_steps=3, warmup_steps=2),
                search=PrecisionSearch(steps=4),
            )
        ],
        {},
    ),
}
"""Callbacks, and settings of the model."""

EVENTS = {
    "sensitivity": {SEARCH},
    "softmax": {SEARCH},
    "running": {5, 10, 15, 20},
    "half_life": {3},
    "measured": {4, 8, 12, 16, 20},
    "together": {4, SEARCH, 8, 12, 16, 20},
    "budget": {3, 4, 6, 9, 12, 15, 18, 20},
}
"""Steps at which rows move, widths are chosen, rates are logged, or a first sweep copies constants: there the host may
wait."""


class _Anywhere(CPUAccelerator):
    def setup_device(self, device: torch.device) -> None:
        """Takes any device."""


def data() -> SyntheticClickLogDataModule:
    log = SyntheticClickLog(num_rows=3000, num_embeddings=ROWS, num_dense=2)
    return SyntheticClickLogDataModule(log, batch_size=64)


def model(**settings: Any) -> ClickModel:
    """The same start every time."""
    torch.manual_seed(3)
    built = ClickModel(
        embedding_dim=8, dense_layers=(8,), over_layers=(16,), features=data().features, num_dense=2, **settings
    )
    built.configure_model()
    return built


def fit(
    case: str,
    device: torch.device,
    *extra: pl.Callback,
    steps: int = 12,
    pretended: bool = False,
    resume: Path | None = None,
    **options: Any,
) -> tuple[ClickModel, pl.Trainer]:
    """Train a case on a device; ``pretended`` for one that is not there."""
    callbacks, settings = CASES[case]
    if pretended:
        options["strategy"] = SingleDeviceStrategy(device=device, accelerator=_Anywhere())
    else:
        options |= {"accelerator": "gpu" if device.type == "cuda" else "cpu", "devices": 1}
    trainer = pl.Trainer(
        max_steps=steps,
        max_epochs=1,
        callbacks=[*callbacks(), *extra],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=2,
        num_sanity_val_steps=0,
        **options,
    )
    module = model(**settings)
    trainer.fit(module, data(), ckpt_path=None if resume is None else str(resume))
    return module, trainer


def scaled_on_cpu(factor: float) -> MixedPrecision:
    """16-bit training with a factor on the loss, which Lightning has on GPUs only."""
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=factor))


def states(module: torch.nn.Module) -> dict[str, Tensor]:
    """Tensors of a model in host memory."""
    return {key: value.cpu().clone() for key, value in module.state_dict().items() if isinstance(value, Tensor)}

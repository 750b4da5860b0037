"""One case for every public callback: how it is made, what it does visibly, and what it refuses.

A new callback joins by an entry in :data:`MATRIX`; a public callback without one fails the suite. What an entry does
not list as refused must work.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy
from torchrec.distributed.planner import EmbeddingShardingPlanner

import lightning_embcomp
from lightning_embcomp import (
    CompressionBudget,
    CompressionCallback,
    CounterSettings,
    DimensionPruning,
    EmbeddingTrafficMonitor,
    FrequencyAwareLR,
    GradientThresholding,
    MixedPrecisionSearch,
    ModelExport,
    OwnershipError,
    PooledThresholding,
    PrecisionSearch,
    PruningSchedule,
    ReshardOnImbalance,
    SetupError,
    ShardingError,
    TorchRecStrategy,
)
from lightning_embcomp.engine.optimizer import UnsupportedOptimizerError
from lightning_embcomp.export.errors import ExportError
from lightning_embcomp.methods.budget.callback import BudgetCallback
from lightning_embcomp.methods.budget.config import BudgetControl

if TYPE_CHECKING:
    from .bench import Bench

DIM = 16
OFTEN = PruningSchedule(every_n_steps=5, early_steps=(2,))
SEARCH = PrecisionSearch(steps=3, groups=16, frequency="rank")
NOT_PUBLIC: dict[type[pl.Callback], str] = {
    CompressionCallback: "base class of the others",
    BudgetCallback: "base class of CompressionBudget",
}
"""Callbacks without a case, and why."""


SHARDED = "sharded = unsharded"
"""The check of test_sharded."""


@dataclass(frozen=True)
class Refusal:
    """A cell in which a callback stops with an error.

    Args:
        error: Its type.
        says: Regular expression of its text.
        why: The reason, for the table.
    """

    error: type[Exception]
    says: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Case:
    """A public callback in the matrix.

    Args:
        make: Makes it with an effect; given a folder, and perhaps ``tables``.
        effect: Raises unless a fitted bench shows what the callback is for.
        fragment: Its configuration fragment.
        card: Where its users read about it.
        neutral: Makes it with settings under which training must be that of the plain model; None if ``make`` does.
        remembers: What an instance keeps from one fit to the next, if it does.
        settles: Whether its last step comes after the last validation.
        command: Options that ``embcomp fit`` needs beside the fragment.
        settings: Model settings that it needs.
        processes: Processes of its checks.
        strategy: Strategy of its checks.
        fused_strategy: The same where tables learn in the backward pass, if it must be another.
        refuses: Checks that end in an error.
    """

    make: Callable[..., pl.Callback]
    effect: Callable[[Bench], None]
    fragment: str
    card: str
    remembers: str = ""
    settles: bool = False
    neutral: Callable[[Path], pl.Callback] | None = None
    command: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    processes: int = 1
    strategy: Callable[[], Any] = lambda: "auto"
    fused_strategy: Callable[[], Any] | None = None
    refuses: Mapping[str, Refusal] = field(default_factory=dict)


def public_callbacks() -> dict[str, type[pl.Callback]]:
    """Every callback that a package exports by name."""
    found: dict[str, type[pl.Callback]] = {}
    packages = [lightning_embcomp.__name__]
    packages += [info.name for info in pkgutil.walk_packages(lightning_embcomp.__path__, "lightning_embcomp.")]
    for name in packages:
        module = importlib.import_module(name) if not name.endswith(".triton") else None
        for public in getattr(module, "__all__", ()):
            value = getattr(module, public)
            if inspect.isclass(value) and issubclass(value, pl.Callback) and value not in NOT_PUBLIC:
                found[value.__name__] = value
    return found


def _pruned(bench: Bench) -> None:
    assert 0 < bench.fitted.held_bytes() <= 0.5 * bench.plain_bytes()
    assert bench.fitted.runner.callback_metrics["fiited/live_ratio"] <= 0.31


def _rounded(bench: Bench) -> None:
    assert bench.fitted.runner.callback_metrics["mpe/average_bits"] <= 32 / 15
    assert bench.fitted.runner.callback_metrics["mpe/searching"] == 0


def _counted(bench: Bench) -> None:
    logged = bench.fitted.runner.callback_metrics
    assert logged["frequency_lr/bytes_per_row"] == 1
    assert logged["frequency_lr/rate_decile_9"] < logged["frequency_lr/rate_decile_0"]


def _budgeted(bench: Bench) -> None:
    logged = bench.fitted.runner.callback_metrics
    assert logged["budget/serving_bytes"] < 0.3 * bench.plain_bytes() and logged["budget/multiplier"] > 0


def _exported(bench: Bench) -> None:
    callback: Any = bench.fitted.callback
    assert callback.report.serving_ratio > 2 and (bench.folder / "served" / "manifest.json").exists()


def _thresholded(bench: Bench) -> None:
    callback: Any = bench.fitted.callback
    assert callback.total.sent < 0.8 * callback.total.dense
    assert bench.fitted.runner.callback_metrics["dct/density"] < 0.3


def _monitored(bench: Bench) -> None:
    logged = bench.fitted.runner.callback_metrics
    assert 0 < logged["comm/pooled_forward_bytes"] < logged["comm/pooled_forward_dense_bytes"]


def _resharded(bench: Bench) -> None:
    assert bench.fitted.runner.callback_metrics["reshard/imbalance"] >= 1


def sharded(**settings: Any) -> Callable[[], Any]:
    """Whole tables over two processes."""

    def make() -> Any:
        return TorchRecStrategy(sharding={"*": "table_wise"}, timeout=timedelta(seconds=60), **settings)

    return make


def on_one_rank(**kwargs: Any) -> Any:
    """A plan with every table on the first process."""

    def place(options: list[Any]) -> list[Any]:
        for option in options:
            for shard in option.shards:
                shard.rank = 0
        return options

    return EmbeddingShardingPlanner(**kwargs, callbacks=[place], stats=[], debug=False)


def _fused(setting: str) -> Refusal:
    why = "tables that learn in the backward pass are not reached"
    return Refusal(
        SetupError, rf"\]: {setting} does not reach tables whose optimizer runs inside the backward pass", why
    )


NO_AVERAGES = Refusal(SetupError, "averages parameters", "rows move, and fused tables are no parameters to average")
COMPRESSION = {
    "clipping, fused": _fused("gradient_clip_val"),
    "accumulation, fused": _fused("accumulate_grad_batches"),
    "StochasticWeightAveraging": NO_AVERAGES,
}
PLAIN_TABLES = {
    name: Refusal(
        ValueError, "does not reach the embedding tables", "by the model: its tables learn in the backward pass"
    )
    for name in ("clipping, fused", "accumulation, fused")
}
BY_STRATEGY = {
    name: Refusal(
        ShardingError, "does not reach the fused tables", "by the strategy: its tables learn in the backward pass"
    )
    for name in ("clipping, fused", "accumulation, fused")
}
SHARDED_TABLES = {
    **BY_STRATEGY,
    "export = evaluation": Refusal(ExportError, "nothing to export", "sharded tables are exported from a checkpoint"),
    "StochasticWeightAveraging": Refusal(
        ShardingError,
        "averages a copy of the module that was made before its tables were sharded",
        "Lightning would average whole tables with shards",
    ),
    "copies of the module": Refusal(
        AttributeError, "Can't pickle local object 'Sharded", "sharded modules of TorchRec cannot be copied"
    ),
}
ADAPTIVE = Refusal(
    SetupError, "divides each gradient by its own running size", "adaptive optimizers undo factors on the gradient"
)

MATRIX: dict[str, Case] = {
    "DimensionPruning": Case(
        make=lambda folder, **kwargs: DimensionPruning(target=0.7, schedule=OFTEN, **kwargs),
        neutral=lambda folder: DimensionPruning(target=0.0, schedule=OFTEN),
        effect=_pruned,
        fragment="callbacks/fiited.yaml",
        card="lightning_embcomp/methods/fiited/README.md",
        refuses=COMPRESSION,
    ),
    "MixedPrecisionSearch": Case(
        make=lambda folder, **kwargs: MixedPrecisionSearch(ratio=15, search=SEARCH, **kwargs),
        neutral=lambda folder: MixedPrecisionSearch(bits=32),
        effect=_rounded,
        fragment="callbacks/mpe.yaml",
        card="lightning_embcomp/methods/mpe/README.md",
        refuses=COMPRESSION,
    ),
    "FrequencyAwareLR": Case(
        make=lambda folder, **kwargs: FrequencyAwareLR(
            counter=CounterSettings(half_life=20.0), log_every_n_steps=4, **kwargs
        ),
        # Multipliers of at least 1, and no rate above that of the tables.
        neutral=lambda folder: FrequencyAwareLR(
            form="horizon", horizon=1, max_rate=1.0, counter=CounterSettings(encoding="exact", counted="presence")
        ),
        effect=_counted,
        fragment="callbacks/frequency_lr.yaml",
        card="lightning_embcomp/methods/frequency_lr/README.md",
        settings={"embedding_optimizer": "sgd", "dense_optimizer": "sgd", "embedding_lr": 1.0, "dense_lr": 0.05},
        refuses={
            **COMPRESSION,
            "Adam": ADAPTIVE,
            "Adagrad": ADAPTIVE,
            "fused row-wise Adagrad": Refusal(
                UnsupportedOptimizerError,
                "already divides the step of a row",
                "it divides by the root of what it has seen",
            ),
        },
    ),
    "CompressionBudget": Case(
        make=lambda folder, **kwargs: CompressionBudget(
            ratio=8,
            start=0.5,
            max_ne_loss=0.2,
            schedule=OFTEN,
            search=replace(SEARCH, reset=False),
            control=BudgetControl(every_n_steps=3, step=1.0),
            **kwargs,
        ),
        neutral=lambda folder: CompressionBudget(memory="1GB", of="training", schedule=OFTEN),
        effect=_budgeted,
        remembers="price, reference and states that were good",
        settles=True,
        fragment="callbacks/budget.yaml",
        card="lightning_embcomp/methods/budget/README.md",
        refuses={**COMPRESSION, SHARDED: Refusal(SetupError, "works in one process only so far", "one process so far")},
    ),
    "ModelExport": Case(
        make=lambda folder, name="served": ModelExport(str(folder / name), overwrite=True, max_ne_loss=0.1),
        effect=_exported,
        fragment="callbacks/export.yaml",
        card="lightning_embcomp/export/README.md",
        settings={"embedding_optimizer": "none"},
        refuses={
            **PLAIN_TABLES,
            SHARDED: Refusal(ExportError, "no process holds all rows of sharded tables", "exported from a checkpoint"),
        },
    ),
    "GradientThresholding": Case(
        make=lambda folder, **kwargs: GradientThresholding(0.1, warmup_steps=2, log_every_n_steps=4, **kwargs),
        neutral=lambda folder: GradientThresholding(1.0, warmup_steps=2),
        effect=_thresholded,
        fragment="callbacks/dct.yaml",
        card="lightning_embcomp/methods/dct/README.md",
        settings={"embedding_optimizer": "none"},
        processes=2,
        strategy=lambda: DDPStrategy(timeout=timedelta(seconds=60)),
        fused_strategy=sharded(),
        refuses=PLAIN_TABLES,
        command=("--trainer.devices=2", "--trainer.strategy=torchrec"),
    ),
    "EmbeddingTrafficMonitor": Case(
        make=lambda folder: EmbeddingTrafficMonitor(every_n_steps=4),
        effect=_monitored,
        fragment="callbacks/traffic.yaml",
        card="docs/distributed.md",
        processes=2,
        refuses=SHARDED_TABLES,
        strategy=sharded(codecs=PooledThresholding(row_dim=DIM, forward_density=0.5)),
    ),
    "ReshardOnImbalance": Case(
        make=lambda folder: ReshardOnImbalance(every_n_steps=3),
        effect=_resharded,
        fragment="callbacks/reshard.yaml",
        card="docs/distributed.md",
        processes=2,
        strategy=sharded(planner=on_one_rank, fused_params={"optimizer": "rowwise_adagrad", "learning_rate": 0.02}),
        settings={"embedding_optimizer": "none"},
        refuses={
            **SHARDED_TABLES,
            **{
                name: Refusal(ShardingError, "does not reach the fused tables", "the tables that it moves are fused")
                for name in ("accumulation", "clipping")
            },
        },
    ),
}

_MONITOR, _RESHARD, _DCT = "EmbeddingTrafficMonitor", "ReshardOnImbalance", "GradientThresholding"
OWNERS = ("DimensionPruning", "MixedPrecisionSearch", "FrequencyAwareLR")
PAIRS: dict[frozenset[str], Refusal] = {
    **{
        frozenset({name}): Refusal(
            OwnershipError,
            rf"both {name}\[\*\] and {name}\[t_feature_1\] set the .* of table .*t_feature_1': give them different",
            "two owners of one property of a table",
        )
        for name in OWNERS
    },
    frozenset({"CompressionBudget"}): Refusal(
        OwnershipError, r"both DimensionPruning\[\*\] and DimensionPruning\[t_feature_1\]", "two owners of the width"
    ),
    **{
        frozenset({"CompressionBudget", name}): Refusal(
            OwnershipError, rf"CompressionBudget\[\*\] brings its own {name}\[\*\]", "the budget brings it along"
        )
        for name in ("DimensionPruning", "MixedPrecisionSearch")
    },
    frozenset({_DCT}): Refusal(
        SetupError,
        r"both GradientThresholding\[.*\] and GradientThresholding\[.*\] want to exchange the gradients",
        "DDP takes one communication hook",
    ),
    **{
        frozenset({"CompressionBudget", name}): Refusal(
            SetupError, r"CompressionBudget\[\*\]: works in one process only", "the budget works in one process"
        )
        for name in (_MONITOR, _RESHARD, _DCT)
    },
    **{
        frozenset({"ModelExport", name}): Refusal(
            ExportError,
            r"ModelExport\[.*\]: no process holds all rows",
            "sharded tables are exported from a checkpoint",
        )
        for name in (_MONITOR, _RESHARD)
    },
    **{
        frozenset({_RESHARD, name}): Refusal(
            ShardingError, "are compressed, and do not move while training", "TorchRec moves plain tables only"
        )
        for name in OWNERS
    },
}
"""Pairs of callbacks on the same tables that are refused; a pair of one name is two instances of it."""

"""Settings of a trainer that sharded tables cannot honour."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lightning_embcomp.averaging import AVERAGING
from lightning_embcomp.strategies.errors import ShardingError

_TRUE_PRECISIONS = ("16-true", "bf16-true", "64-true", "transformer-engine", "transformer-engine-float16")


def check_precision(trainer: pl.Trainer) -> None:
    """Refuse precisions that would convert the tables.

    Raises:
        ShardingError: With the reason and the mend.
    """
    if str(trainer.precision) in _TRUE_PRECISIONS:
        raise ShardingError(
            f"precision={trainer.precision!r} converts all parameters, which would part sharded tables from the memory"
            " that their lookups read. Use 'bf16-mixed', and set the tables' own type by EmbeddingBagConfig(data_type=)"
        )


def check_averaging(trainer: pl.Trainer) -> None:
    """Refuse callbacks that keep a copy of the module, whose tables would be whole or missing.

    Raises:
        ShardingError: With the callback and the reason.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, AVERAGING):
            raise ShardingError(
                f"{type(callback).__name__} averages a copy of the module that was made before its tables were sharded:"
                " leave it out, or train in one process without sharding (strategy='auto')"
            )


def check_fused(trainer: pl.Trainer, tables: Sequence[str]) -> None:
    """Refuse what does not reach tables whose optimizer runs inside the backward pass.

    Args:
        trainer: The trainer.
        tables: Names of these tables.

    Raises:
        ShardingError: With the setting, the reason and the mend.
    """
    if not tables:
        return
    schedulers = [callback for callback in trainer.callbacks if isinstance(callback, GradientAccumulationScheduler)]  # type: ignore[attr-defined]
    accumulates = trainer.accumulate_grad_batches > 1 or any(
        factor > 1 for scheduler in schedulers for factor in scheduler.scheduling.values()
    )
    reasons = {
        f"gradient_clip_val={trainer.gradient_clip_val}": (
            bool(trainer.gradient_clip_val),
            "are updated before the norm of all gradients is known",
        ),
        f"accumulate_grad_batches={trainer.accumulate_grad_batches}": (
            accumulates,
            "are updated on every backward pass, so each part of a batch would be a step of its own",
        ),
        f"precision={trainer.precision!r}": (
            str(trainer.precision) == "16-mixed",
            "would be updated with gradients that are still multiplied by the loss scale",
        ),
    }
    for setting, (is_set, reason) in reasons.items():
        if is_set:
            named = ", ".join(repr(name) for name in tables[:3]) + (", ..." if len(tables) > 3 else "")
            raise ShardingError(
                f"Trainer({setting}) does not reach the fused tables {named}: they {reason}. Leave the setting out"
                + (" (precision='bf16-mixed' works)" if "precision" in setting else "")
                + ", or train the tables from configure_optimizers: no apply_optimizer_in_backward, no fused_params"
            )


def check_pipeline(trainer: pl.Trainer) -> None:
    """Refuse what cannot stand that the next batch is moved, and its ids are sent, before this one is trained on.

    Gloo is one of these: with ids under way while rows and gradients are exchanged, runs on it ended now and then with
    an exchange of the wrong size.

    Raises:
        ShardingError: If processes talk by gloo, or a hook sees batches in turn.
    """
    if trainer.strategy.root_device.type == "cpu" or dist.get_backend() == "gloo":
        raise ShardingError(
            "pipeline='sparse_dist' needs CUDA and NCCL: gloo mixes up exchanges that are under way at the same time."
            " Use pipeline='none'"
        )
    for owner, base in ((trainer.lightning_module, pl.LightningModule), (trainer.datamodule, pl.LightningDataModule)):  # type: ignore[attr-defined]
        if owner is not None and type(owner).on_before_batch_transfer is not base.on_before_batch_transfer:
            raise ShardingError(
                f"{type(owner).__name__}.on_before_batch_transfer would not see batches that pipeline='sparse_dist'"
                " moves ahead: do its work in the data loader, or use pipeline='none'"
            )

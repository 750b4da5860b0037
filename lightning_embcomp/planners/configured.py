"""Read the model, the callbacks and the strategy of a run, without allocating a table."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lightning_embcomp.callback import CompressionCallback
from lightning_embcomp.deferred import DeferredTableError, deferred_tables
from lightning_embcomp.engine.layout import ChunkLayout
from lightning_embcomp.engine.optimizer import UnsupportedOptimizerError
from lightning_embcomp.planners.options import PlanInputError
from lightning_embcomp.strategies import TorchRecStrategy
from lightning_embcomp.surgery import UnsupportedTableError, sharded_spec
from lightning_embcomp.tables import HostView, find_hosts, select_tables
from lightning_embcomp.trainer_cli import SETTINGS, EmbCompCLI

_HERE = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "logger": False}
"""The trainer is only built to hold callbacks: no device of the run is needed."""


@dataclass(frozen=True, kw_only=True)
class ConfiguredRun:
    """What a plan needs of a run.

    Args:
        model: The model, its tables on the meta device; None if only callbacks were read.
        callbacks: Compression callbacks of the trainer, those that others bring along included.
        strategy: Arguments of the run's ``TorchRecStrategy``; empty for others.
        budgets: Names of callbacks that bring compression callbacks along and change their settings while training.
    """

    model: nn.Module | None
    callbacks: tuple[CompressionCallback, ...]
    strategy: Mapping[str, Any] = field(default_factory=dict)
    budgets: tuple[str, ...] = ()


class _ReadOnly(EmbCompCLI):
    """LightningCLI that builds what it reads with deferred tables, and does not run."""

    strategy: Mapping[str, Any]

    def instantiate_classes(self) -> None:
        """Build trainer, model and data for this machine, whatever the configuration asks for."""
        trainer = self.config[self.config.subcommand].trainer
        self.strategy = _strategy_arguments(trainer.get("strategy"))
        for name, value in _HERE.items():
            trainer[name] = value
        with deferred_tables():
            super().instantiate_classes()

    def _run_subcommand(self, subcommand: str) -> None:
        """Leave the trainer alone."""


def read_run(configs: Sequence[str], *, with_model: bool) -> ConfiguredRun:
    """Read configuration files as ``embcomp fit`` takes them.

    Args:
        configs: The files, later ones win.
        with_model: Whether to build the model, for which its data module may have to open its data.

    Returns:
        Model, callbacks and strategy.

    Raises:
        PlanInputError: If the model holds no tables, or changes them while it is built.
        SystemExit: If a file cannot be parsed; LightningCLI has said why.
    """
    words = [word for path in configs for word in ("-c", path)]
    with _quiet_lightning(), warnings.catch_warnings():
        # The words of the command line are those of `embcomp plan`, and LightningCLI wonders about them.
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
        # Accelerators that are there and not used do not matter to a plan.
        warnings.filterwarnings("ignore", message=".*available but not used")
        try:
            cli = _ReadOnly(
                **SETTINGS, save_config_callback=None, parser_kwargs={"prog": "embcomp plan"}, args=["fit", *words]
            )
            model = _built(cli) if with_model else None
        except DeferredTableError as error:
            raise PlanInputError(f"{error}. To plan without the model, list its tables in a file (--tables)") from error
    callbacks: list[pl.Callback] = cli.trainer.callbacks  # type: ignore[attr-defined]
    members = [(callback, _compression_callbacks(callback)) for callback in callbacks]
    return ConfiguredRun(
        model=model,
        callbacks=tuple(member for _, found in members for member in found),
        strategy=cli.strategy,
        budgets=tuple(callback.state_key for callback, found in members if found and callback not in found),
    )


def _compression_callbacks(callback: pl.Callback) -> list[CompressionCallback]:
    """The callback itself, or those that it brings along."""
    if isinstance(callback, CompressionCallback):
        return [callback]
    return [member for member in getattr(callback, "members", ()) if isinstance(member, CompressionCallback)]


def refusals(
    hosts: Sequence[HostView], callbacks: Sequence[CompressionCallback], budgets: Sequence[str] = ()
) -> list[str]:
    """What training on several ranks would refuse of a run that is planned.

    Args:
        hosts: Modules with tables.
        callbacks: Compression callbacks.
        budgets: Names of callbacks that bring some of them along.

    Returns:
        A line for each refusal.
    """
    alone = [*budgets, *(callback.state_key for callback in callbacks if not callback.follows_shards)]
    found = [f"{name} works in one process only so far: training on several ranks refuses it." for name in alone]
    cuts: dict[str, tuple[int, ChunkLayout]] = {}
    claimed: set[str] = set()
    for callback in callbacks:
        tables = select_tables(hosts, callback.patterns, callback.state_key)
        claimed.update(table.name for table in tables)
        if callback.owns == "width":
            cuts.update(callback.table_cuts(tables))
    for host in hosts:
        if not any(table.name in claimed for table in host.tables):
            continue
        try:
            sharded_spec(host, cuts, torch.device("cpu"))
        except (UnsupportedTableError, UnsupportedOptimizerError) as error:
            found.append(f"Training on several ranks refuses this: {error}.")
    return found


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Nothing runs: seeds and devices are no news."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _built(cli: EmbCompCLI) -> nn.Module:
    model, trainer, data = cli.model, cli.trainer, cli.datamodule
    if not find_hosts(model) and is_overridden("configure_model", model):
        model.trainer = trainer
        if data is not None:
            trainer.datamodule = data  # type: ignore[attr-defined]
            data.prepare_data()
            data.setup("fit")
        with deferred_tables():
            model.configure_model()
    if not find_hosts(model):
        raise PlanInputError(f"{type(model).__name__} holds no embedding tables")
    return model


def _strategy_arguments(strategy: Any) -> dict[str, Any]:  # noqa: ANN401 - a name, or a class with arguments
    path = str(getattr(strategy, "class_path", ""))
    if path.rpartition(".")[2] != TorchRecStrategy.__name__:
        return {}
    given = strategy.get("init_args") or {}
    return dict(given.as_dict() if hasattr(given, "as_dict") else given)

"""Base of the callbacks: choose tables, put engines under them once, keep them through resume and repeated runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_embcomp.averaging import AVERAGING
from lightning_embcomp.composition import STAGES, Property
from lightning_embcomp.deferred import deferred_tables
from lightning_embcomp.engine.host import EngineHost, HeldTable
from lightning_embcomp.engine.placement import RowPlacement
from lightning_embcomp.engine.row_class import TrainedRows
from lightning_embcomp.errors import NonFiniteLossError, SetupError
from lightning_embcomp.evaluation_guard import PlainEvaluation, plain_evaluation
from lightning_embcomp.installation import Cuts, install, sharding_strategy, sources
from lightning_embcomp.kernels.route.watch import check, forget, report_later
from lightning_embcomp.planners.footprint import TableFootprint
from lightning_embcomp.surgery import fill
from lightning_embcomp.tables import HostView, TableView, find_hosts, select_tables


class CompressionCallback(pl.Callback):
    """Base of callbacks that store embedding tables in an engine.

    Subclasses say which property of their tables they own (:attr:`owns`) and what happens once the engine stands
    (:meth:`on_tables_ready`); the owner of the width also says how it cuts its tables (:meth:`table_cuts`). All
    callbacks of a trainer share one engine per embedding module and act in the order of their stages, whatever their
    order in the trainer.

    Args:
        tables: Globs of table names; a table matches by its full path or by its own name, and a glob
            that starts with ``!`` excludes.
    """

    owns: ClassVar[Property]
    """What the method owns of its tables."""

    follows_shards: ClassVar[bool] = False
    """Whether the method works where tables are spread over processes."""

    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    """Types of device that the method runs on."""

    sharded_devices: ClassVar[tuple[str, ...]] = ("cpu",)
    """Types of device that it runs on where tables are spread over processes."""

    row_placement = RowPlacement()
    """Where the rows of the tables live on a GPU."""

    changes_values: ClassVar[bool] = True
    """Whether a model that was not trained with the callback would predict something else under it."""

    _plain: PlainEvaluation | None = None

    def __init__(self, tables: str | Sequence[str] = "*") -> None:
        self.patterns: tuple[str, ...] = (tables,) if isinstance(tables, str) else tuple(tables)
        if not self.patterns:
            raise ValueError(f"{type(self).__name__}: give at least one table glob; '*' matches every table")
        self.owned: list[HeldTable] = []

    @property
    def state_key(self) -> str:
        """Distinct for instances on different tables."""
        return f"{type(self).__name__}[{','.join(self.patterns)}]"

    def table_cuts(self, tables: Sequence[TableView]) -> Cuts:
        """How the callback cuts its tables; asked of the owner of the width only."""
        raise NotImplementedError(f"{type(self).__name__} owns the width of its tables but does not cut them")

    def on_tables_ready(self, fresh: bool) -> None:
        """Called once ``owned`` stands.

        Args:
            fresh: Whether the tables are new and still without rows, which only the owner of the width sees.
        """
        raise NotImplementedError

    def check_trainer(self, trainer: pl.Trainer) -> None:
        """Refuse trainers that the method cannot work in.

        Raises:
            SetupError: With the reason and what to change.
        """
        strategy = sharding_strategy(trainer)
        if strategy is not None and not self.follows_shards:
            raise SetupError(f"{self.state_key}: works in one process only so far. Train with strategy='auto'")
        if strategy is None and trainer.world_size > 1:
            raise SetupError(
                f"{self.state_key}: tables that are updated in the backward pass would drift apart on"
                f" {trainer.world_size} processes. Use strategy='torchrec', which shards them, or one process"
                " (devices=1)"
            )
        device = trainer.strategy.root_device
        if device.type not in (self.devices if strategy is None else self.sharded_devices):
            where = ", ".join(self.devices if strategy is None else self.sharded_devices)
            where += "" if strategy is None else " where tables are sharded"
            raise SetupError(
                f"{self.state_key}: runs on {where} so far, not on {device}. Use Trainer(accelerator='cpu')"
            )
        if trainer.precision in ("64-true", "bf16-true", "16-true"):
            raise SetupError(
                f"{self.state_key}: precision={trainer.precision!r} changes the dtype of every weight, but lookups give"
                " float32. Use precision='32-true', or 'bf16-mixed' to compute in half the bytes"
            )
        check_averaging(trainer, self.state_key)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Put engines under the tables of all callbacks, before anything is moved, wrapped or optimised."""
        callbacks = _in_stage_order(trainer)
        for callback in callbacks:
            callback.check_trainer(trainer)
        with _unbuilt_on_error(pl_module):
            hosts = _build_model(pl_module, callbacks)
            plain = None if stage == "fit" else plain_evaluation(pl_module, hosts, stage, callbacks)
            install(trainer, pl_module, hosts, callbacks)
            if plain is not None:
                plain.callback._plain = plain
        for callback in callbacks:
            callback._take_over(pl_module)

    def _take_over(self, pl_module: pl.LightningModule) -> None:
        """Find the tables in the module, and start them if they are new."""
        owned = _owned(pl_module, self)
        if [(o.host, o.index) for o in owned] == [(o.host, o.index) for o in self.owned]:
            return
        fresh = [o for o in owned if self.owns == "width" and o.index in sources(o.host)]
        if fresh and len(fresh) != len(owned):
            raise SetupError(f"{self.state_key}: some of its tables were already compressed by an earlier run")
        self.owned = owned
        try:
            self.on_tables_ready(fresh=bool(fresh))
        except Exception:
            self.owned = []  # another attempt starts over
            raise
        for table in fresh:
            fill(table.host, table.index, sources(table.host).pop(table.index))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that the engines are still part of the module, and that the trainer's settings reach their tables."""
        if any(table.host.options.optimizer is not None for table in self.owned):
            check_fused_settings(trainer, self.state_key)
        check_trained(trainer, pl_module, self.owned, self.state_key)
        self._scaled_by(getattr(trainer.precision_plugin, "scaler", None))
        present = {id(module) for module in pl_module.modules()}
        for table in self.owned:
            if id(table.host) not in present:
                raise SetupError(
                    f"{self.state_key}: table {table.name!r} was rebuilt after setup. configure_model must do nothing"
                    " when it is called again: return early if the model exists"
                )
        for view in select_tables(find_hosts(pl_module), self.patterns, self.state_key):
            if view.weight is not None:
                raise SetupError(
                    f"{self.state_key}: table {view.name!r} was built after setup, in configure_model, while others"
                    " are built in __init__: build all of them in one place"
                )

    def _scaled_by(self, scaler: torch.amp.GradScaler | None) -> None:
        for engine in (engine for table in self.owned for engine in table.host.engines):
            engine.loss_scaler = scaler

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse to measure a plain model that was compressed for it; in a fit there is none."""
        self._end_plain_evaluation(trainer, pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """As for validation."""
        self._end_plain_evaluation(trainer, pl_module)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """As for validation."""
        self._end_plain_evaluation(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave a model plain that could not be evaluated, for example because its checkpoint does not exist."""
        forget(trainer.strategy.root_device)
        plain, self._plain = self._plain, None
        if plain is not None:
            plain.put_back(trainer, pl_module)

    def _end_plain_evaluation(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning says only after setup whether a checkpoint is loaded.
        plain, self._plain = self._plain, None
        if plain is not None and trainer.ckpt_path is None:
            plain.put_back(trainer, pl_module)
            raise SetupError(
                f"{self.state_key}: {plain.stage} would compress table {plain.table!r} of a plain model before"
                " measuring it. Give ckpt_path of a compressed run, or leave the callback out"
            )

    def __getstate__(self) -> dict[str, Any]:
        # The tables belong to the module: a copy of the callback finds those of its module in setup. Lightning hangs
        # methods of the module on the callback for logging, anew in every run.
        kept = {name: value for name, value in self.__dict__.items() if name not in ("log", "log_dict", "_plain")}
        return {**kept, "owned": []}

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Stop before a non-finite loss reaches tables that are updated in the backward pass.

        Asking a GPU would make the host wait in every step: there, a lookup of a later step raises.
        """
        loss = loss.detach()
        if loss.device.type == "cuda":
            report_later(
                torch.isfinite(loss).logical_not().sum().view(1), partial(_raise_for_loss, loss, trainer.global_step)
            )
        elif not bool(torch.isfinite(loss).all()):
            raise NonFiniteLossError(
                f"the loss is {loss.item()} at step {trainer.global_step}; the tables are unchanged. Lower the"
                " learning rate, or look for bad values in the batch"
            )

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Wait for what a GPU has not reported yet; gradients are measured as they are from now on."""
        self._scaled_by(None)
        check(trainer.strategy.root_device, wait=True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Wait for what a GPU has not reported yet: ids outside their table were read as rows of zeros."""
        check(trainer.strategy.root_device, wait=True)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """As after validation."""
        check(trainer.strategy.root_device, wait=True)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """As after validation."""
        check(trainer.strategy.root_device, wait=True)

    def footprints(self, tables: Sequence[TableView]) -> Mapping[str, TableFootprint]:
        """What the method keeps of its tables in training, from its settings alone, for sharding plans.

        Args:
            tables: The tables that the callback works on.

        Returns:
            Footprints by unique table name, without the router, which every table in an engine has.
        """
        return {table.name: TableFootprint() for table in tables}


@contextmanager
def _unbuilt_on_error(pl_module: pl.LightningModule) -> Iterator[None]:
    """Take back what configure_model built: after an error the trainer cannot move tables that were never allocated."""
    copied = ("_modules", "_parameters", "_buffers")
    before = {name: dict(value) if name in copied else value for name, value in pl_module.__dict__.items()}
    try:
        yield
    except Exception:
        if any(parameter.is_meta for parameter in pl_module.parameters()):
            pl_module.__dict__.clear()
            pl_module.__dict__.update(before)
        raise


def check_trained(trainer: pl.Trainer, pl_module: pl.LightningModule, tables: Sequence[HeldTable], who: str) -> None:
    """Refuse optimizers that were built over the plain tables, so that the compressed ones would not train."""
    given = [p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]]
    stale = {id(parameter) for parameter in given} - {id(parameter) for parameter in pl_module.parameters()}
    if not stale:
        return
    trained = {id(parameter) for parameter in given}
    for table in tables:
        rows = [rows.parameter for e in table.host.engines for rows in e.classes if isinstance(rows, TrainedRows)]
        if any(parameter.requires_grad and id(parameter) not in trained for parameter in rows):
            raise SetupError(
                f"{who}: no optimizer trains the rows of table {table.name!r}, and one holds parameters that are not"
                " part of the module any more: it was built before the table was compressed. Build the optimizer in"
                " configure_optimizers, from self.parameters(), not in __init__"
            )


def check_fused_settings(trainer: pl.Trainer, who: str) -> None:
    """Refuse what an optimizer inside the backward pass cannot honour."""
    refused = {
        "gradient_clip_val": bool(trainer.gradient_clip_val),
        "accumulate_grad_batches": trainer.accumulate_grad_batches > 1,
        "precision='16-mixed'": trainer.precision == "16-mixed",
    }
    for setting, is_set in refused.items():
        if is_set:
            raise SetupError(
                f"{who}: {setting} does not reach tables whose optimizer runs inside the backward pass. Leave it out,"
                " or train the tables from configure_optimizers"
            )


def check_averaging(trainer: pl.Trainer, who: str) -> None:
    """Refuse callbacks that average parameters, whose average would be of other rows, or of the dense part alone."""
    for other in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(other, AVERAGING):
            raise SetupError(
                f"{who}: {type(other).__name__} averages parameters by their position, but rows of compressed tables"
                " move while they train, and tables with a fused optimizer are no parameters. Leave it out"
            )


def _in_stage_order(trainer: pl.Trainer) -> list[CompressionCallback]:
    """The compression callbacks of a trainer, which it calls in this order from now on."""
    for callback in list(trainer.callbacks):  # type: ignore[attr-defined]
        join = getattr(callback, "join", None)
        if callable(join):
            join(trainer)  # one that works through others adds them
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    mine = [callback for callback in callbacks if isinstance(callback, CompressionCallback)]
    ordered = sorted(mine, key=lambda callback: (STAGES[callback.owns], callback.state_key))
    if ordered != mine:
        following = iter(ordered)
        # A new list: the trainer may be walking through the old one.
        trainer.callbacks = [  # type: ignore[attr-defined]
            next(following) if isinstance(callback, CompressionCallback) else callback for callback in callbacks
        ]
    return ordered


def _build_model(pl_module: pl.LightningModule, callbacks: Sequence[CompressionCallback]) -> list[HostView]:
    hosts = find_hosts(pl_module)
    if not hosts and is_overridden("configure_model", pl_module):
        with deferred_tables():
            pl_module.configure_model()
        hosts = find_hosts(pl_module)
    for callback in callbacks:
        select_tables(hosts, callback.patterns, callback.state_key)
    return hosts


def steps_done(trainer: pl.Trainer, pl_module: pl.LightningModule) -> int:
    """Optimizer steps so far; batches where the module optimises by hand, since fused tables need no optimizer step."""
    if pl_module.automatic_optimization:
        return trainer.global_step
    return trainer.fit_loop.total_batch_idx + 1


def _owned(pl_module: pl.LightningModule, callback: CompressionCallback) -> list[HeldTable]:
    hosts = find_hosts(pl_module)
    wanted = {table.name for table in select_tables(hosts, callback.patterns, callback.state_key)}
    return [
        HeldTable(host.module, t, table.name)
        for host in hosts
        if isinstance(host.module, EngineHost)
        for t, table in enumerate(host.tables)
        if table.name in wanted
    ]


def _raise_for_loss(loss: Tensor, step: int, wrong: int) -> None:
    if wrong:
        raise NonFiniteLossError(
            f"the loss was {loss.item()} at step {step}, and the tables have been updated with its gradients since:"
            " go on from a checkpoint before that step. Lower the learning rate, or look for bad values in the batch"
        )

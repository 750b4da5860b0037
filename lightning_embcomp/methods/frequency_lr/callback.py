"""The callback of frequency-aware learning rates."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, cast

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_embcomp.callback import CompressionCallback, SetupError, check_fused_settings
from lightning_embcomp.composition import Property
from lightning_embcomp.engine.counters import CounterSettings
from lightning_embcomp.engine.host import EngineHost, HeldTable
from lightning_embcomp.engine.row_class import FusedRows, TrainedRows
from lightning_embcomp.methods.frequency_lr.agreement import refused_together
from lightning_embcomp.methods.frequency_lr.config import (
    BACKENDS,
    FORMS,
    FROM_DATAMODULE,
    Backend,
    Form,
    check_choice,
    check_positive,
)
from lightning_embcomp.methods.frequency_lr.fbgemm import FbgemmRates
from lightning_embcomp.methods.frequency_lr.frequencies import (
    checked_counts,
    counts_from_datamodule,
    counts_from_file,
)
from lightning_embcomp.methods.frequency_lr.module import FrequencyRates
from lightning_embcomp.methods.frequency_lr.sharded import ShardedRates, build_sharded, select_sharded
from lightning_embcomp.planners.footprint import TableFootprint
from lightning_embcomp.surgery import table_configs
from lightning_embcomp.tables import TableView


class FrequencyAwareLR(CompressionCallback):
    r"""Let the learning rate of an embedding row fall with the root of its frequency, for 1 byte of state per row.

    Plain SGD moves frequent rows too far and rare rows too little; adaptive optimizers mend that with 4 to 128 bytes of
    state per row. A counter per row does most of it [1]_: the rate of row k becomes
    :math:`\min(\eta_{max}, \eta\, m_k)`, with :math:`\eta` the rate that the optimizer has (schedulers keep working):

    * ``running``: :math:`m_k = 1 / \sqrt{N_k}` with the running count :math:`N_k` (CF-SGD without a horizon);
    * ``horizon``: :math:`m_k = \sqrt{t / (T N_k)}` at step t of T (CF-SGD as published);
    * ``known``: :math:`m_k = 1 / \sqrt{T p_k}` with frequencies known before training (FA-SGD).

    The tables must be trained by SGD, fused into the backward pass or from ``configure_optimizers``. A
    strategy may shard them over processes: the rates are those of one process with the global batch. Tables that the
    module has sharded with TorchRec by itself are trained by FBGEMM's ``COUNTER_SGD`` (``backend="fbgemm"``).

    Multipliers end with the fit: the module then trains on at the rate of its optimizer, counters kept. With
    ``backend="fbgemm"`` the tables keep ``COUNTER_SGD``.

    Logged every ``log_every_n_steps``: ``frequency_lr/rate_decile_0`` to ``_9`` (mean rate of the rarest to the most
    frequent tenth of the rows seen, from a sample) and ``frequency_lr/bytes_per_row``. With table globs other than
    ``*`` the group is called ``frequency_lr[globs]``.

    Args:
        form: ``running``, ``horizon`` or ``known``.
        tables: Globs of the tables; one that starts with ``!`` excludes.
        max_rate: Largest rate of a row; None for no limit.
        counter: What is counted and how it is stored; shared with every other method that counts rows.
        horizon: Steps T of the run for ``horizon`` and ``known``; by default what the trainer plans.
        frequencies: For ``known``: ``datamodule`` asks the trainer's data module (``id_counts``), anything else is an
            ``.npz`` file with one array of occurrences per epoch for each table.
        backend: ``lean`` keeps a counter per row; ``fbgemm`` uses FBGEMM's ``COUNTER_SGD`` with 12 bytes of state per
            row, which also serves float16 tables, options of fused SGD and sharded tables.
        warmup_steps: Steps of row-wise Adagrad at the start, with ``backend="fbgemm"`` only.
        log_every_n_steps: Steps between logged values; 0 logs nothing.

    Raises:
        ValueError: If a setting is out of range or has no effect.

    Example:
        >>> callback = FrequencyAwareLR(tables="t_*", max_rate=0.5)
        >>> callback.state_key
        'FrequencyAwareLR[t_*]'

    References:
        .. [1] Frequency-aware SGD for efficient embedding learning with provable benefits, ICLR 2022,
           https://arxiv.org/abs/2110.04844
    """

    owns: ClassVar[Property] = "learning_rate"
    follows_shards: ClassVar[bool] = True
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    changes_values: ClassVar[bool] = False

    def __init__(
        self,
        form: Form = "running",
        tables: str | Sequence[str] = "*",
        max_rate: float | None = None,
        counter: CounterSettings | None = None,
        horizon: int | None = None,
        frequencies: str | None = None,
        backend: Backend = "lean",
        warmup_steps: int = 0,
        log_every_n_steps: int = 100,
    ) -> None:
        super().__init__(tables)
        check_choice("form", form, FORMS)
        check_choice("backend", backend, BACKENDS)
        check_positive("max_rate", max_rate)
        check_positive("horizon", horizon)
        for name, steps in (("log_every_n_steps", log_every_n_steps), ("warmup_steps", warmup_steps)):
            if steps < 0:
                raise ValueError(f"FrequencyAwareLR: {name} must not be negative, not {steps}")
        self.form: Form = form
        self.max_rate = max_rate
        self.counter = counter or CounterSettings(counted="presence" if backend == "fbgemm" else "occurrence")
        self.horizon = horizon
        self.frequencies = frequencies
        self.backend: Backend = backend
        self.warmup_steps = warmup_steps
        self.log_every_n_steps = log_every_n_steps
        self.rates: FrequencyRates | FbgemmRates | None = None
        self.sharded: ShardedRates | None = None
        self._saved_steps: int | None = None
        _check_effects(self)
        if backend == "fbgemm":
            _check_fbgemm(self, counter)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "rates": None, "sharded": None}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Put engines under the tables; collections that are sharded already get FBGEMM's ``COUNTER_SGD`` instead."""
        build_sharded(trainer, pl_module)
        found = select_sharded(pl_module, self.patterns, self.state_key)
        if not found:
            super().setup(trainer, pl_module, stage)
            if isinstance(self.rates, FrequencyRates):
                self.rates.put_on()  # again, where an earlier fit has taken them off
            return
        if self.backend != "fbgemm":
            raise SetupError(
                f"{self.state_key}: {found[0].path!r} is sharded by TorchRec, where FBGEMM's kernels train the tables:"
                " give backend='fbgemm' (12 bytes of state per row)"
            )
        if self.sharded is None or not self.sharded.holds(found):
            half_life = None if self.counter.half_life is None else int(self.counter.half_life)
            self.sharded = ShardedRates(pl_module, found, half_life=half_life, warmup_steps=self.warmup_steps)

    def on_tables_ready(self, fresh: bool) -> None:
        """Start counters and tell the engines where step sizes come from."""
        if self.backend == "fbgemm":
            half_life = None if self.counter.half_life is None else int(self.counter.half_life)
            self.rates = FbgemmRates(
                self.owned, half_life=half_life, warmup_steps=self.warmup_steps, owner=self.state_key
            )
            return
        self.rates = FrequencyRates(
            self.owned, form=self.form, counter=self.counter, max_rate=self.max_rate, owner=self.state_key
        )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the optimizers that train the rows from outside."""
        if self.sharded is not None:
            check_fused_settings(trainer, self.state_key)
            return
        super().on_fit_start(trainer, pl_module)
        for rows, table in self._trained_rows():
            self._check_optimizer(trainer, rows, table.name)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find out how long the run is and how frequent rows are, where the form asks for it."""
        if self.sharded is not None and self._saved_steps is not None:
            self.sharded.restore_steps(self._saved_steps)
            self._saved_steps = None
        if not isinstance(self.rates, FrequencyRates) or self.form == "running":
            return
        self.rates.set_horizon(self.horizon if self.horizon is not None else self._planned_steps(trainer))
        if self.form == "known":
            self._set_frequencies(trainer)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Tell rows with a largest rate what the rate of their optimizer is."""
        super().on_before_backward(trainer, pl_module, loss)
        if self.max_rate is None:
            return
        for rows, _ in self._trained_rows():
            rows.learning_rate = _rate(trainer, rows)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,  # noqa: ANN401 - whatever training_step returns
        batch: Any,  # noqa: ANN401 - whatever the loader yields
        batch_idx: int,
    ) -> None:
        """Log the rates, now and then."""
        due = self.log_every_n_steps and (trainer.fit_loop.total_batch_idx + 1) % self.log_every_n_steps == 0
        if not due:
            return
        group = "frequency_lr" if self.patterns == ("*",) else f"frequency_lr[{','.join(self.patterns)}]"
        if self.sharded is not None:
            deciles, held = self.sharded.rate_deciles(), self.sharded.bytes_per_row()
        elif self.rates is not None:
            deciles = self.rates.rate_deciles([_table_rate(trainer, owned.host) for owned in self.owned])
            held = self.rates.bytes_per_row()
        else:
            return
        values = {f"{group}/rate_decile_{i}": float(rate) for i, rate in enumerate(deciles)}
        pl_module.log_dict(values | {f"{group}/bytes_per_row": held})

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave tables that learn at the rate of their optimizer, should they be trained on without the callback."""
        self._take_off()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Do the same where a run ends early."""
        self._take_off()

    def _take_off(self) -> None:
        if isinstance(self.rates, FrequencyRates):
            self.rates.take_off()
        for rows, _ in self._trained_rows():
            rows.learning_rate = None

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must find again; counters are part of the module's state."""
        return {
            "form": self.form,
            "backend": self.backend,
            "counted": self.counter.counted,
            "half_life": self.counter.half_life,
            "steps": None if self.sharded is None else self.sharded.steps_done(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that the counters of the checkpoint mean the same.

        Raises:
            SetupError: If they do not.
        """
        mine = self.state_dict()
        self._saved_steps = state_dict.get("steps")
        for name, saved in state_dict.items():
            if name != "steps" and saved != mine.get(name):
                raise SetupError(
                    f"{self.state_key}: the checkpoint was written with {name}={saved!r}; this run has"
                    f" {name}={mine.get(name)!r}. Use the saved settings"
                )

    def _trained_rows(self) -> Iterator[tuple[TrainedRows, HeldTable]]:
        """Rows that ``configure_optimizers`` trains, and their tables."""
        for owned in self.owned:
            for rows in (rows for engine in owned.host.engines for rows in engine.classes):
                if isinstance(rows, TrainedRows):
                    yield rows, owned

    def _planned_steps(self, trainer: pl.Trainer) -> int:
        planned = trainer.estimated_stepping_batches
        if not math.isfinite(planned):
            raise SetupError(
                f"{self.state_key}: form={self.form!r} needs the number of steps of the run, which the trainer does not"
                " know. Give max_steps or max_epochs to the trainer, or horizon=STEPS here"
            )
        return int(planned) * trainer.accumulate_grad_batches

    def _set_frequencies(self, trainer: pl.Trainer) -> None:
        assert isinstance(self.rates, FrequencyRates)
        steps = float(trainer.num_training_batches)
        if not math.isfinite(steps):
            raise SetupError(
                f"{self.state_key}: form='known' needs the number of batches per epoch, which an iterable data set"
                " without length does not tell. Give limit_train_batches to the trainer, or use form='running'"
            )
        assert self.frequencies is not None
        arrays: Mapping[str, Any] = {}
        if self.frequencies != FROM_DATAMODULE:
            names = {table.name: (table.name, table.logical.name) for table in self.owned}
            with refused_together(self.rates.group):
                arrays = counts_from_file(self.frequencies, names)
        for table in self.owned:
            rows = table.logical.rows
            with refused_together(self.rates.group):
                if self.frequencies == FROM_DATAMODULE:
                    features = _features(table)
                    counts = counts_from_datamodule(getattr(trainer, "datamodule", None), features, table.name, rows)
                else:
                    counts = checked_counts(arrays[table.name], rows, self.frequencies, table.name)
            self.rates.set_occurrences(table, counts, steps)

    def _check_optimizer(self, trainer: pl.Trainer, rows: TrainedRows, table: str) -> None:
        found = _optimizer_of(trainer, rows)
        if found is None:
            return  # rows that no optimizer has are not trained at all
        optimizer, group = found
        if not isinstance(optimizer, torch.optim.SGD):
            raise SetupError(
                f"{self.state_key}: table {table!r} is trained by {type(optimizer).__name__}, which divides each"
                " gradient by its own running size, so that a factor on the gradients has no effect. Train the table by"
                " torch.optim.SGD (a second optimizer or the fused one), or leave it out of the callback"
            )
        if group.get("weight_decay") and self.form != "known" and self.counter.half_life is None:
            raise SetupError(
                f"{self.state_key}: table {table!r} is trained with weight_decay={group['weight_decay']} while the"
                " rates of its rows fall without end: the decay, which does not fall, would win and pull frequent rows"
                " to zero. Set weight_decay=0 for the table, or give counter.half_life or form='known', under which"
                " rates level off"
            )

    def footprints(self, tables: Sequence[TableView]) -> Mapping[str, TableFootprint]:
        """All weights, and a counter per row, or the state of FBGEMM's ``COUNTER_SGD`` per stored row."""
        lean = TableFootprint(row_bytes=self.counter.dtype.itemsize)
        fbgemm = TableFootprint(state_bytes=12.0)  # three float32 numbers
        return {table.name: lean if self.backend == "lean" else fbgemm for table in tables}


def _check_effects(callback: FrequencyAwareLR) -> None:
    """Refuse settings that would do nothing."""
    who = "FrequencyAwareLR"
    known = callback.form == "known"
    if callback.frequencies is not None and not known:
        raise ValueError(f"{who}: frequencies has no effect with form={callback.form!r}, which counts by itself")
    if known and callback.frequencies is None:
        callback.frequencies = FROM_DATAMODULE
    if callback.warmup_steps and callback.backend == "lean":
        raise ValueError(
            f"{who}: warmup_steps={callback.warmup_steps} needs an accumulator per row, which backend='lean' does not"
            " keep; use backend='fbgemm' (12 bytes of state per row), or a learning-rate schedule that warms up"
        )
    if callback.horizon is not None and callback.form == "running":
        raise ValueError(f"{who}: horizon has no effect with form='running'; use form='horizon'")
    if callback.counter.half_life is not None and callback.form != "running":
        raise ValueError(
            f"{who}: counter.half_life has no effect with form={callback.form!r}: "
            + ("known frequencies do not change" if known else "it measures N over all steps up to t")
            + "; use form='running'"
        )


def _check_fbgemm(callback: FrequencyAwareLR, counter: CounterSettings | None) -> None:
    """Refuse what FBGEMM's ``COUNTER_SGD`` cannot do."""
    half_life = callback.counter.half_life
    refused = {
        f"form={callback.form!r}": callback.form != "running",
        f"max_rate={callback.max_rate}": callback.max_rate is not None,
        "counter.counted='occurrence'": callback.counter.counted == "occurrence",
        "counter.encoding='log'": counter is not None and counter.encoding == "log",
        f"counter.half_life={half_life}": half_life is not None and half_life != int(half_life),
    }
    for setting in (text for text, is_set in refused.items() if is_set):
        raise ValueError(
            f"FrequencyAwareLR: {setting} has no counterpart in FBGEMM's COUNTER_SGD, which counts presence in float32,"
            " with a half-life of whole steps or none, and divides by the root. Leave it out, or use backend='lean'"
        )


def _optimizer_of(trainer: pl.Trainer, rows: TrainedRows) -> tuple[torch.optim.Optimizer, dict[str, Any]] | None:
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            if any(parameter is rows.parameter for parameter in group["params"]):
                return optimizer, group
    return None


def _rate(trainer: pl.Trainer, rows: TrainedRows) -> float | None:
    found = _optimizer_of(trainer, rows)
    return None if found is None else float(found[1]["lr"])


def _table_rate(trainer: pl.Trainer, host: EngineHost) -> float:
    """Rate of a module's tables; 0 where this process holds none of its rows."""
    if not host.engines:
        return 0.0
    rows = host.engines[0].classes[-1]
    if isinstance(rows, FusedRows):
        return rows.learning_rate
    return _rate(trainer, cast(TrainedRows, rows)) or 0.0


def _features(table: HeldTable) -> tuple[str, ...]:
    """Features that look a table up; none for stand-alone embeddings, which do not know."""
    configs = table_configs(table.host)
    return () if configs is None else tuple(configs[table.index].feature_names)

"""The callback of the budget: members in, events out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_embcomp.callback import CompressionCallback, SetupError, steps_done
from lightning_embcomp.composition import OwnershipError
from lightning_embcomp.export.evaluation import evaluate
from lightning_embcomp.export.validation import Batches, check_validation, validation_batches
from lightning_embcomp.methods.budget import snapshot
from lightning_embcomp.methods.budget.config import BudgetControl, BudgetOf
from lightning_embcomp.methods.budget.module import BudgetController, Report
from lightning_embcomp.methods.budget.plant import TrainedModel


class BudgetCallback(pl.Callback):
    """Holds the methods of its members to one budget.

    The members join the trainer's callbacks when the trainer is set up, and act as if the user had listed them.

    Args:
        members: The owner of the width of some tables, and perhaps that of their precision.
        budget: Bytes; None for ``ratio``.
        ratio: Plain bytes over those of the budget.
        of: Bytes that count.
        max_ne_loss: Relative increase of NE that is allowed; None for no guard.
        reference_ne: NE that losses are counted from; None for the lowest of the run.
        control: How the price moves and how far a step goes.
    """

    def __init__(
        self,
        members: Sequence[CompressionCallback],
        *,
        budget: int | None,
        ratio: float | None,
        of: BudgetOf,
        max_ne_loss: float | None,
        reference_ne: float | None,
        control: BudgetControl | None,
    ) -> None:
        self.members = tuple(members)
        self.budget, self.ratio = budget, ratio
        self.of: BudgetOf = of
        self.max_ne_loss, self.reference_ne = max_ne_loss, reference_ne
        self.control = control or BudgetControl()
        self.controller: BudgetController | None = None
        self.report: Report | None = None
        self._plant: TrainedModel | None = None
        self._resumed: dict[str, Any] | None = None
        self._last_step = 0
        self._searching = False

    def __getstate__(self) -> dict[str, Any]:
        # The controller belongs to the tables of its module: a copy of the callback starts over.
        kept = {name: value for name, value in self.__dict__.items() if name not in ("log", "log_dict")}
        return {**kept, "controller": None, "report": None, "_plant": None}

    @property
    def patterns(self) -> tuple[str, ...]:
        """Globs of the tables."""
        return self.members[0].patterns

    @property
    def state_key(self) -> str:
        """Distinct for instances on different tables."""
        return f"CompressionBudget[{','.join(self.patterns)}]"

    def join(self, trainer: pl.Trainer) -> None:
        """Put the members among the trainer's callbacks, once, before this callback.

        Raises:
            OwnershipError: If a callback of the same kind and tables is among them already.
            SetupError: If tables were stored before the members could say how.
        """
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if all(any(callback is member for callback in callbacks) for member in self.members):
            return
        mine = callbacks.index(self)
        for callback in callbacks:
            if isinstance(callback, CompressionCallback) and callback.state_key in {m.state_key for m in self.members}:
                raise OwnershipError(
                    f"{self.state_key} brings its own {callback.state_key}: leave the one in the list out, or give them"
                    " different tables"
                )
        early = [c for c in callbacks[:mine] if isinstance(c, CompressionCallback) and c.owned]
        if early:
            raise SetupError(
                f"{self.state_key}: list it before {early[0].state_key}, which has stored the tables already"
            )
        # A new list: the trainer may be walking through the old one.
        trainer.callbacks = [*callbacks[:mine], *self.members, *callbacks[mine:]]  # type: ignore[attr-defined]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let the members join and put engines under the tables."""
        if getattr(trainer.strategy, "shard", None) is not None:
            raise SetupError(f"{self.state_key}: works in one process only so far. Train with strategy='auto'")
        self.join(trainer)
        for member in self.members:
            member.setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find out before the training whether there is data for the guard."""
        if self.max_ne_loss is not None:
            check_validation(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the controller, or go on with that of a saved run."""
        self._last_step = steps_done(trainer, pl_module)
        pruner: Any = getattr(self.members[0], "pruner")  # noqa: B009 - of a method that this one does not know
        training: Any = getattr(self.members[1], "training") if len(self.members) > 1 else None  # noqa: B009
        old = self._plant
        plant = TrainedModel(
            trainer, pl_module, pruner, training, of=self.of, predict_ne=lambda: self._measure(trainer, pl_module)
        )
        if old is not None and old.pruner is pruner and self.controller is not None:
            plant.errors = plant.errors or old.errors
        else:
            plain = (plant.serving() if self.of == "serving" else plant.held()).plain
            budget = self.budget if self.ratio is None else int(plain / self.ratio)
            assert budget is not None
            self.controller = BudgetController(
                budget, max_loss=self.max_ne_loss, reference=self.reference_ne, control=self.control
            )
            # Tables of an earlier run stay as small as they are.
            plant.set_share(min(plant.share, pruner.live_ratio()))
        self.controller.epoch = self._events_per_epoch(trainer)
        self._plant, self.report = plant, None
        if self._resumed is not None:
            plant.set_share(float(self._resumed["share"]))
            if self._resumed["errors"] is not None:
                plant.errors = list(self._resumed["errors"])
            self.controller.load_state_dict(self._resumed["controller"])
            self._resumed = None
        self._searching = plant.searching

    def _events_per_epoch(self, trainer: pl.Trainer) -> int:
        """Control events in an epoch; 0 for data without an end."""
        steps = trainer.num_training_batches / trainer.accumulate_grad_batches
        return int(steps // self.control.every_n_steps) if math.isfinite(steps) else 0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Follow the end of a search that lasts epochs."""
        self._follow_search()

    def _follow_search(self) -> None:
        """Let the controller know that a search has ended, and that its tables start from fresh values."""
        assert self.controller is not None and self._plant is not None
        ended, self._searching = self._searching and not self._plant.searching, self._plant.searching
        if ended and getattr(self.members[1], "search").reset:  # noqa: B009 - of a method that this one does not know
            self.controller.start_over(self._plant)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,  # noqa: ANN401 - whatever training_step returns
        batch: Any,  # noqa: ANN401 - whatever the loader yields
        batch_idx: int,
    ) -> None:
        """Let the controller act after the optimizer step, when an event is due."""
        step, every = steps_done(trainer, pl_module), self.control.every_n_steps
        due = step // every > self._last_step // every
        self._last_step = step
        self._follow_search()
        if not due:
            return
        assert self.controller is not None and self._plant is not None
        ready = not self._plant.searching and step >= self.control.warmup_steps
        self.report = self.controller.event(self._plant, ready=ready)
        pl_module.log_dict(self._logged())

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Bring the run to a good end before the last checkpoint is written."""
        if trainer.max_epochs is not None and 0 <= trainer.max_epochs <= trainer.current_epoch + 1:
            self._finish()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Bring the run to a good end, and say what came of the budget."""
        self._finish()
        if self.controller is None or self.report is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        text = self._outcome(self.controller, self.report)
        if self.met:
            rank_zero_info(f"{self.state_key}: {text}")
        else:
            rank_zero_warn(f"{self.state_key}: not met: {text}")

    def _finish(self) -> None:
        """Settle a step on probation; go back to the last good state where the run would end outside the guard."""
        controller = self.controller
        if controller is None or self._plant is None or (controller.saved is None and controller.kept is None):
            return
        on_probation = controller.saved is not None
        self.report = controller.finish(self._plant)
        if self.report.rolled_back and not on_probation:
            rank_zero_info(
                f"{self.state_key}: NE or bytes have risen since; the run ends with the tables, weights and optimizer"
                " state of the last good event"
            )

    @property
    def met(self) -> bool:
        """Whether the last event left the tables inside budget and guard; False before the first event."""
        if self.controller is None or self.report is None:
            return False
        return self.controller.met(self.report.size, self.report.ne)

    def _outcome(self, controller: BudgetController, report: Report) -> str:
        size = f"{report.size:,} {self.of} bytes, budget {controller.budget:,}"
        if not controller.started:
            return (
                f"{size}. No step was possible: the run ended in its warm-up (search.epochs, search.steps,"
                " control.warmup_steps, control.every_n_steps), or its NE stayed above the reference"
            )
        if self.max_ne_loss is None:
            return f"{size}, no guard"
        text = (
            f"{size}, validation NE {report.ne:.6f}, {100 * (report.ne / controller.reference - 1):+.3f} % of the"
            f" reference {controller.reference:.6f}, allowed {100 * self.max_ne_loss:+.3f} %,"
            f" {controller.rollbacks} steps rolled back"
        )
        return text if self.met else f"{text}. {self._reason(controller, report)}"

    def _reason(self, controller: BudgetController, report: Report) -> str:
        """Why the budget is not met."""
        if not controller.entered:
            return "NE has not come inside the guard since the tables started anew: train longer, or allow more"
        if not controller.inside(report.ne):
            return "NE has left the guard and not come back"
        costs = ", ".join(f"{100 * cost:.3f} % by {name}" for name, cost in controller.costs.items())
        left = controller.limit / report.ne - 1
        return (
            f"The guard leaves {100 * left:.3f} % of NE, and an e-fold of bytes costs {costs or 'an unknown share'}:"
            " train longer, allow more, or raise the budget"
        )

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> float:
        """Validation NE of the model as it is; neither metrics nor random numbers of the run move."""
        batches = validation_batches(trainer)
        most = self.control.validation_batches
        if most is not None:
            limits: list[int | float] = [min(limit, most) for limit in batches.limits]
            batches = Batches(batches.loaders, limits, batches.prepare)
        with isolate_rng(), trainer.precision_plugin.val_step_context():
            return evaluate(pl_module, batches).ne

    def _logged(self) -> dict[str, float]:
        controller, report, plant = self.controller, self.report, self._plant
        assert controller is not None and report is not None and plant is not None
        group = "budget" if self.patterns == ("*",) else f"budget[{','.join(self.patterns)}]"
        numbers = {
            "multiplier": controller.price,
            "bytes": report.size,
            "training_bytes": plant.held().held,
            "serving_bytes": plant.serving().held,
            "share": plant.share,
            "average_bits": plant.average_bits(),
            "rolled_back": report.rolled_back,
            "met": self.met,
        }
        if self.max_ne_loss is not None:
            numbers |= {
                "ne": report.ne,
                "limit": controller.limit if math.isfinite(controller.limit) else report.ne,
                "guard": report.inside,
                "snapshot_bytes": snapshot.nbytes([controller.saved, controller.kept]),
            }
        return {f"{group}/{name}": float(value) for name, value in numbers.items()}

    def state_dict(self) -> dict[str, Any]:
        """Price, step and reference, and the states to go back to; tables are saved with the module."""
        if self.controller is None or self._plant is None:
            return {}
        errors = None if self._plant.searching else self._plant.errors
        return {
            "of": self.of,
            "share": self._plant.share,
            "errors": None if errors is None else [error.clone() for error in errors],
            "controller": self.controller.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the saved state until the tables are restored.

        Raises:
            SetupError: If other bytes were counted.
        """
        saved = state_dict.get("of", self.of)
        if saved != self.of:
            raise SetupError(
                f"{self.state_key}: the checkpoint was written with of={saved!r}; this run has of={self.of!r}. Use the"
                " saved setting"
            )
        self._resumed = state_dict or None

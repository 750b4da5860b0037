"""The model under a budget: its bytes, its NE, and what its two methods can do about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_embcomp.engine.host import HeldTable
from lightning_embcomp.engine.plan import SamePlan
from lightning_embcomp.methods.budget import snapshot
from lightning_embcomp.methods.budget.accounting import (
    TablesBytes,
    bytes_by_width,
    group_rows,
    serving_bytes,
    training_bytes,
)
from lightning_embcomp.methods.budget.config import BudgetOf
from lightning_embcomp.methods.budget.functional import credited_errors, widths_within

WIDTH, PRECISION = "width", "precision"
_CLOSE = 1.01  # a size this close above the one asked for is near enough
_TRIES = 12
_PRECISION_TRIES = 4


class Pruner(Protocol):
    """What decides which columns of which rows are stored."""

    tables: Sequence[HeldTable]
    target: float | None

    def step(self, decay: float, optimizers: Sequence[torch.optim.Optimizer] = ()) -> Any:  # noqa: ANN401
        """Decide anew, and move rows."""


class TrainedModel:
    """A model in training, as the controller sees it.

    Args:
        trainer: Its trainer.
        module: The model.
        pruner: Decides which columns are stored.
        training: Trains the rounding of its tables; None where no table is rounded.
        of: Bytes that count.
        predict_ne: Measures NE.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        pruner: Pruner,
        training: snapshot.RoundingTraining | None,
        *,
        of: BudgetOf,
        predict_ne: Callable[[], float],
    ) -> None:
        self.trainer, self.module = trainer, module
        self.pruner, self.training = pruner, training
        self.of: BudgetOf = of
        self.errors: list[Tensor] | None = None
        self._predict_ne = predict_ne
        self.hold_errors()

    def hold_errors(self) -> None:
        """Keep hold of the sums of a running search, which lets go of them when it ends."""
        if self.training is not None and self.training.searching:
            self.errors = [state.error for state in self.training.states]

    @property
    def searching(self) -> bool:
        """Whether widths are still to be measured."""
        return self.training is not None and self.training.searching

    @property
    def methods(self) -> Sequence[str]:
        """Precision needs errors, which only the run that searched has."""
        can_round = self.training is not None and not self.searching and self.errors is not None
        return (PRECISION, WIDTH) if can_round and self.of == "serving" else (WIDTH,)

    @property
    def share(self) -> float:
        """Share of the weights that pruning may keep."""
        assert self.pruner.target is not None
        return 1.0 - self.pruner.target

    def set_share(self, share: float) -> None:
        """Set what pruning keeps from its next event on."""
        self.pruner.target = 1.0 - min(1.0, share)

    def serving(self) -> TablesBytes:
        """Bytes when served."""
        return serving_bytes(self.module, {table.name for table in self.pruner.tables})

    def held(self) -> TablesBytes:
        """Bytes in training."""
        return training_bytes(self.pruner.tables)

    def size(self) -> int:
        """Bytes that count."""
        return (self.serving() if self.of == "serving" else self.held()).held

    def ne(self) -> float:
        """Validation NE."""
        return self._predict_ne()

    def average_bits(self) -> float:
        """Bits per value over all rows, 0 bits included; 32 where nothing is rounded."""
        if self.training is None:
            return 32.0
        bits = values = 0.0
        for state in self.training.states:
            size = _group_values(state)
            bits += (
                float((size * state.bits.cpu().double()).sum())
                if not state.searching
                else float(size.sum() * int(state.widths[-1]))
            )
            values += float(size.sum())
        return bits / values

    def act(self, method: str, target: int) -> None:
        """Let a method bring the bytes close to a number, as far as it can."""
        if method == PRECISION:
            self._round(target)
        else:
            self._prune(target)

    def save(self) -> dict[str, Any]:
        """A copy of the state, in memory."""
        return {**snapshot.take(self.module, self.trainer.optimizers, self.training), "share": self.share}

    def restore(self, saved: dict[str, Any]) -> None:
        """Go back to a copy."""
        self.set_share(float(saved["share"]))
        snapshot.put_back(self.module, self.trainer.optimizers, self.training, saved)

    def _prune(self, target: int) -> None:
        size = self.size()
        if size < target:
            self.set_share(self.share * target / size)
            self.pruner.step(1.0, self.trainer.optimizers)
            return
        share, power = self.share, 1.0
        for _ in range(_TRIES):
            if size <= _CLOSE * target:
                return
            # Never too far: what is dropped is lost. Rows without bits take a part of the share but no bytes.
            share *= (target / size) ** power
            self.set_share(share)
            self.pruner.step(1.0, self.trainer.optimizers)
            before, size = size, self.size()
            power = 2 * power if before - size < 0.1 * (before - target) else 1.0

    def _round(self, target: int) -> None:
        size = self.size()
        grows = size < target
        for _ in range(1 if grows else _PRECISION_TRIES):
            self._choose(target - size, grows)
            before, size = size, self.size()
            if size <= _CLOSE * target or size >= before:
                return

    def _choose(self, change: int, grows: bool) -> None:
        """Give every group the width that suits its error, for some bytes more or less than now."""
        assert self.training is not None and self.errors is not None
        states = self.training.states
        costs, sizes, chosen = [], [], []
        for state, errors in zip(states, self.errors, strict=True):
            widths = state.widths.tolist()
            now = torch.tensor([widths.index(b) for b in state.bits.tolist()])
            size, kept = self._sizes(state, widths)
            cost = credited_errors(errors.cpu(), _group_values(state)) * kept.unsqueeze(1)
            if not grows:
                cost[torch.arange(len(widths)) > now.unsqueeze(1)] = torch.inf
            costs.append(cost)
            sizes.append(size)
            chosen.append(now)
        cost, size, now = torch.cat(costs), torch.cat(sizes), torch.cat(chosen)
        present = int(size.gather(1, now.unsqueeze(1)).sum())
        index = widths_within(cost, size, present + change)
        bits = states[0].widths.cpu()[index].to(torch.uint8)
        for state, mine in zip(states, bits.split([s.bits.numel() for s in states]), strict=True):
            state.fix(mine.clone())
        if grows:
            self.pruner.step(1.0, self.trainer.optimizers)  # rows that have bits again need storage
            return
        for engine in {id(s.engine): s.engine for table in self.pruner.tables for s in table.shards}.values():
            engine.move(SamePlan(), self.trainer.optimizers)

    def _sizes(self, state: Any, widths: Sequence[int]) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        """Bytes of every group at every width, and the share of its columns that it stores."""
        size = torch.zeros(state.bits.numel(), len(widths), dtype=torch.int64)
        kept = torch.zeros(state.bits.numel(), dtype=torch.float64)
        for table in self._tables_of(state):
            part, logical = state.groups.of_table(table.index), table.logical
            rows = group_rows(table)
            dropped = state.bits[part].cpu() == 0
            # Rows without bits store nothing; with bits, pruning would give them about what others have.
            code = max(1, round(self.share * logical.full_code)) if logical.layout == "prefix" else logical.full_code
            rows[dropped, code] = rows[dropped, 0]
            size[part] = bytes_by_width(table, rows, widths)
            share = torch.tensor([logical.share(code)[0] / logical.dim for code in range(logical.codes)])
            kept[part] = (rows.double() @ share.double()) / rows.sum(1)
        return size, kept

    def _tables_of(self, state: Any) -> list[HeldTable]:  # noqa: ANN401
        """Tables whose rows a state rounds."""
        return [
            table
            for table in self.pruner.tables
            if table.index in state.groups.bounds and getattr(table.shards[0].engine.values, "state", None) is state
        ]


def _group_values(state: Any) -> Tensor:  # noqa: ANN401 - the rounding state of another method
    """Rows times columns of every group, float64 ``(G,)``, of the host as all that decisions are made from."""
    values: Tensor = state.group_values
    return values.cpu().double()

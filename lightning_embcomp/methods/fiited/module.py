"""State of dimension pruning over the engines of a model: budgets, utilities, events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_embcomp.engine.layout import LogicalTable
from lightning_embcomp.engine.memory import plain_weight_bytes, table_memory
from lightning_embcomp.engine.plan import MoveSummary
from lightning_embcomp.engine.routed import RoutedEmbeddings
from lightning_embcomp.engine.statistics import RowUtility
from lightning_embcomp.methods.fiited.config import Granularity, Scope
from lightning_embcomp.methods.fiited.functional import zipf_prior
from lightning_embcomp.methods.fiited.plan import Contender, EnginePlan, ReadRows, TablePlan, mean_utility, solve


class BudgetError(ValueError):
    """A byte budget cannot be met."""


@dataclass(frozen=True)
class PrunedTable:
    """A table that dimension pruning owns.

    Args:
        engine: The engine that stores it.
        index: Its index there.
        name: Its name for people.
    """

    engine: RoutedEmbeddings
    index: int
    name: str

    @property
    def logical(self) -> LogicalTable:
        """The logical table."""
        return self.engine.tables[self.index]


class DimensionPruner:
    """Decides which column chunks of which rows are stored, and has the engines move them.

    Exactly one of ``target`` and ``budget`` is given.

    Args:
        tables: Tables to prune; their engines may hold further tables, which stay whole.
        target: Fraction of the weight bytes of these tables to remove.
        budget: Bytes for these tables with all that they need: weights, optimizer state, router, utilities.
        scope: ``global`` compares rows of all tables, ``table`` gives each table its own share.
        granularity: What lives or dies.
        normalize: Divide utilities by their table's mean before tables are compared.
    """

    def __init__(
        self,
        tables: Sequence[PrunedTable],
        *,
        target: float | None = None,
        budget: int | None = None,
        scope: Scope = "global",
        granularity: Granularity | None = None,
        normalize: bool = False,
    ) -> None:
        self.tables = list(tables)
        self.target = target
        self.budget = budget
        self.scope = scope
        self.granularity = granularity or Granularity()
        self.normalize = normalize
        self.engines = list({id(table.engine): table.engine for table in tables}.values())
        for engine in self.engines:
            names = ", ".join(table.name for table in tables if table.engine is engine)
            if engine.rate_power not in (None, self.granularity.rate_power):
                raise ValueError(
                    f"{names}: row classes of this collection have rate_power={engine.rate_power} already, not"
                    f" {self.granularity.rate_power}: use the same, or put them into a collection of their own"
                )
            engine.scale_rates(self.granularity.rate_power)
            wanted = self._new_utility(engine)
            if engine.utility is None:
                engine.track_utility(wanted)
            elif not engine.utility.measures_like(wanted):
                raise ValueError(
                    f"{names}: utilities of this collection are measured with other settings already (granularity:"
                    " chunks with layout 'chunks', utility, sample_every_n_steps): use the same, or put the tables into"
                    " a collection of their own"
                )
        self._check_budget()

    def _new_utility(self, engine: RoutedEmbeddings) -> RowUtility:
        granularity = self.granularity
        return RowUtility(
            engine.tables,
            parts=granularity.chunks if granularity.layout == "chunks" else 1,
            kind=granularity.utility,
            every_n_steps=granularity.sample_every_n_steps,
            device=engine.options.device,
        )

    def start(self) -> MoveSummary:
        """Give engines without storage their first rows, by Zipf's law over row numbers."""
        return self._apply(prior=True, optimizers=())

    def step(self, decay: float, optimizers: Sequence[torch.optim.Optimizer] = ()) -> MoveSummary:
        """One pruning event: forget a little, find the threshold, move rows.

        Args:
            decay: Factor on all utilities before the decision.
            optimizers: Optimizers whose state belongs to the rows.

        Returns:
            What moved, over all engines.
        """
        for table in self.tables:
            assert table.engine.utility is not None
            table.engine.utility.decay(table.index, decay)
        return self._apply(prior=False, optimizers=optimizers)

    def _apply(self, *, prior: bool, optimizers: Sequence[torch.optim.Optimizer]) -> MoveSummary:
        plans = self._plans(prior=prior)
        total = MoveSummary(changed_rows=0, grown_rows=0, revived_rows=0, dropped_rows=0, rows=0)
        for engine in self.engines:
            per_table = [plans.get((id(engine), t)) or _Unchanged() for t in range(len(engine.tables))]
            total = total + engine.move(EnginePlan(per_table), optimizers)
        return total

    def _plans(self, *, prior: bool) -> dict[tuple[int, int], TablePlan]:
        contenders = [self._contender(table, prior=prior) for table in self.tables]
        groups = [[i] for i in range(len(contenders))] if self.scope == "table" else [list(range(len(contenders)))]
        plans: dict[tuple[int, int], TablePlan] = {}
        for group in groups:
            solved = solve(
                [contenders[i] for i in group],
                sum(self._allowance(self.tables[i]) for i in group),
                falloff=self.granularity.falloff,
                hysteresis=0.0 if prior else self.granularity.hysteresis,
            )
            for i, plan in zip(group, solved, strict=True):
                plans[id(self.tables[i].engine), self.tables[i].index] = plan
        return plans

    def _contender(self, table: PrunedTable, *, prior: bool) -> Contender:
        logical, engine = table.logical, table.engine
        itemsize = engine.options.dtype.itemsize
        optimizer = engine.options.optimizer
        state_columns = optimizer.state_columns(logical.chunk_width) if optimizer and self.budget is not None else 0
        rowwise = optimizer is not None and optimizer.kind == "rowwise_adagrad"
        contender = Contender(
            table=logical,
            codes=lambda start, stop: engine.router.read(table.index, start, stop)[0],
            utility=_utility_reader(table, prior=prior),
            chunk_bytes=logical.chunk_width * itemsize + (0 if rowwise else 4 * state_columns),
            row_bytes=4 * state_columns if rowwise else 0,
        )
        if prior:
            return contender
        assert engine.utility is not None
        floor = self.granularity.prior_occurrences * engine.utility.mean_gain(table.index)
        contender = replace(contender, floor=floor)
        if not self.normalize:
            return contender
        mean = mean_utility(contender)
        return contender if mean == 0 else replace(contender, weight=1.0 / mean)

    def _allowance(self, table: PrunedTable) -> int:
        """Bytes that the rows of one table bring into the common budget."""
        plain = plain_weight_bytes(table.logical, table.engine.options.dtype)
        if self.target is not None:
            return round(plain * (1.0 - self.target))
        assert self.budget is not None
        share = plain / sum(plain_weight_bytes(t.logical, t.engine.options.dtype) for t in self.tables)
        fixed = sum(_fixed_bytes(t) for t in self.tables)
        return int((self.budget - fixed) * share)

    def _check_budget(self) -> None:
        if self.budget is None:
            return
        fixed = sum(_fixed_bytes(table) for table in self.tables)
        if self.budget <= fixed:
            raise BudgetError(
                f"a budget of {self.budget:,} bytes is not above the {fixed:,} bytes that router and utilities of the"
                f" {len(self.tables)} selected tables take before any weight is stored: raise it, or select fewer"
            )

    def live_ratio(self) -> float:
        """Stored over plain weight bytes of the pruned tables."""
        live = sum(table_memory(t.engine, t.index).weights for t in self.tables)
        return live / sum(plain_weight_bytes(t.logical, t.engine.options.dtype) for t in self.tables)


def _fixed_bytes(table: PrunedTable) -> int:
    memory = table_memory(table.engine, table.index)
    return memory.router + memory.statistics


def _utility_reader(table: PrunedTable, *, prior: bool) -> ReadRows:
    utility, index, rows = table.engine.utility, table.index, table.logical.rows
    assert utility is not None
    if prior:
        return lambda start, stop: zipf_prior(start, stop, rows).unsqueeze(1).expand(-1, utility.parts)
    return lambda start, stop: utility.of_table(index)[start:stop]


class _Unchanged(TablePlan):
    """Leaves the rows of a table that is not pruned as they are."""

    def __init__(self) -> None:
        pass

    def begin(self) -> None:
        """Nothing to reset."""

    def codes(self, start: int, stop: int, current: Tensor) -> Tensor:
        """The present codes."""
        return current

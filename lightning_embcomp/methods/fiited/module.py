"""State of dimension pruning over the engines of a model: budgets, utilities, events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from lightning_embcomp.engine.host import HeldTable, TableShard, group_of
from lightning_embcomp.engine.memory import plain_weight_bytes, table_memory
from lightning_embcomp.engine.plan import MoveSummary
from lightning_embcomp.engine.routed import RoutedEmbeddings
from lightning_embcomp.engine.router import slabs
from lightning_embcomp.engine.statistics import RowUtility
from lightning_embcomp.methods.fiited.config import Granularity, Scope
from lightning_embcomp.methods.fiited.functional import zipf_prior
from lightning_embcomp.methods.fiited.plan import (
    CodePlan,
    Contender,
    EnginePlan,
    KnownCodes,
    ReadRows,
    Rows,
    TablePlan,
    solve,
    total_utility,
)


class BudgetError(ValueError):
    """A byte budget cannot be met."""


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
        tables: Sequence[HeldTable],
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
        self.group = group_of(tables)
        self.engines = list({id(shard.engine): shard.engine for table in tables for shard in table.shards}.values())
        for engine in self.engines:
            self._use_engine(engine)
        for host in {id(table.host): table.host for table in tables}.values():
            host.want_gradient_norms()
        self.check_budget()

    def _use_engine(self, engine: RoutedEmbeddings) -> None:
        names = ", ".join(t.name for t in self.tables if any(shard.engine is engine for shard in t.shards))
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

    def _new_utility(self, engine: RoutedEmbeddings) -> RowUtility:
        granularity = self.granularity
        mine = [t for t in self.tables if any(shard.engine is engine for shard in t.shards)]
        return RowUtility(
            engine.tables,
            parts=max(t.logical.chunks for t in mine) if granularity.layout == "chunks" else 1,
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
        for shard in (shard for table in self.tables for shard in table.shards):
            assert shard.engine.utility is not None
            shard.engine.utility.decay(shard.index, decay)
        return self._apply(prior=False, optimizers=optimizers)

    def _apply(self, *, prior: bool, optimizers: Sequence[torch.optim.Optimizer]) -> MoveSummary:
        plans = self._plans(prior=prior)
        total = MoveSummary(changed_rows=0, grown_rows=0, revived_rows=0, dropped_rows=0, rows=0)
        for engine in self.engines:
            per_table = [plans.get((id(engine), t)) or _Unchanged() for t in range(len(engine.tables))]
            total = total + engine.move(EnginePlan(per_table), optimizers)
        counts = torch.tensor([getattr(total, field.name) for field in fields(total)])
        return MoveSummary(**dict(zip((f.name for f in fields(total)), self.group.sum(counts).tolist(), strict=True)))

    def _plans(self, *, prior: bool) -> dict[tuple[int, int], CodePlan]:
        contenders = self._contenders(prior=prior)
        groups = [[i] for i in range(len(contenders))] if self.scope == "table" else [list(range(len(contenders)))]
        plans: dict[tuple[int, int], CodePlan] = {}
        for group in groups:
            solved = solve(
                [contenders[i] for i in group],
                sum(self._allowance(self.tables[i]) for i in group),
                self.group,
                falloff=self.granularity.falloff,
                hysteresis=0.0 if prior else self.granularity.hysteresis,
            )
            for i, mine in zip(group, solved, strict=True):
                table = self.tables[i]
                if table.host.is_cut_by_columns(table.index):
                    plans |= _same_everywhere(table, mine)
                else:
                    plans |= {(id(s.engine), s.index): plan for s, plan in zip(table.shards, mine, strict=True)}
        return plans

    def _contenders(self, *, prior: bool) -> list[Contender]:
        contenders = [self._contender(table, prior=prior) for table in self.tables]
        if prior:
            return contenders
        gains = self.group.sum(torch.stack([_gain(table) for table in self.tables]))
        credit = self.granularity.prior_occurrences
        floors = [credit * total / count if count else 0.0 for total, count in gains.tolist()]
        contenders = [replace(c, floor=floor) for c, floor in zip(contenders, floors, strict=True)]
        if not self.normalize:
            return contenders
        totals = self.group.sum(torch.tensor([total_utility(c) for c in contenders], dtype=torch.float64)).tolist()
        return [
            replace(c, weight=c.table.rows / total) if total else c for c, total in zip(contenders, totals, strict=True)
        ]

    def _contender(self, table: HeldTable, *, prior: bool) -> Contender:
        logical, options = table.logical, table.host.options
        counted = options.optimizer if self.budget is not None else None
        # Of a table that is cut by columns, the process with the first ones decides for all.
        deciding = table.primary_shards if table.host.is_cut_by_columns(table.index) else table.shards
        return Contender(
            table=logical,
            rows=[
                Rows(
                    count=shard.logical.rows,
                    codes=_code_reader(shard),
                    utility=_utility_reader(shard, logical.rows, prior=prior),
                    counts=shard.primary,
                )
                for shard in deciding
            ],
            owners=table.host.row_owners(table.index),
            chunk_bytes=logical.chunk_width * (options.dtype.itemsize + (4 * counted.per_weight if counted else 0)),
            row_bytes=4 * counted.per_row if counted else 0,
        )

    def _allowance(self, table: HeldTable) -> int:
        """Bytes that the rows of one table bring into the common budget."""
        plain = plain_weight_bytes(table.logical, table.host.options.dtype)
        if self.target is not None:
            return round(plain * (1.0 - self.target))
        assert self.budget is not None
        share = plain / sum(plain_weight_bytes(t.logical, t.host.options.dtype) for t in self.tables)
        return int((self.budget - self._fixed_bytes()) * share)

    def check_budget(self) -> None:
        """Raise if nothing is left for rows: again before training, when other methods keep state of the tables too.

        Raises:
            BudgetError: With the bytes that are needed.
        """
        if self.budget is None:
            return
        fixed = self._fixed_bytes()
        if self.budget <= fixed:
            raise BudgetError(
                f"a budget of {self.budget:,} bytes is not above the {fixed:,} bytes that router, utilities and"
                f" counters of the {len(self.tables)} selected tables take before any weight is stored: raise it, or"
                " select fewer"
            )

    def _fixed_bytes(self) -> int:
        """Bytes of router and utilities, over all processes."""
        memory = self._memory()
        return memory["router"] + memory["statistics"]

    def _memory(self) -> dict[str, int]:
        """Bytes of the pruned tables by kind, over all processes."""
        kinds = ("weights", "optimizer_state", "router", "statistics")
        mine = [table_memory(shard.engine, shard.index) for table in self.tables for shard in table.counted_shards]
        held = torch.tensor([sum(getattr(memory, kind) for memory in mine) for kind in kinds])
        return dict(zip(kinds, self.group.sum(held).tolist(), strict=True))

    def live_ratio(self) -> float:
        """Stored over plain weight bytes of the pruned tables."""
        plain = sum(plain_weight_bytes(t.logical, t.host.options.dtype) for t in self.tables)
        return self._memory()["weights"] / plain

    def held_bytes(self) -> int:
        """All bytes of the pruned tables, over all processes."""
        return sum(self._memory().values())


def _gain(table: HeldTable) -> Tensor:
    """Sum and count of what occurrences add to the utilities of a table, in this process."""
    found = torch.zeros(2, dtype=torch.float64)
    for shard in table.primary_shards:
        assert shard.engine.utility is not None
        found += shard.engine.utility.gain[shard.index].cpu()
    return found


def _code_reader(shard: TableShard) -> ReadRows:
    return lambda start, stop: shard.engine.router.read(shard.index, start, stop)[0]


def _utility_reader(shard: TableShard, rows: int, *, prior: bool) -> ReadRows:
    utility, first = shard.engine.utility, shard.first_row
    assert utility is not None
    if prior:
        device = utility.values.device
        return lambda start, stop: (
            zipf_prior(first + start, first + stop, rows).to(device).unsqueeze(1).expand(-1, utility.parts)
        )
    return lambda start, stop: utility.of_table(shard.index)[start:stop]


def _same_everywhere(table: HeldTable, plans: Sequence[TablePlan]) -> dict[tuple[int, int], CodePlan]:
    """Codes of a table that is cut by columns, from the process that decides to those that hold other columns."""
    rows = table.logical.rows
    codes = torch.zeros(rows, dtype=torch.uint8)
    for plan, shard in zip(plans, table.primary_shards, strict=True):
        plan.begin()
        for start, stop in slabs(rows):
            codes[start:stop] = plan.codes(start, stop, shard.engine.router.read(shard.index, start, stop)[0])
    codes = table.group.broadcast(codes, table.host.row_owners(table.index)[0])
    return {
        (id(shard.engine), shard.index): KnownCodes(codes, shard.logical.first_chunk, shard.logical.codes - 1)
        for shard in table.shards
    }


class _Unchanged:
    """Leaves the rows of a table that is not pruned as they are."""

    def begin(self) -> None:
        """Nothing to reset."""

    def codes(self, start: int, stop: int, current: Tensor) -> Tensor:
        """The present codes."""
        return current

"""The callback of dimension pruning: hooks in, events out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from lightning_embcomp.callback import CompressionCallback, Cuts, SetupError, steps_done
from lightning_embcomp.engine.layout import ChunkLayout, LogicalTable, fitting_chunks
from lightning_embcomp.engine.placement import CacheSettings, Placement, RowPlacement
from lightning_embcomp.methods.fiited.config import Granularity, PruningSchedule, Scope, check_target
from lightning_embcomp.methods.fiited.module import DimensionPruner
from lightning_embcomp.planners.footprint import TableFootprint
from lightning_embcomp.planners.pruning import PrunedTable, pruned_footprints
from lightning_embcomp.sizes import parse_bytes
from lightning_embcomp.tables import TableView


class DimensionPruning(CompressionCallback):
    """Prune embedding dimensions while training, so that tables take less memory from the first step on.

    Every row keeps as many leading column chunks as its utility (how often it is looked up, times how large its
    gradients are) is worth under one byte budget; utilities are measured all the time, and at every pruning event rows
    grow, shrink, vanish and come back. What is not stored takes no memory. A reconstruction of FIITED [1]_.

    Logged at every event: ``fiited/live_ratio`` (stored over plain weight bytes), ``fiited/bytes`` (all bytes held),
    ``fiited/churn`` (share of rows that changed), ``fiited/revived`` and ``fiited/dropped`` (rows). With table globs
    other than ``*`` the group is called ``fiited[globs]``.

    Args:
        target: Fraction of the embedding weight bytes to remove, from 0 to below 1. Give this or ``budget``.
        budget: Bytes for the selected tables with everything they need (weights, fused optimizer state, router,
            utilities), as a number or like ``2GB``.
        tables: Globs of the tables to prune; one that starts with ``!`` excludes. Tables whose dim is no multiple of 4
            are left as they are if only a wildcard chose them, and refused otherwise.
        scope: ``global`` compares the rows of all tables, ``table`` gives every table the same share.
        schedule: When events happen.
        granularity: What lives or dies, and how its worth is measured.
        normalize: Divide utilities by their table's mean before tables are compared (``scope: global``).
        placement: Where rows live on a GPU: ``device`` in its memory; ``managed`` in host memory that the GPU reaches
            by itself (unified memory), for tables larger than the device; ``managed_caching`` there too, with a cache
            of rows on the device. Needs tables with a fused optimizer, and holds for whole collections.
        cache: The cache of ``placement: managed_caching``.

    Raises:
        ValueError: If target or budget are missing, both given, or out of range, or the placement is unknown.

    Example:
        >>> callback = DimensionPruning(target=0.8, tables="t_*")
        >>> callback.state_key
        'DimensionPruning[t_*]'

    References:
        .. [1] FIITED: Fine-grained embedding dimension optimization during training for recommender systems, 2024,
           https://arxiv.org/abs/2401.04408
    """

    owns = "width"
    follows_shards = True
    devices = ("cpu", "cuda")
    sharded_devices = ("cpu", "cuda")

    def __init__(
        self,
        target: float | None = None,
        budget: int | str | None = None,
        tables: str | Sequence[str] = "*",
        scope: Scope = "global",
        schedule: PruningSchedule | None = None,
        granularity: Granularity | None = None,
        normalize: bool = False,
        placement: Placement = "device",
        cache: CacheSettings | None = None,
    ) -> None:
        super().__init__(tables)
        if (target is None) == (budget is None):
            raise ValueError("DimensionPruning: give either target (fraction of bytes to remove) or budget (bytes)")
        if scope not in ("global", "table"):
            raise ValueError(f"DimensionPruning: scope must be 'global' or 'table', not {scope!r}")
        if normalize and scope == "table":
            raise ValueError(
                "DimensionPruning: normalize has no effect with scope='table', where tables do not compete"
            )
        if cache is not None and placement != "managed_caching":
            raise ValueError(
                f"DimensionPruning: cache has no effect with placement={placement!r}, only with 'managed_caching'"
            )
        self.row_placement = RowPlacement(kind=placement, cache=cache or CacheSettings())
        self.target = None if target is None else check_target(target)
        self.budget = None if budget is None else parse_bytes(budget)
        self.scope: Scope = scope
        self.schedule = schedule or PruningSchedule()
        self.granularity = granularity or Granularity()
        self.normalize = normalize
        self.pruner: DimensionPruner | None = None
        self._events = 0
        self._last_step = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "pruner": None}

    def check_trainer(self, trainer: pl.Trainer) -> None:
        """Refuse trainers that the method cannot work in, see :meth:`CompressionCallback.check_trainer`."""
        super().check_trainer(trainer)
        device = trainer.strategy.root_device
        if self.row_placement.kind != "device" and device.type != "cuda":
            raise SetupError(
                f"{self.state_key}: placement={self.row_placement.kind!r} is memory that a GPU shares with its host,"
                f" but this run trains on {device}. Leave placement out, or use Trainer(accelerator='gpu')"
            )

    def table_cuts(self, tables: Sequence[TableView]) -> Cuts:
        """Cut every table into as many chunks as its dim allows, up to those of the settings.

        With layout ``chunks`` the tables of a collection share one number, as their utilities share one shape.
        """
        cuts: dict[str, tuple[int, ChunkLayout]] = {}
        for table in tables:
            layout = self.granularity.layout
            beside = [other.dim for other in tables if other.host == table.host] if layout == "chunks" else [table.dim]
            chunks = fitting_chunks(math.gcd(*beside), self.granularity.chunks)
            LogicalTable(name=table.name, rows=table.rows, dim=table.dim, chunks=chunks, layout=layout)
            cuts[table.name] = (chunks, layout)
        return cuts

    def on_tables_ready(self, fresh: bool) -> None:
        """Start the pruner; new tables get their first rows."""
        self._events = 0
        self._report_cuts()
        self.pruner = DimensionPruner(
            self.owned,
            target=self.target,
            budget=self.budget,
            scope=self.scope,
            granularity=self.granularity,
            normalize=self.normalize,
        )
        if fresh:
            self.pruner.start()

    def _report_cuts(self) -> None:
        fewer = [table for table in self.owned if table.logical.chunks < self.granularity.chunks]
        if fewer:
            cuts = "; ".join(
                f"{table.name!r} of dim {table.logical.dim} into {table.logical.chunks} × {table.logical.chunk_width}"
                for table in fewer
            )
            rank_zero_info(f"{self.state_key}: fewer chunks than chunks={self.granularity.chunks} fit: {cuts} columns")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Continue the step count of a resumed run; a new run starts at its first step."""
        self._last_step = steps_done(trainer, pl_module)
        if self.pruner is not None:
            self.pruner.check_budget()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,  # noqa: ANN401 - whatever training_step returns
        batch: Any,  # noqa: ANN401 - whatever the loader yields
        batch_idx: int,
    ) -> None:
        """Prune after the optimizer step, when the schedule says so."""
        step = steps_done(trainer, pl_module)
        if step == self._last_step or self.pruner is None:
            return
        due = any(self.schedule.is_event(s) for s in range(self._last_step + 1, step + 1))
        self._last_step = step
        if not due:
            return
        moved = self.pruner.step(self.schedule.decay, trainer.optimizers)
        self._events += 1
        group = "fiited" if self.patterns == ("*",) else f"fiited[{','.join(self.patterns)}]"
        pl_module.log_dict(
            {
                f"{group}/live_ratio": self.pruner.live_ratio(),
                f"{group}/bytes": float(self.pruner.held_bytes()),
                f"{group}/churn": moved.churn,
                f"{group}/revived": float(moved.revived_rows),
                f"{group}/dropped": float(moved.dropped_rows),
            }
        )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must find again; utilities and rows are part of the module's state."""
        return {
            "events": self._events,
            "target": self.target,
            "budget": self.budget,
            "chunks": self.granularity.chunks,
            "layout": self.granularity.layout,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue counting events.

        Raises:
            SetupError: If the checkpoint was cut differently.
        """
        saved = (state_dict["chunks"], state_dict["layout"])
        if saved != (self.granularity.chunks, self.granularity.layout):
            raise SetupError(
                f"{self.state_key}: the checkpoint was written with chunks={saved[0]}, layout={saved[1]!r}; this run"
                f" has chunks={self.granularity.chunks}, layout={self.granularity.layout!r}. Use the saved settings"
            )
        self._events = int(state_dict["events"])

    def footprints(self, tables: Sequence[TableView]) -> Mapping[str, TableFootprint]:
        """What stays of the tables as a run starts: the rows that come first, and most of their leading chunks."""
        cuts = self.table_cuts(tables)
        return pruned_footprints(
            [PrunedTable.of(table, cuts[table.name][0]) for table in tables],
            target=self.target,
            budget=self.budget,
            layout=self.granularity.layout,
            falloff=self.granularity.falloff,
            shared=self.scope == "global",
        )

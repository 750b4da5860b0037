"""The callback of mixed precision: hooks in, phases out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_embcomp.callback import CompressionCallback, SetupError, steps_done
from lightning_embcomp.engine.attached import RowValues
from lightning_embcomp.engine.host import EngineHost, HeldTable, group_of
from lightning_embcomp.engine.plan import SamePlan
from lightning_embcomp.methods.mpe.assembly import mean_magnitudes, new_state, put_in
from lightning_embcomp.methods.mpe.config import (
    PrecisionSearch,
    RowQuantization,
    check_bits,
    check_ratio,
)
from lightning_embcomp.methods.mpe.exchange import counts_of_all
from lightning_embcomp.methods.mpe.functional import is_falling
from lightning_embcomp.methods.mpe.groups import GroupBounds
from lightning_embcomp.methods.mpe.module import RowQuantizer
from lightning_embcomp.methods.mpe.state import RoundingState
from lightning_embcomp.methods.mpe.training import QuantizerTraining
from lightning_embcomp.planners.footprint import TableFootprint
from lightning_embcomp.surgery import reinitialise, table_configs
from lightning_embcomp.tables import TableView


class MixedPrecisionSearch(CompressionCallback):
    """Search the bits that each group of rows needs, and train the tables at them.

    One fit has two phases. In the *search* phase every group of rows, cut by falling frequency, measures what each
    candidate width would do to the loss. Then widths are chosen for one byte budget, rows of width 0 are dropped from
    memory, and the *retrain* phase trains the tables rounded to their widths, which is how exported tables will serve
    them. After MPE [1]_; ``search.method: softmax`` is the search of the paper.

    Logged: ``mpe/average_bits`` and ``mpe/searching`` at every step.

    Args:
        ratio: Size of the float32 tables over that of their rounded values to reach. Give this, ``penalty`` or
            ``bits``.
        penalty: Factor of the paper's penalty on bits, for ``search.method: softmax``, instead of a ratio.
        bits: One width for all rows, without a search: quantisation-aware training.
        tables: Globs of the tables to round; one that starts with ``!`` excludes.
        search: How widths are searched.
        quantization: How values are rounded.

    Raises:
        ValueError: If none or several of ratio, penalty and bits are given, or one is out of range.

    Example:
        >>> MixedPrecisionSearch(ratio=40).state_key
        'MixedPrecisionSearch[*]'

    References:
        .. [1] Mixed-precision embeddings for large-scale recommendation models, 2024,
           https://arxiv.org/abs/2409.20305
    """

    owns = "precision"
    follows_shards = True
    devices = ("cpu", "cuda")

    def __init__(
        self,
        ratio: float | None = None,
        penalty: float | None = None,
        bits: int | None = None,
        tables: str | Sequence[str] = "*",
        search: PrecisionSearch | None = None,
        quantization: RowQuantization | None = None,
    ) -> None:
        super().__init__(tables)
        if sum(given is not None for given in (ratio, penalty, bits)) != 1:
            raise ValueError(
                "MixedPrecisionSearch: give one of ratio (how much smaller), penalty (on bits, as in the paper) and"
                " bits (one width for all rows)"
            )
        self.search = search or PrecisionSearch()
        if penalty is not None and self.search.method != "softmax":
            raise ValueError("MixedPrecisionSearch: penalty works with search.method='softmax' only; give ratio")
        if bits is not None and search is not None:
            raise ValueError("MixedPrecisionSearch: search has no effect with bits, where every row has one width")
        self.ratio = None if ratio is None else check_ratio(ratio, self.search.widths)
        self.penalty = penalty
        self.bits = None if bits is None else check_bits(bits)
        self.quantization = quantization or RowQuantization()
        self.training: QuantizerTraining | None = None
        self._saved: dict[str, Any] | None = None
        self._data: Any = None
        self._fitting = False
        self._last_step = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "training": None, "_data": None}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Round the tables; a search needs to know how often their ids occur."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, MixedPrecisionSearch):
                callback._data = getattr(trainer, "datamodule", None)
                callback._fitting = stage == "fit"
        if stage == "fit":
            self.owned = []  # a fit starts its optimizers anew, those of the steps and logits as well
        super().setup(trainer, pl_module, stage)

    def on_tables_ready(self, fresh: bool) -> None:
        """Put quantizers between the rows and their use."""
        group = group_of(self.owned)
        for table in self.owned:
            self._check_columns(table)
        by_host: dict[int, list[HeldTable]] = {}
        for table in self.owned:
            by_host.setdefault(id(table.host), []).append(table)
        self.training = QuantizerTraining(
            [self._state(tables) for tables in by_host.values()],
            self.quantization,
            self.search,
            ratio=self.ratio,
            penalty=self.penalty,
            group=group,
        )

    def _check_columns(self, table: HeldTable) -> None:
        """Refuse what is unknown of rows of which a process holds some columns only."""
        if self.quantization.offset and table.logical.chunks > 1:
            raise SetupError(
                f"{self.state_key}: quantization.offset would fill the columns of {table.name!r} that dimension"
                " pruning cuts: leave the offset out"
            )
        if not table.host.is_cut_by_columns(table.index):
            return
        mend = f"shard it by rows or as a whole: sharding={{{table.logical.name!r}: 'row_wise'}}"
        if self.searches and self.search.method == "sensitivity":
            raise SetupError(
                f"{self.state_key}: table {table.name!r} is sharded by columns, but what rounding does to the loss is a"
                f" product over whole rows, which no process sees; {mend}, or search with search.method='softmax'"
            )
        if self.quantization.offset:
            raise SetupError(
                f"{self.state_key}: table {table.name!r} is sharded by columns, which quantization.offset does not"
                f" follow: leave the offset out, or {mend}"
            )

    def _state(self, tables: Sequence[HeldTable]) -> RoundingState:
        """State of the tables of one collection; one that was rounded by an earlier run keeps its own."""
        host, group = tables[0].host, tables[0].group
        found = [engine.values for engine in host.engines if engine.values is not None]
        rounded = bool(group.sum(torch.tensor([len(found)])))
        for values in found:
            self._check_same(values, tables)
        if found:
            values = found[0]
            assert isinstance(values, RowQuantizer)
            return values.state
        rows = [table.rows for table in host.logical_tables]
        indices = [table.index for table in tables]
        largest = [rows[t] for t in indices]
        counts: dict[int, Tensor] = {}
        if self.bits is None:
            largest = [-(-sum(owned.logical.rows for owned in self.owned) // self.search.groups)] * len(indices)
            counts = {} if rounded else self._all_counts(tables)
        groups = GroupBounds(rows, indices, largest)
        unordered = {t: groups.by_frequency(t, c) for t, c in counts.items() if not is_falling(c)}
        configs = table_configs(host)
        state = new_state(
            tables,
            groups,
            self.search.widths if self.bits is None else (self.bits,),
            [1] * len(rows) if configs is None else [len(config.feature_names) for config in configs],
            offset=self.quantization.offset,
            temperature=self.search.temperature if self.search.method == "softmax" else None,
        )
        state.purpose = self._purpose
        for t, of_rows in counts.items():
            state.counts[groups.of_table(t)] = groups.sum_rows(t, of_rows.double(), unordered.get(t))
        if not rounded:  # else other processes hold the tables, and hand their state over when training starts
            state.start(mean_magnitudes(tables))
        if self.bits is not None:
            state.fix(torch.full_like(state.bits, self.bits))
        put_in(host, state, unordered)
        return state

    def _check_same(self, found: RowValues, tables: Sequence[HeldTable]) -> None:
        """Refuse an earlier rounding that differs from what is asked for."""
        widths = self.search.widths if self.bits is None else (self.bits,)
        name = tables[0].name
        if not isinstance(found, RowQuantizer) or sorted(found.state.groups.bounds) != sorted(t.index for t in tables):
            raise SetupError(
                f"{self.state_key}: other tables of the collection that holds {name!r} are rounded by another callback"
                " already: give both the same tables, or put the tables into a collection of their own"
            )
        if found.state.widths.tolist() != list(widths):
            raise SetupError(
                f"{self.state_key}: table {name!r} is rounded with widths {found.state.widths.tolist()}, but"
                f" {list(widths)} are asked for: use the settings of the first run, or start from a plain module"
            )
        if found.state.purpose != self._purpose:
            raise SetupError(
                f"{self.state_key}: table {name!r} is rounded for {found.state.purpose}, but {self._purpose} is asked"
                " for: use the settings of the first run, or start from a plain module"
            )

    def _all_counts(self, tables: Sequence[HeldTable]) -> dict[int, Tensor]:
        """Occurrences of the rows of each table in the training data of all processes, where they are needed."""
        found = {table.index: self._row_counts(table) for table in tables}
        return {t: counts_of_all(c, tables[0].group) for t, c in found.items() if c is not None}

    def _row_counts(self, table: HeldTable) -> Tensor | None:
        """Occurrences of the rows of a table in the training data, or None if ids are taken as ranks."""
        if self.search.frequency == "rank":
            return None
        configs = table_configs(table.host)
        features = configs[table.index].feature_names if configs else []
        if not self._fitting and not (hasattr(self._data, "id_counts") and features):
            return None  # a checkpoint brings its groups along
        if not hasattr(self._data, "id_counts") or not features:
            raise SetupError(
                f"{self.state_key}: how often the ids of table {table.name!r} occur is not known: the data module needs"
                " a method id_counts(feature) -> tensor of counts per id. If ids are numbered by falling frequency, set"
                " search.frequency='rank'"
            )
        counts = sum(self._data.id_counts(feature) for feature in features)
        rows = table.logical.rows
        if not isinstance(counts, Tensor) or counts.shape != (rows,):
            raise SetupError(
                f"{self.state_key}: id_counts of {features} gives {getattr(counts, 'shape', type(counts))} instead of"
                f" one count for each of the {rows} rows of table {table.name!r}"
            )
        return counts

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Continue a saved run."""
        assert self.training is not None
        self._last_step = steps_done(trainer, pl_module)
        self.training.synchronise()
        if self._saved is not None:
            self.training.load_state_dict(self._saved)
            self._saved = None

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,  # noqa: ANN401 - whatever training_step returns
        batch: Any,  # noqa: ANN401 - whatever the loader yields
        batch_idx: int,
    ) -> None:
        """Train the settings after an optimizer step; end the search when its steps are over."""
        step = steps_done(trainer, pl_module)
        if self.training is None or step == self._last_step:
            return
        self._last_step = step
        self.training.step()
        searching = self.training.searching
        if searching and self.search.steps is not None and step >= self.search.steps:
            self._end_search(trainer)
        # Tensors of the device: to bring a number there, the host would wait.
        bits = self.training.expected_bits().float()
        pl_module.log_dict(
            {f"{self._group}/average_bits": bits, f"{self._group}/searching": torch.full_like(bits, float(searching))}
        )

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End the search when its epochs are over."""
        if self.training is None or not self.training.searching or self.search.steps is not None:
            return
        if trainer.current_epoch >= self.search.epochs:
            self._end_search(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose the widths before the last checkpoint of a run that ends with its search is written."""
        if trainer.max_epochs is not None and 0 <= trainer.max_epochs <= trainer.current_epoch + 1:
            self.on_train_end(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose the widths of a run that ends with its search; there is no retrain phase."""
        if self.training is not None and self.training.searching:
            self.training.settle(self.training.choose())
            self._drop_rows(trainer)

    def _end_search(self, trainer: pl.Trainer) -> None:
        assert self.training is not None
        self.training.settle(self.training.choose())
        self._drop_rows(trainer)
        if not self.search.reset:
            return
        for host in self._hosts:
            owned = [table.index for table in self.owned if table.host is host]
            for t in owned:
                reinitialise(host, t, trainer.optimizers)
            if len(owned) == len(host.logical_tables):
                for engine in host.engines:
                    engine.clear_row_state(None, trainer.optimizers)

    @property
    def _hosts(self) -> list[EngineHost]:
        return list({id(owned.host): owned.host for owned in self.owned}.values())

    def _drop_rows(self, trainer: pl.Trainer) -> None:
        """Free the rows that need no bits."""
        for engine in (engine for host in self._hosts for engine in host.engines):
            engine.move(SamePlan(), trainer.optimizers)

    @property
    def searches(self) -> bool:
        """Whether a fit starts with a search phase."""
        return self.bits is None

    @property
    def _purpose(self) -> str:
        """What the settings of a quantizer were made for."""
        what = {"bits": self.bits, "ratio": self.ratio, "penalty": self.penalty}
        given = " and ".join(f"{name}={value:g}" for name, value in what.items() if value is not None)
        searched = f", search.method={self.search.method!r}" if self.searches else ""
        return f"{given}{searched}, quantization.offset={self.quantization.offset}"

    @property
    def _group(self) -> str:
        return "mpe" if self.patterns == ("*",) else f"mpe[{','.join(self.patterns)}]"

    def state_dict(self) -> dict[str, Any]:
        """State of the optimizer of steps and logits; the settings themselves are saved with the tables."""
        return {} if self.training is None else {**self.training.state_dict(), "purpose": self._purpose}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the saved state until the tables are restored.

        Raises:
            SetupError: If the checkpoint was written with settings that mean something else.
        """
        saved = state_dict.get("purpose", self._purpose)
        if saved != self._purpose:
            raise SetupError(
                f"{self.state_key}: the checkpoint was written with {saved}; this run has {self._purpose}. Use the"
                " saved settings"
            )
        self._saved = state_dict or None

    def footprints(self, tables: Sequence[TableView]) -> Mapping[str, TableFootprint]:
        """All weights, since rows without bits are dropped only after the search, and the group of every row."""
        by_rank = not self.searches or self.search.frequency == "rank"
        bits = 32 / self.ratio if self.ratio is not None else float(self.bits or 32)
        # Groups are int16, one for 64 rows where ids are numbered by falling frequency.
        footprint = TableFootprint(row_bytes=2 / 64 if by_rank else 2.0, serving_bits=bits)
        return {table.name: footprint for table in tables}

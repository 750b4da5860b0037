"""Rounding between the rows of one engine and their use."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_embcomp.engine.attached import RowValues
from lightning_embcomp.engine.bags import owners
from lightning_embcomp.engine.lookups import unscaled
from lightning_embcomp.engine.precision import MAX_WIDTH, SEARCHED, TablePrecision
from lightning_embcomp.engine.routed import RoutedEmbeddings
from lightning_embcomp.kernels.quantize import Rounding, RoundingGradients, round_rows, round_rows_backward
from lightning_embcomp.kernels.types import BagLayout
from lightning_embcomp.methods.mpe.groups import RowGroups
from lightning_embcomp.methods.mpe.state import ALL_WIDTHS, SEARCH_TENSORS, RoundingState

_ALWAYS = ("bounds", "bits", "steps", "log_steps", "offset", "magnitude")
_GROUP = "group"


class RowQuantizer(RowValues):
    """Rounds rows on their way out of an engine, and collects what the settings of the rounding are trained by.

    Args:
        engine: The engine.
        groups: Groups of the rows that it holds.
        state: Widths, steps and offsets of the whole tables.
        counts: Whether what it collects is to be counted: of copies of a table, one does.
    """

    movable = True

    def __init__(
        self, engine: RoutedEmbeddings, groups: RowGroups, state: RoundingState, *, counts: bool = True
    ) -> None:
        self.groups, self.state = groups, state
        self._counts = counts
        self._tables = tuple(engine.feature_tables)
        self._features = tuple(self._tables[:f].count(t) for f, t in enumerate(self._tables))
        self._dims = tuple(engine.tables[t].dim for t in self._tables)
        self._rounds = self._by_number(engine.options.device)
        self._engine = engine

    def carry(self, device: torch.device) -> None:
        """See :meth:`lightning_embcomp.engine.attached.TableState.carry`."""
        self.groups.carry(device)
        self.state.carry(device)
        self._rounds = self._by_number(device)

    def _by_number(self, device: torch.device) -> list[tuple[Tensor, Tensor]]:
        """Features with groups and their whole tables, by the number of the feature among those of its table."""
        found = []
        for number in range(max(self._features) + 1):
            mine = [f for f, n in enumerate(self._features) if n == number and self.groups.has(self._tables[f])]
            tables = [self.groups.parts[self._tables[f]].table for f in mine]
            features, of_tables = (torch.tensor(part, dtype=torch.int64, device=device) for part in (mine, tables))
            found.append((features, of_tables))
        return found

    @property
    def bits(self) -> Tensor:
        """Width of every group of the whole tables, uint8 ``(G,)``."""
        return self.state.bits

    @property
    def searching(self) -> bool:
        """Whether widths are still to be chosen."""
        return self.state.searching

    def apply(self, rows: Tensor, indices: Tensor, layout: BagLayout, *, bags: int, training: bool) -> Tensor:
        """See :meth:`lightning_embcomp.engine.attached.RowValues.apply`."""
        state = self.state
        feature = owners(layout.bag_start, rows.shape[0])
        if len(set(self._dims)) > 1:
            # Lookups of tables of different dim may leave columns beyond those of a table as they were.
            beyond = torch.arange(rows.shape[1], device=rows.device) >= layout.width[feature].unsqueeze(1)
            rows.detach().masked_fill_(beyond, 0.0)
        alone = len(self.groups.parts) == 1
        rounding = Rounding(
            group=self.groups.of_ids(indices, None if alone else layout.table[feature]),
            table=state.groups.table,
            widths=state.widths,
            shares=state.shares,
            steps=state.steps[:, state.widths.clamp(max=MAX_WIDTH)],
            offset=state.offset[:, : rows.shape[1]],
        )
        counting = training and torch.is_grad_enabled() and self._counts
        if counting and state.measures:
            self._track_magnitude(rows.detach(), feature)
        out: Tensor = _RoundRows.apply(rows, rounding, self if counting else None, bags)
        return out

    def _track_magnitude(self, rows: Tensor, feature: Tensor) -> None:
        per_row = rows.abs().mean(1).double()
        sums = torch.zeros(len(self._features), 2, dtype=torch.float64, device=rows.device)
        sums.index_add_(0, feature, torch.stack([per_row, torch.ones_like(per_row)], 1))
        for number, (features, tables) in enumerate(self._rounds):
            self.state.observe_magnitudes(tables, number, sums[features], rows.shape[1])

    def observe(self, sums: RoundingGradients, bags: int) -> None:
        """Add up the gradients of one backward pass; see :meth:`RoundingState.observe`."""
        missing, scaler = self.state.offset.shape[1] - sums.offset.shape[1], self._engine.loss_scaler
        sums = RoundingGradients(
            shares=unscaled(sums.shares, scaler),
            errors=unscaled(sums.errors, scaler, power=2),
            steps=unscaled(sums.steps, scaler),
            offset=unscaled(pad(sums.offset, (0, missing)), scaler),
        )
        self.state.observe(sums, bags)

    def precision(self, table: int) -> TablePrecision | None:
        """See :meth:`lightning_embcomp.engine.attached.RowValues.precision`."""
        if not self.groups.has(table):
            return None
        part, state = self.groups.parts[table], self.state
        bits = state.bits[state.groups.of_table(part.table)].cpu()
        if bool((bits == SEARCHED).any()):
            return None
        per_row = self.groups.per_row(table)
        return TablePrecision(
            bounds=self.groups.local_bounds(table) if per_row is None else state.groups.bounds[part.table],
            bits=bits,
            steps={width: float(step) for width, step in enumerate(state.steps[part.table].tolist()) if width},
            offset=state.offset[part.table, part.first_column : part.first_column + part.dim].cpu(),
            group=per_row,
        )

    def tensors(self, table: int) -> dict[str, Tensor]:
        """See :meth:`lightning_embcomp.engine.attached.TableState.tensors`."""
        if not self.groups.has(table):
            return {}
        t, state = self.groups.parts[table].table, self.state
        mine = state.groups.of_table(t)
        found = {
            "bounds": state.groups.bounds[t],
            "bits": state.bits[mine],
            "steps": state.steps[t],
            "log_steps": state.log_steps[t],
            "offset": state.offset[t, : state.dims[t]],
            "magnitude": state.magnitude[t : t + 1],
        }
        per_row = self.groups.per_row(table)
        if per_row is not None:
            found[_GROUP] = per_row
        if state.holds_search:
            found |= {name: getattr(state, name)[mine] for name in SEARCH_TENSORS}
        return found

    def row_tensors(self, table: int) -> frozenset[str]:
        """See :meth:`lightning_embcomp.engine.attached.TableState.row_tensors`."""
        return frozenset({_GROUP} if self.groups.has(table) else ())

    def table_bytes(self, table: int) -> int:
        """See :meth:`lightning_embcomp.engine.attached.TableState.table_bytes`."""
        if not self.groups.has(table):
            return 0
        per_row = self.groups.per_row(table)
        held = super().table_bytes(table) - (0 if per_row is None else per_row.numel() * per_row.element_size())
        return held + self.groups.lookup_bytes(table)

    def held(self, tables: int) -> list[Tensor]:
        """See :meth:`lightning_embcomp.engine.attached.TableState.held`."""
        return [*super().held(tables), self.groups.lookup]

    def names(self, table: int, saved: Collection[str]) -> set[str]:
        """See :meth:`lightning_embcomp.engine.attached.TableState.names`."""
        if not self.groups.has(table):
            return set()
        return {*_ALWAYS} | ({_GROUP} & set(saved)) | (set(SEARCH_TENSORS) if "error" in saved else set())

    def misfit(self, table: int, saved: Mapping[str, Tensor]) -> str | None:
        """See :meth:`lightning_embcomp.engine.attached.TableState.misfit`."""
        if not self.groups.has(table):
            return None
        part = self.groups.parts[table]
        bounds, widths = self.state.groups.bounds[part.table], self.state.widths.tolist()
        if not torch.equal(saved["bounds"].cpu(), bounds):
            return (
                f"the rows were cut into {saved['bounds'].numel() - 1} groups, now into {bounds.numel() - 1} or others:"
                " use the saved search.groups and tables"
            )
        unknown = set(saved["bits"].tolist()) - {*widths, SEARCHED}
        if unknown:
            return f"rows have {sorted(unknown)} bits, which are not among the widths {widths}: use the saved settings"
        n = bounds.numel() - 1
        sizes: dict[str, tuple[int, ...]] = {
            "bounds": (n + 1,),
            "bits": (n,),
            "steps": (ALL_WIDTHS,),
            "log_steps": (ALL_WIDTHS,),
            "offset": (self.state.dims[part.table],),
        }
        sizes |= {"magnitude": (1,), _GROUP: (part.rows,), "logits": (n, len(widths)), "error": (n, len(widths))}
        for name, tensor in saved.items():
            if tuple(tensor.shape) != sizes.get(name, (n,)):
                return f"{name} has shape {tuple(tensor.shape)} instead of {sizes.get(name, (n,))}"
        return None

    def prepare(self, table: int, saved: Mapping[str, Tensor]) -> None:
        """See :meth:`lightning_embcomp.engine.attached.TableState.prepare`."""
        if not self.groups.has(table):
            return
        self.groups.set_per_row(table, _GROUP in saved)
        if ("error" in saved) != self.state.holds_search:
            self.state.hold_search("error" in saved)

    def restored(self) -> None:
        """See :meth:`lightning_embcomp.engine.attached.TableState.restored`."""
        self.state.refresh()


class _RoundRows(torch.autograd.Function):
    """Rounding with straight-through gradients."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, rounding: Rounding, quantizer: RowQuantizer | None, bags: int) -> Tensor:  # noqa: ANN401
        """Round; ``quantizer`` takes the gradients of the settings."""
        ctx.rounding, ctx.quantizer, ctx.bags = rounding, quantizer, bags
        ctx.save_for_backward(rows)
        return round_rows(rows, rounding)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # noqa: ANN401
        """Hand on what is inside the range of the quantizers."""
        quantizer: RowQuantizer | None = ctx.quantizer
        row_grad, sums = round_rows_backward(
            grads[0], ctx.saved_tensors[0], ctx.rounding, quantizer is not None and quantizer.searching
        )
        if quantizer is not None:
            quantizer.observe(sums, ctx.bags)
        return row_grad, None, None, None

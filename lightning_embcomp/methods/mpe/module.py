"""State of mixed precision over one engine: groups, widths, steps, and what the search has measured."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_embcomp.engine.attached import RowValues
from lightning_embcomp.engine.precision import MAX_WIDTH, SEARCHED, TablePrecision
from lightning_embcomp.engine.routed import RoutedEmbeddings
from lightning_embcomp.engine.router import SLAB
from lightning_embcomp.kernels.quantize import Rounding, RoundingGradients, round_rows, round_rows_backward
from lightning_embcomp.methods.mpe.functional import half_steps, initial_steps
from lightning_embcomp.methods.mpe.groups import RowGroups

_ALL_WIDTHS = MAX_WIDTH + 1  # steps are kept by width, so that a table can be read without the settings
_MAGNITUDE_MEMORY = 0.99
_SEARCH = ("logits", "error", "counts")  # held while widths are searched


class RowQuantizer(RowValues):
    """Rounds rows on their way out of an engine, and collects what the settings of the rounding are trained by.

    Args:
        engine: The engine.
        groups: Groups of the rows of its owned tables.
        widths: Candidate widths, rising.
        offset: Whether columns have trained offsets.
        temperature: While widths are searched, rows are a mixture of all candidates by the softmax of their logits over
            this temperature; None rounds them to the largest width, and measures what the others would do.
    """

    def __init__(
        self,
        engine: RoutedEmbeddings,
        groups: RowGroups,
        widths: Sequence[int],
        *,
        offset: bool = False,
        temperature: float | None = None,
    ) -> None:
        self.groups = groups
        self.temperature = temperature
        self.purpose: object = None
        self.widths = torch.tensor(list(widths))
        self.trains_offset = offset
        self._tables = tuple(engine.feature_tables)
        self.dims = tuple(table.dim for table in engine.tables)
        n_groups, n_tables = groups.table.numel(), len(engine.tables)
        self.bits = torch.full((n_groups,), SEARCHED, dtype=torch.uint8)
        self.magnitude = torch.tensor([_mean_magnitude(engine, t) for t in range(n_tables)])
        self.log_steps = torch.zeros(n_tables, _ALL_WIDTHS)
        self.offset = torch.zeros(n_tables, max(self.dims))
        self.logits = torch.zeros(n_groups, len(widths))
        self.error = torch.zeros(n_groups, len(widths), dtype=torch.float64)
        self.counts = torch.ones(n_groups, dtype=torch.float64)
        self.sums: RoundingGradients | None = None
        self.steps = torch.zeros(n_tables, _ALL_WIDTHS)
        self.start_steps()
        self.refresh_shares()

    @property
    def measures(self) -> bool:
        """Whether the search adds up what other widths would do."""
        return self.searching and self.temperature is None

    @property
    def searching(self) -> bool:
        """Whether widths are still to be chosen."""
        return bool((self.bits == SEARCHED).any())

    def start_steps(self) -> None:
        """Set the steps to suit the magnitude of the rows."""
        self.log_steps.copy_(initial_steps(self.magnitude, torch.arange(_ALL_WIDTHS)).log())
        self.refresh_steps()

    def refresh_steps(self) -> None:
        """Bring the steps that rounding uses up to date with their logarithms."""
        self.steps = half_steps(self.log_steps)

    def fix(self, bits: Tensor) -> None:
        """Settle the width of every group, and let go of what the search measured.

        Args:
            bits: uint8 ``(G,)``, each one of the candidates.
        """
        self.bits.copy_(bits)
        self._hold_search(False)
        self.refresh_shares()

    def refresh_shares(self) -> None:
        """Weigh the candidates as bits or logits say."""
        if not self.searching:
            self.shares = (self.bits.long().unsqueeze(1) == self.widths).float()
        elif self.temperature is not None:
            self.shares = torch.softmax(self.logits / self.temperature, 1)
        else:
            self.shares = torch.zeros_like(self.logits)
            self.shares[:, -1] = 1.0

    def _hold_search(self, hold: bool) -> None:
        """Make room for what only a search needs, or let it go."""
        size = (self.bits.numel() if hold else 0, self.widths.numel())
        self.logits = torch.zeros(size)
        self.error = torch.zeros(size, dtype=torch.float64)
        self.counts = torch.ones(size[0], dtype=torch.float64)

    def apply(
        self, rows: Tensor, indices: Tensor, ids_per_feature: Sequence[int], *, bags: int, training: bool
    ) -> Tensor:
        """See :meth:`lightning_embcomp.engine.attached.RowValues.apply`."""
        rounding = Rounding(
            group=self.groups.of_ids(indices, self._tables, ids_per_feature),
            table=self.groups.table,
            widths=self.widths,
            shares=self.shares,
            steps=self.steps[:, self.widths.clamp(max=MAX_WIDTH)],
            offset=self.offset,
        )
        training = training and torch.is_grad_enabled()
        if training and self.measures:
            self._track_magnitude(rows.detach(), ids_per_feature)
        out: Tensor = _RoundRows.apply(rows, rounding, self if training else None, bags)
        return out

    def _track_magnitude(self, rows: Tensor, ids_per_feature: Sequence[int]) -> None:
        per_row = rows.abs().mean(1)
        for table, values in zip(self._tables, per_row.split(list(ids_per_feature)), strict=True):
            if values.numel():
                mean = float(values.mean()) * rows.shape[1] / self.dims[table]
                self.magnitude[table] += (1 - _MAGNITUDE_MEMORY) * (mean - float(self.magnitude[table]))

    def observe(self, sums: RoundingGradients, bags: int) -> None:
        """Add up the gradients of one backward pass.

        Args:
            sums: From :func:`lightning_embcomp.kernels.quantize.round_rows_backward`.
            bags: Samples of the batch, over which the loss was averaged.
        """
        if self.measures:
            self.error += sums.errors.double() * bags
        if self.sums is None:
            self.sums = sums
        else:
            for name in ("shares", "steps", "offset"):
                getattr(self.sums, name).add_(getattr(sums, name))

    def take_sums(self) -> RoundingGradients | None:
        """Gradients since the last call."""
        sums, self.sums = self.sums, None
        return sums

    def precision(self, table: int) -> TablePrecision | None:
        """See :meth:`lightning_embcomp.engine.attached.RowValues.precision`."""
        if table not in self.groups.bounds or self.searching:
            return None
        per_row = self.groups.per_row(table)
        return TablePrecision(
            bounds=self.groups.bounds[table],
            bits=self.bits[self.groups.of_table(table)],
            steps={width: float(step) for width, step in enumerate(self.steps[table]) if width},
            offset=self.offset[table, : self.dims[table]],
            group=per_row,
        )

    def tensors(self, table: int) -> dict[str, Tensor]:
        """See :meth:`lightning_embcomp.engine.attached.TableState.tensors`."""
        if table not in self.groups.bounds:
            return {}
        mine = self.groups.of_table(table)
        found = {
            "bounds": self.groups.bounds[table],
            "bits": self.bits[mine],
            "steps": self.steps[table],
            "log_steps": self.log_steps[table],
            "offset": self.offset[table, : self.dims[table]],
            "magnitude": self.magnitude[table : table + 1],
        }
        per_row = self.groups.per_row(table)
        if per_row is not None:
            found["group"] = per_row
        if self.error.numel():
            found |= {name: getattr(self, name)[mine] for name in _SEARCH}
        return found

    def table_bytes(self, table: int) -> int:
        """See :meth:`lightning_embcomp.engine.attached.TableState.table_bytes`."""
        if table not in self.groups.bounds:
            return 0
        per_row = self.groups.per_row(table)
        held = super().table_bytes(table) - (0 if per_row is None else per_row.numel() * per_row.element_size())
        return held + self.groups.lookup_bytes(table)

    def held(self, tables: int) -> list[Tensor]:
        """See :meth:`lightning_embcomp.engine.attached.TableState.held`."""
        return [*super().held(tables), self.groups.lookup]

    def names(self, table: int, saved: Collection[str]) -> set[str]:
        """See :meth:`lightning_embcomp.engine.attached.TableState.names`."""
        if table not in self.groups.bounds:
            return set()
        always = {"bounds", "bits", "steps", "log_steps", "offset", "magnitude"}
        return always | ({"group"} & set(saved)) | (set(_SEARCH) if "error" in saved else set())

    def misfit(self, table: int, saved: Mapping[str, Tensor]) -> str | None:
        """See :meth:`lightning_embcomp.engine.attached.TableState.misfit`."""
        if table not in self.groups.bounds:
            return None
        bounds, widths = self.groups.bounds[table], self.widths.tolist()
        if not torch.equal(saved["bounds"], bounds):
            return (
                f"the rows were cut into {saved['bounds'].numel() - 1} groups, now into {bounds.numel() - 1} or others:"
                " use the saved search.groups and tables"
            )
        unknown = set(saved["bits"].tolist()) - {*widths, SEARCHED}
        if unknown:
            return f"rows have {sorted(unknown)} bits, which are not among the widths {widths}: use the saved settings"
        n, rows = bounds.numel() - 1, int(bounds[-1])
        sizes: dict[str, tuple[int, ...]] = {
            "bounds": (n + 1,),
            "bits": (n,),
            "steps": (_ALL_WIDTHS,),
            "log_steps": (_ALL_WIDTHS,),
            "offset": (self.dims[table],),
        }
        sizes |= {"magnitude": (1,), "group": (rows,), "logits": (n, len(widths)), "error": (n, len(widths))}
        for name, tensor in saved.items():
            if tuple(tensor.shape) != sizes.get(name, (n,)):
                return f"{name} has shape {tuple(tensor.shape)} instead of {sizes.get(name, (n,))}"
        return None

    def prepare(self, table: int, saved: Mapping[str, Tensor]) -> None:
        """See :meth:`lightning_embcomp.engine.attached.TableState.prepare`."""
        if table not in self.groups.bounds:
            return
        self.groups.set_per_row(table, "group" in saved)
        if ("error" in saved) != bool(self.error.numel()):
            self._hold_search("error" in saved)

    def restored(self) -> None:
        """See :meth:`lightning_embcomp.engine.attached.TableState.restored`."""
        self.refresh_steps()
        self.refresh_shares()


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


def _mean_magnitude(engine: RoutedEmbeddings, table: int) -> float:
    """Mean absolute value of the first rows of a table."""
    rows = engine.read_rows(table, 0, min(engine.tables[table].rows, SLAB)).float()
    return float(rows.abs().mean())

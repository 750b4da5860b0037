"""What mixed precision knows of the tables of one collection: widths, steps, and what a search has measured."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from lightning_embcomp.engine.precision import MAX_WIDTH, SEARCHED
from lightning_embcomp.kernels.quantize import RoundingGradients
from lightning_embcomp.methods.mpe.functional import half_steps, initial_steps
from lightning_embcomp.methods.mpe.groups import GroupBounds

ALL_WIDTHS = MAX_WIDTH + 1  # steps are kept by width, so that a table can be read without the settings
SEARCH_TENSORS = ("logits", "error", "counts")  # held while widths are searched
_MAGNITUDE_MEMORY = 0.99


class RoundingState:
    """Widths, steps and offsets of the tables of one collection; the same on all processes that share the tables.

    Of what backward passes add up, a process sees what concerns its own rows. Where tables are spread over processes,
    :meth:`pending` and :meth:`settle` bring the sums of all of them together after each optimizer step.

    Args:
        groups: Groups of the rows of the rounded tables.
        dims: Columns of each table.
        widths: Candidate widths, rising.
        offset: Whether columns have trained offsets.
        temperature: While widths are searched, rows are a mixture of all candidates by the softmax of their logits over
            this temperature; None rounds them to the largest width, and measures what the others would do.
        features: Features that look each table up, where tables are spread over processes; None on one process.
        leads: Tables whose state this process hands to processes that hold no part of them.
    """

    def __init__(
        self,
        groups: GroupBounds,
        dims: Sequence[int],
        widths: Sequence[int],
        *,
        offset: bool = False,
        temperature: float | None = None,
        features: Sequence[int] | None = None,
        leads: Collection[int] = (),
    ) -> None:
        self.groups = groups
        self.dims = tuple(dims)
        self.widths = torch.tensor(list(widths))
        self.trains_offset = offset
        self.temperature = temperature
        self.leads = frozenset(leads)
        self.purpose: object = None
        n_groups, n_tables = groups.table.numel(), len(self.dims)
        self.bits = torch.full((n_groups,), SEARCHED, dtype=torch.uint8)
        self.magnitude = torch.zeros(n_tables)
        self.log_steps = torch.zeros(n_tables, ALL_WIDTHS)
        self.offset = torch.zeros(n_tables, max(self.dims))
        self.steps = torch.zeros(n_tables, ALL_WIDTHS)
        self.sums: RoundingGradients | None = None
        self._feature_tables = None if features is None else [t for t, n in enumerate(features) for _ in range(n)]
        self._first_feature = [sum((features or ())[:t]) for t in range(n_tables)]
        self.hold_search(True)
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

    def start(self, magnitudes: dict[int, float]) -> None:
        """Set the steps to suit tables of these mean absolute values."""
        for table, magnitude in magnitudes.items():
            self.magnitude[table] = magnitude
        self.start_steps()

    def start_steps(self) -> None:
        """Set the steps to suit the magnitude of the rows."""
        self.log_steps.copy_(initial_steps(self.magnitude, torch.arange(ALL_WIDTHS)).log())
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
        self.hold_search(False)
        self.refresh_shares()

    def refresh_shares(self) -> None:
        """Weigh the candidates as bits or logits say."""
        chosen = (self.bits.long().unsqueeze(1) == self.widths).float()
        searched = self.bits == SEARCHED
        if bool(searched.any()):  # while a checkpoint is read, of some tables only
            if self.temperature is not None and self.holds_search:
                candidates = torch.softmax(self.logits / self.temperature, 1)
            else:
                candidates = torch.zeros_like(chosen)
                candidates[:, -1] = 1.0
            chosen = torch.where(searched.unsqueeze(1), candidates, chosen)
        self.shares = chosen

    def hold_search(self, hold: bool) -> None:
        """Make room for what only a search needs, or let it go."""
        size = (self.bits.numel() if hold else 0, self.widths.numel())
        self.logits = torch.zeros(size)
        self.error = torch.zeros(size, dtype=torch.float64)
        self.counts = torch.ones(size[0], dtype=torch.float64)
        self._drop_pending()

    @property
    def holds_search(self) -> bool:
        """Whether there is room for what only a search needs."""
        return bool(self.error.numel())

    def observe(self, sums: RoundingGradients, bags: int) -> None:
        """Add up the gradients of one backward pass.

        Args:
            sums: From :func:`lightning_embcomp.kernels.quantize.round_rows_backward`.
            bags: Samples of the batch, over which the loss was averaged.
        """
        if self.measures:
            (self.error if self._feature_tables is None else self._errors).add_(sums.errors.double() * bags)
        if self.sums is None:
            self.sums = sums
        else:
            for name in ("shares", "steps", "offset"):
                getattr(self.sums, name).add_(getattr(sums, name))

    def observe_magnitude(self, table: int, feature: int, means: Tensor, columns: int) -> None:
        """Follow the mean absolute value of rows that are looked up.

        Args:
            table: The table.
            feature: Number of the feature among those of the table.
            means: Mean absolute value of each row, float32 ``(n,)``, ``n > 0``.
            columns: Columns that the means are over; those beyond the table's are zero.
        """
        if self._feature_tables is None:
            self._move_magnitude(table, float(means.mean()) * columns / self.dims[table])
            return
        found = self._magnitudes[self._first_feature[table] + feature]
        found[0] += float(means.double().sum()) * columns / self.dims[table]
        found[1] += means.numel()

    def _move_magnitude(self, table: int, mean: float) -> None:
        self.magnitude[table] += (1 - _MAGNITUDE_MEMORY) * (mean - float(self.magnitude[table]))

    def take_sums(self) -> RoundingGradients | None:
        """Gradients since the last call."""
        sums, self.sums = self.sums, None
        return sums

    def _drop_pending(self) -> None:
        """Start what this process adds up on its own anew."""
        features = self._feature_tables if self.holds_search and self.temperature is None else None
        self._errors = torch.zeros_like(self.error[: 0 if features is None else None])
        self._magnitudes = torch.zeros(len(features or ()), 2, dtype=torch.float64)

    def pending(self) -> list[Tensor]:
        """What this process has added up since the last optimizer step, of the same shapes on all processes."""
        seen = torch.tensor([float(self.sums is not None)])
        if self.measures:
            return [seen, self._errors, self._magnitudes]
        wanted = self._gradients()
        if self.sums is None:
            return [seen, *(torch.zeros(size) for size in wanted.values())]
        return [seen, *(getattr(self.sums, name) for name in wanted)]

    def _gradients(self) -> dict[str, torch.Size]:
        """Gradients that the settings are trained by, and their shapes."""
        wanted = {"steps": torch.Size((len(self.dims), self.widths.numel()))}
        if self.trains_offset:
            wanted["offset"] = self.offset.shape
        if self.searching:
            wanted["shares"] = self.shares.shape
        return wanted

    def settle(self, summed: Sequence[Tensor]) -> None:
        """Take over what all processes have added up.

        Args:
            summed: Sums over the processes of what :meth:`pending` gave, float64.
        """
        self.sums = None
        if not bool(summed[0]):  # no process has seen a backward pass
            return
        found = dict.fromkeys(("shares", "errors", "steps", "offset"), torch.zeros(0))
        if self.measures:
            self.error += summed[1]
            assert self._feature_tables is not None
            for table, (total, count) in zip(self._feature_tables, summed[2].tolist(), strict=True):
                if count:
                    self._move_magnitude(table, total / count)
            self._drop_pending()
        else:
            found |= {name: total.float() for name, total in zip(self._gradients(), summed[1:], strict=True)}
        self.sums = RoundingGradients(**found)

    def refresh(self) -> None:
        """Bring everything that follows from the state up to date with it."""
        self.refresh_steps()
        self.refresh_shares()

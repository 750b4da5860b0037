"""What mixed precision knows of the tables of one collection: widths, steps, and what a search has measured."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import fields

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
        device: Where all of it lives, but the bounds of the groups; the CPU by default.
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
        device: torch.device | None = None,
    ) -> None:
        self.device = device = device or torch.device("cpu")
        self.groups = groups
        groups.carry(device)
        self.dims = tuple(dims)
        self.widths = torch.tensor(list(widths), dtype=torch.int64, device=device)
        rounded = [k for k, width in enumerate(widths) if width <= MAX_WIDTH]
        self.rounded = torch.tensor(rounded, dtype=torch.int64, device=device)
        self._dims = torch.tensor(self.dims, device=device)
        self.trains_offset = offset
        self.temperature = temperature
        self.leads = frozenset(leads)
        self.purpose: object = None
        n_groups, n_tables = groups.table.numel(), len(self.dims)
        self.bits = torch.full((n_groups,), SEARCHED, dtype=torch.uint8, device=device)
        self.magnitude = torch.zeros(n_tables, device=device)
        self.log_steps = torch.zeros(n_tables, ALL_WIDTHS, device=device)
        self.offset = torch.zeros(n_tables, max(self.dims), device=device)
        self.steps = torch.zeros(n_tables, ALL_WIDTHS, device=device)
        self.sums: RoundingGradients | None = None
        self._feature_tables = None if features is None else [t for t, n in enumerate(features) for _ in range(n)]
        first = [sum((features or ())[:t]) for t in range(n_tables)]
        self._first_feature = torch.tensor(first, device=device)
        self.hold_search(True)
        self.start_steps()
        self.read_bits()
        self.refresh_shares()

    def carry(self, device: torch.device) -> None:
        """Move all of it; optimizers of its tensors have to follow. A second call does nothing."""
        if device == self.device:
            return
        self.device = device
        self.groups.carry(device)
        for name, value in list(self.__dict__.items()):
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        if self.sums is not None:
            found = {field.name: getattr(self.sums, field.name).to(device) for field in fields(self.sums)}
            self.sums = RoundingGradients(**found)

    @property
    def measures(self) -> bool:
        """Whether the search adds up what other widths would do."""
        return self.searching and self.temperature is None

    @property
    def searching(self) -> bool:
        """Whether widths are still to be chosen, as :meth:`read_bits` has found."""
        return self._searching

    def read_bits(self) -> None:
        """Let the host know what the bits say; for others than training steps, since it waits for a GPU."""
        self._searching = bool((self.bits == SEARCHED).any())

    @property
    def group_values(self) -> Tensor:
        """Values (rows times columns) of every group, int64 ``(G,)``."""
        return self.groups.sizes() * self._dims[self.groups.table]

    def start(self, magnitudes: dict[int, float]) -> None:
        """Set the steps to suit tables of these mean absolute values."""
        for table, magnitude in magnitudes.items():
            self.magnitude[table] = magnitude
        self.start_steps()

    def start_steps(self) -> None:
        """Set the steps to suit the magnitude of the rows."""
        self.log_steps.copy_(initial_steps(self.magnitude, torch.arange(ALL_WIDTHS, device=self.device)).log())
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
        self.read_bits()
        self.refresh_shares()

    def refresh_shares(self) -> None:
        """Weigh the candidates as bits or logits say."""
        chosen = (self.bits.long().unsqueeze(1) == self.widths).float()
        if self.searching:  # while a checkpoint is read, of some tables only
            if self.temperature is not None and self.holds_search:
                candidates = torch.softmax(self.logits / self.temperature, 1)
            else:
                candidates = torch.zeros_like(chosen)
                candidates[:, -1] = 1.0
            chosen = torch.where((self.bits == SEARCHED).unsqueeze(1), candidates, chosen)
        self.shares = chosen

    def hold_search(self, hold: bool) -> None:
        """Make room for what only a search needs, or let it go."""
        size = (self.bits.numel() if hold else 0, self.widths.numel())
        self.logits = torch.zeros(size, device=self.device)
        self.error = torch.zeros(size, dtype=torch.float64, device=self.device)
        self.counts = torch.ones(size[0], dtype=torch.float64, device=self.device)
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

    def observe_magnitudes(self, tables: Tensor, feature: int, sums: Tensor, columns: int) -> None:
        """Follow the mean absolute value of rows that are looked up.

        Args:
            tables: Distinct tables, int64 ``(n,)``.
            feature: Number of the feature among those of each table.
            sums: Sum of the mean absolute values of the rows that it looks up, and their number, float64 ``(n, 2)``.
            columns: Columns that the means are over; those beyond the table's are zero.
        """
        total, count = sums[:, 0] * columns / self._dims[tables], sums[:, 1]
        if self._feature_tables is None:
            self._move_magnitudes(tables, total, count)
        else:
            self._magnitudes.index_add_(0, self._first_feature[tables] + feature, torch.stack([total, count], 1))

    def _move_magnitudes(self, tables: Tensor, total: Tensor, count: Tensor) -> None:
        now = self.magnitude[tables]
        moved = now + ((1 - _MAGNITUDE_MEMORY) * (total / count.clamp(min=1.0) - now.double())).float()
        self.magnitude[tables] = torch.where(count > 0, moved, now)

    def take_sums(self) -> RoundingGradients | None:
        """Gradients since the last call."""
        sums, self.sums = self.sums, None
        return sums

    def _drop_pending(self) -> None:
        """Start what this process adds up on its own anew."""
        features = self._feature_tables if self.holds_search and self.temperature is None else None
        self._errors = torch.zeros_like(self.error[: 0 if features is None else None])
        self._magnitudes = torch.zeros(len(features or ()), 2, dtype=torch.float64, device=self.device)

    def pending(self) -> list[Tensor]:
        """What this process has added up since the last optimizer step, of the same shapes on all processes."""
        seen = torch.full((1,), float(self.sums is not None), device=self.device)
        if self.measures:
            return [seen, self._errors, self._magnitudes]
        wanted = self._gradients()
        if self.sums is None:
            return [seen, *(torch.zeros(size, device=self.device) for size in wanted.values())]
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
            for feature, table in enumerate(self._feature_tables):
                at = torch.tensor([table], device=self.device)
                self._move_magnitudes(at, *summed[2][feature : feature + 1].unbind(1))
            self._drop_pending()
        else:
            found |= {name: total.float() for name, total in zip(self._gradients(), summed[1:], strict=True)}
        self.sums = RoundingGradients(**found)

    def refresh(self) -> None:
        """Bring everything that follows from the state up to date with it."""
        self.read_bits()
        self.refresh_steps()
        self.refresh_shares()

"""Train the settings of row quantizers, and choose their widths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_embcomp.engine.group import Group
from lightning_embcomp.kernels.quantize import RoundingGradients
from lightning_embcomp.methods.mpe.config import PrecisionSearch, RowQuantization
from lightning_embcomp.methods.mpe.exchange import share_sums, synchronise
from lightning_embcomp.methods.mpe.functional import (
    cheapest_widths,
    largest_likely_width,
    penalty_gradient,
    softmax_gradient,
)
from lightning_embcomp.methods.mpe.state import RoundingState

_FLOAT_BITS = 32
_PRICE_RATE = 0.05  # relative change of the penalty per step while the expected bits miss the budget
_FIRST_PRICE = 1e-4


class BudgetError(ValueError):
    """A size cannot be reached with the candidate widths."""


class QuantizerTraining:
    """Adam for the steps, offsets and logits of some collections, and the penalty that presses on their widths.

    Where tables are spread over processes, all of them hold all of this, make the same steps and choose the same.

    Args:
        states: State of the rounded tables of each collection.
        settings: How steps are trained.
        search: How widths are searched.
        ratio: Size of the float32 tables over that of the rounded values to reach; None leaves the penalty fixed.
        penalty: Factor of the penalty, ``softmax`` only.
        group: Processes that hold the tables.
    """

    def __init__(
        self,
        states: Sequence[RoundingState],
        settings: RowQuantization,
        search: PrecisionSearch,
        *,
        ratio: float | None,
        penalty: float | None,
        group: Group | None = None,
    ) -> None:
        self.states = list(states)
        self.group = group or Group()
        self.settings, self.search = settings, search
        self.ratio = ratio
        self._price = torch.tensor(_FIRST_PRICE if penalty is None else penalty, dtype=torch.float64)
        self.optimizers = [self._optimizer(state) for state in self.states]

    @property
    def price(self) -> float:
        """Factor of the penalty."""
        return float(self._price)

    @price.setter
    def price(self, price: float) -> None:
        self._price = torch.tensor(price, dtype=torch.float64, device=self._price.device)

    def _follow(self) -> None:
        """Go with the settings to the device that they were moved to."""
        for i, (state, optimizer) in enumerate(zip(self.states, self.optimizers, strict=True)):
            if optimizer.param_groups[0]["params"][0] is not state.log_steps:
                self.optimizers[i] = self._optimizer(state)
                self.optimizers[i].load_state_dict(optimizer.state_dict())
        self._price = self._price.to(self.states[0].device)

    def _optimizer(self, state: RoundingState) -> torch.optim.Optimizer:
        groups: list[dict[str, Any]] = [{"params": [state.log_steps], "lr": self.settings.learning_rate}]
        if state.trains_offset:
            groups.append({"params": [state.offset], "lr": self.settings.offset_learning_rate})
        if state.searching and self.search.method == "softmax":
            groups.append({"params": [state.logits], "lr": self.search.learning_rate})
        return torch.optim.Adam(groups)

    def step(self) -> None:
        """Move the settings by the gradients of the last optimizer step; all processes call it together."""
        self._follow()
        if self.group.size > 1:
            share_sums(self.states, self.group)
        for state, optimizer in zip(self.states, self.optimizers, strict=True):
            sums = state.take_sums()
            if sums is None:
                continue
            if state.measures:
                state.start_steps()  # follow the magnitude of the rows, for widths that are not in use as well
                continue
            self._set_gradients(state, sums)
            optimizer.step()
            state.refresh_steps()
            if state.searching:
                state.refresh_shares()
        if self.ratio is not None and self.search.method == "softmax" and self.searching:
            excess = self.expected_bits() * self.ratio / _FLOAT_BITS - 1
            self._price = self._price * (1 + _PRICE_RATE * excess.clamp(-1.0, 1.0))

    def _set_gradients(self, state: RoundingState, sums: RoundingGradients) -> None:
        by_step = torch.zeros_like(state.log_steps)
        by_step.index_copy_(1, state.widths[state.rounded], sums.steps[:, state.rounded])
        state.log_steps.grad = by_step * state.log_steps.exp()
        if state.trains_offset:
            state.offset.grad = sums.offset
        if state.searching:
            pressure = penalty_gradient(state.widths, state.groups.sizes(), state.counts)
            by_share = sums.shares + self._price * pressure
            state.logits.grad = softmax_gradient(state.shares, by_share, self.search.temperature)

    @property
    def searching(self) -> bool:
        """Whether widths are still to be chosen."""
        return any(state.searching for state in self.states)

    def average_bits(self) -> float:
        """Bits per value: chosen, or expected by the shares while they are searched."""
        return float(self.expected_bits())

    def expected_bits(self) -> Tensor:
        """:meth:`average_bits` as a float64 scalar on the device, for which the host does not wait."""
        sizes = [state.group_values.double() for state in self.states]
        bits = [
            (s.shares.double() @ s.widths.double() * size).sum() for s, size in zip(self.states, sizes, strict=True)
        ]
        return torch.stack(bits).sum() / torch.stack([size.sum() for size in sizes]).sum()

    def choose(self) -> list[Tensor]:
        """Width of every group by what the search has found, uint8 per collection; the same on all processes.

        Raises:
            BudgetError: If the ratio is out of reach.
        """
        # Sums over processes need not be the same to the last bit with every backend: one process decides.
        return [self.group.broadcast(bits, 0) for bits in self._choose()]

    def _choose(self) -> list[Tensor]:
        if self.ratio is None:
            choice = [largest_likely_width(state.shares.cpu(), state.widths.cpu()) for state in self.states]
            return [s.widths.cpu()[index].to(torch.uint8) for s, index in zip(self.states, choice, strict=True)]
        widths = self.states[0].widths.cpu()
        size = torch.cat([state.group_values.cpu() for state in self.states]).unsqueeze(1) * widths
        budget = float(size.sum(0)[-1]) / int(widths[-1]) * _FLOAT_BITS / self.ratio
        try:
            index = cheapest_widths(torch.cat([self._cost(state) for state in self.states]), size, budget)
        except ValueError as error:
            raise BudgetError(
                f"ratio {self.ratio:g} cannot be reached with widths {widths.tolist()}: {error}. Add a smaller width,"
                " or lower the ratio"
            ) from error
        chosen = widths[index].to(torch.uint8).split([s.bits.numel() for s in self.states])
        return [bits.clone() for bits in chosen]

    def _cost(self, state: RoundingState) -> Tensor:
        if self.search.method == "softmax":
            return -state.logits.double().cpu()
        return state.error.cpu()

    def settle(self, bits: Sequence[Tensor]) -> None:
        """Give every group its width, with steps that suit the rows."""
        for state, chosen in zip(self.states, bits, strict=True):
            measured = state.measures
            state.fix(chosen)
            if measured:
                state.start_steps()
        self.optimizers = [self._optimizer(state) for state in self.states]

    def state_dict(self) -> dict[str, Any]:
        """State of Adam and the penalty; settings are saved with the tables."""
        self._follow()
        return {"price": self.price, "adam": [optimizer.state_dict() for optimizer in self.optimizers]}

    def synchronise(self) -> None:
        """Hand the state of tables to processes that hold no part of them; all processes call it together."""
        if self.group.size == 1:
            return
        for i, changed in enumerate(synchronise(self.states, self.group)):
            if changed:
                self.optimizers[i] = self._optimizer(self.states[i])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a saved run, once the tables are restored."""
        self.price = float(state["price"])
        self.optimizers = [self._optimizer(rounding) for rounding in self.states]
        for optimizer, saved in zip(self.optimizers, state["adam"], strict=True):
            optimizer.load_state_dict(saved)

"""Train the settings of row quantizers, and choose their widths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_embcomp.engine.precision import MAX_WIDTH
from lightning_embcomp.kernels.quantize import RoundingGradients
from lightning_embcomp.methods.mpe.config import PrecisionSearch, RowQuantization
from lightning_embcomp.methods.mpe.functional import (
    cheapest_widths,
    largest_likely_width,
    penalty_gradient,
    softmax_gradient,
)
from lightning_embcomp.methods.mpe.module import RowQuantizer

_FLOAT_BITS = 32
_PRICE_RATE = 0.05  # relative change of the penalty per step while the expected bits miss the budget
_FIRST_PRICE = 1e-4


class BudgetError(ValueError):
    """A size cannot be reached with the candidate widths."""


class QuantizerTraining:
    """Adam for the steps, offsets and logits of some quantizers, and the penalty that presses on their widths.

    Args:
        quantizers: The quantizers.
        settings: How steps are trained.
        search: How widths are searched.
        ratio: Size of the float32 tables over that of the rounded values to reach; None leaves the penalty fixed.
        penalty: Factor of the penalty, ``softmax`` only.
    """

    def __init__(
        self,
        quantizers: Sequence[RowQuantizer],
        settings: RowQuantization,
        search: PrecisionSearch,
        *,
        ratio: float | None,
        penalty: float | None,
    ) -> None:
        self.quantizers = list(quantizers)
        self.settings, self.search = settings, search
        self.ratio = ratio
        self.price = _FIRST_PRICE if penalty is None else penalty
        self.optimizers = [self._optimizer(quantizer) for quantizer in self.quantizers]

    def _optimizer(self, quantizer: RowQuantizer) -> torch.optim.Optimizer:
        groups: list[dict[str, Any]] = [{"params": [quantizer.log_steps], "lr": self.settings.learning_rate}]
        if quantizer.trains_offset:
            groups.append({"params": [quantizer.offset], "lr": self.settings.offset_learning_rate})
        if quantizer.searching and self.search.method == "softmax":
            groups.append({"params": [quantizer.logits], "lr": self.search.learning_rate})
        return torch.optim.Adam(groups)

    def step(self) -> None:
        """Move the settings by the gradients of the last optimizer step."""
        for quantizer, optimizer in zip(self.quantizers, self.optimizers, strict=True):
            sums = quantizer.take_sums()
            if sums is None:
                continue
            if quantizer.measures:
                quantizer.start_steps()  # follow the magnitude of the rows, for widths that are not in use as well
                continue
            self._set_gradients(quantizer, sums)
            optimizer.step()
            quantizer.refresh_steps()
            if quantizer.searching:
                quantizer.refresh_shares()
        if self.ratio is not None and self.search.method == "softmax" and self.searching:
            excess = self.average_bits() * self.ratio / _FLOAT_BITS - 1
            self.price *= 1 + _PRICE_RATE * max(-1.0, min(1.0, excess))

    def _set_gradients(self, quantizer: RowQuantizer, sums: RoundingGradients) -> None:
        by_step = torch.zeros_like(quantizer.log_steps)
        rounded = quantizer.widths <= MAX_WIDTH
        by_step[:, quantizer.widths[rounded]] = sums.steps[:, rounded]
        quantizer.log_steps.grad = by_step * quantizer.log_steps.exp()
        if quantizer.trains_offset:
            quantizer.offset.grad = sums.offset
        if quantizer.searching:
            pressure = penalty_gradient(quantizer.widths, quantizer.groups.sizes(), quantizer.counts)
            by_share = sums.shares + self.price * pressure
            quantizer.logits.grad = softmax_gradient(quantizer.shares, by_share, self.search.temperature)

    @property
    def searching(self) -> bool:
        """Whether widths are still to be chosen."""
        return any(quantizer.searching for quantizer in self.quantizers)

    def average_bits(self) -> float:
        """Bits per value: chosen, or expected by the shares while they are searched."""
        bits = values = 0.0
        for quantizer in self.quantizers:
            size = group_values(quantizer).double()
            bits += float((quantizer.shares.double() @ quantizer.widths.double() * size).sum())
            values += float(size.sum())
        return bits / values

    def choose(self) -> list[Tensor]:
        """Width of every group by what the search has found, uint8 per quantizer.

        Raises:
            BudgetError: If the ratio is out of reach.
        """
        if self.ratio is None:
            choice = [largest_likely_width(quantizer.shares, quantizer.widths) for quantizer in self.quantizers]
            return [q.widths[index].to(torch.uint8) for q, index in zip(self.quantizers, choice, strict=True)]
        widths = self.quantizers[0].widths
        size = torch.cat([group_values(quantizer) for quantizer in self.quantizers]).unsqueeze(1) * widths
        budget = float(size.sum(0)[-1]) / int(widths[-1]) * _FLOAT_BITS / self.ratio
        try:
            index = cheapest_widths(torch.cat([self._cost(quantizer) for quantizer in self.quantizers]), size, budget)
        except ValueError as error:
            raise BudgetError(
                f"ratio {self.ratio:g} cannot be reached with widths {widths.tolist()}: {error}. Add a smaller width,"
                " or lower the ratio"
            ) from error
        return list(widths[index].to(torch.uint8).split([q.bits.numel() for q in self.quantizers]))

    def _cost(self, quantizer: RowQuantizer) -> Tensor:
        if self.search.method == "softmax":
            return -quantizer.logits.double()
        return quantizer.error

    def settle(self, bits: Sequence[Tensor]) -> None:
        """Give every group its width, with steps that suit the rows."""
        for quantizer, chosen in zip(self.quantizers, bits, strict=True):
            measured = quantizer.measures
            quantizer.fix(chosen)
            if measured:
                quantizer.start_steps()
        self.optimizers = [self._optimizer(quantizer) for quantizer in self.quantizers]

    def state_dict(self) -> dict[str, Any]:
        """State of Adam and the penalty; settings are saved with the tables."""
        return {"price": self.price, "adam": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a saved run, once the quantizers are restored."""
        self.price = float(state["price"])
        self.optimizers = [self._optimizer(quantizer) for quantizer in self.quantizers]
        for optimizer, saved in zip(self.optimizers, state["adam"], strict=True):
            optimizer.load_state_dict(saved)


def group_values(quantizer: RowQuantizer) -> Tensor:
    """Values (rows times columns) of every group, int64 ``(G,)``."""
    dims = torch.tensor(quantizer.dims)[quantizer.groups.table]
    return quantizer.groups.sizes() * dims

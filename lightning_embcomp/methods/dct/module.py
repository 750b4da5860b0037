"""State of the thresholded parameters of a worker: threshold, residual and estimates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from lightning_embcomp.kernels.threshold import SMALLEST, Packed, select_large, select_packed
from lightning_embcomp.methods.dct.config import ErrorFeedback, ThresholdSettings
from lightning_embcomp.methods.dct.functional import (
    largest,
    largest_on_device,
    sampled_threshold,
    threshold_on_device,
    wanted_entries,
    whole_message,
)

_TENSORS = ("residual", "estimate", "mean", "average")
_NUMBERS = ("threshold", "age", "refreshes", "stale", "seen")
_ROOM = 2
"""Room for candidates, where the host does not know how many there are, over the number that renews a threshold."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What one parameter is to send.

    Attributes:
        indices: Positions in the parameter, int32 ``(k,)``, rising.
        values: float32 ``(k,)``.
        finite: Whether the whole message is finite; nothing was left out if it is not.
        too_many: Whether there are so many that the step should be exchanged densely.
    """

    indices: Tensor
    values: Tensor
    finite: bool
    too_many: bool


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Entries of a message over the threshold; only the device knows how many.

    Attributes:
        packed: The entries.
        threshold: float32 ``(1,)``.
        most: Entries that are sent at most, int64 ``(1,)``.
        grad: What the message was made of.
        factor: Multiplies it.
    """

    packed: Packed
    threshold: Tensor
    most: Tensor
    grad: Tensor
    factor: float


class ThresholdedParameter:
    """What one worker keeps for one parameter; all tensors are float32, flat, in the memory order of the parameter.

    Args:
        name: Name of the parameter, which also seeds its samples.
        numel: Its entries.
        device: Where its gradient is.
        density: Share of the entries to send.
        feedback: What becomes of the rest.
        thresholds: When thresholds are computed.

    Attributes:
        most: Entries that are sent at most; of more, the step is exchanged densely if there is a limit on overshoot.
        residual: What was not sent, or None where the kind of feedback has none.
        estimate: What the receivers hold of this worker's gradient, or None.
        mean: Mean of the estimates of all workers, the same everywhere, or None.
        average: Running mean of this worker's gradients, which takes their place, or None without momentum.
    """

    def __init__(
        self,
        name: str,
        numel: int,
        device: torch.device,
        *,
        density: float,
        feedback: ErrorFeedback,
        thresholds: ThresholdSettings,
    ) -> None:
        self.name, self.numel = name, numel
        self.wanted = wanted_entries(numel, density)
        self.most = self.wanted
        if thresholds.max_overshoot is not None:
            self.most = int(min(thresholds.max_overshoot * self.wanted, numel))
        self.thresholds = thresholds
        self.gain = feedback.gain(density)

        def zeros(*kinds: str) -> Tensor | None:
            return torch.zeros(numel, device=device) if feedback.kind in kinds else None

        self.residual = zeros("ec", "econtrol")
        self.estimate = zeros("ef21", "econtrol")
        self.mean = zeros("ef21", "econtrol")
        self._weight = 1.0 - feedback.kept(density)
        self.average = zeros("ef21", "econtrol") if self._weight < 1.0 else None
        self.seen = 0
        self.threshold: float | Tensor | None = None
        self.age = 0
        self.refreshes = 0
        self.stale = False
        self._before: dict[str, Any] | None = None

    def select(self, grad: Tensor, factor: float) -> Selection:
        """Add a gradient and choose what to send of the message; nothing counts as sent yet.

        Args:
            grad: float32 ``(numel,)``.
            factor: Multiplies it.

        Returns:
            What to send.
        """
        grad, factor = self._averaged(grad, factor)
        if self._is_due():
            self.threshold = sampled_threshold(grad, self.residual, self.estimate, factor=factor, **self._sampling())
        self.age += 1
        assert isinstance(self.threshold, float)
        indices, values = select_large(
            grad, self.residual, self.estimate, factor=factor, gain=self.gain, threshold=self.threshold
        )
        finite = bool(torch.isfinite(values).all())
        return self._capped(indices, values, values.numel(), finite, self.threshold)

    def select_later(self, grad: Tensor, factor: float) -> Candidates:
        """First half of :meth:`select`, which does not wait for the device that the gradient is on.

        Args:
            grad: As in :meth:`select`.
            factor: As in :meth:`select`.

        Returns:
            What :meth:`keep` chooses from.
        """
        grad, factor = self._averaged(grad, factor)
        if self._is_due():
            self.threshold = threshold_on_device(grad, self.residual, self.estimate, factor=factor, **self._sampling())
        self.age += 1
        if not isinstance(self.threshold, Tensor):
            assert self.threshold is not None
            self.threshold = torch.full((1,), self.threshold, dtype=torch.float32, device=grad.device)
        room = self.most
        if self.thresholds.max_overshoot is None:
            room = min(self.numel, math.ceil(_ROOM * self.thresholds.drift * self.wanted))
        packed = self._pack(grad, factor, self.threshold, room)
        most = torch.full((1,), self.most, device=grad.device)
        return Candidates(packed=packed, threshold=self.threshold, most=most, grad=grad, factor=factor)

    def keep(self, candidates: Candidates, *, found: int, finite: bool, threshold: float) -> Selection:
        """Second half of :meth:`select`, when the host knows the figures of the candidates.

        Args:
            candidates: From :meth:`select_later`.
            found: How many there are.
            finite: Whether all of them are.
            threshold: That they were selected by.

        Returns:
            What to send.
        """
        packed, thresholds = candidates.packed, self.thresholds
        to_choose = thresholds.max_overshoot is None or found > thresholds.drift * self.wanted
        if finite and to_choose and found > packed.values.numel():
            packed = self._pack(candidates.grad, candidates.factor, candidates.threshold, found, added=True)
        return self._capped(packed.indices[:found], packed.values[:found], found, finite, threshold, later=True)

    def _is_due(self) -> bool:
        """Whether a threshold is to be estimated now, in which case it counts as new from here on."""
        due = self.threshold is None or self.stale or self.age >= self.thresholds.life_span
        if due:
            self.age, self.stale = 0, False
            self.refreshes += 1
        return due

    def _sampling(self) -> dict[str, Any]:
        return {
            "gain": self.gain,
            "wanted": self.wanted,
            "samples": self.thresholds.samples,
            "seed": crc32(f"{self.name} {self.refreshes - 1}".encode()),
        }

    def _pack(self, grad: Tensor, factor: float, threshold: Tensor, room: int, *, added: bool = False) -> Packed:
        return select_packed(
            grad,
            self.residual,
            self.estimate,
            factor=factor,
            gain=self.gain,
            threshold=threshold,
            capacity=room,
            added=added,
        )

    def _capped(
        self, indices: Tensor, values: Tensor, found: int, finite: bool, threshold: float, *, later: bool = False
    ) -> Selection:
        """Choose from what reaches the threshold, and see whether that still fits."""
        drift, limit = self.thresholds.drift, self.thresholds.max_overshoot
        self.stale = found * drift < self.wanted and threshold > SMALLEST
        if found <= self.wanted or not finite:
            return Selection(indices=indices, values=values, finite=finite, too_many=False)
        drifted = found > drift * self.wanted
        if limit is None or drifted:
            smallest: float | Tensor
            kept, smallest = largest_on_device(values, self.wanted) if later else largest(values, self.wanted)
            if drifted:  # those kept are the largest of all: the exact threshold comes for free
                self.threshold, self.age = smallest, 0
            if limit is None:
                indices, values = indices[kept], values[kept]
        return Selection(indices=indices, values=values, finite=True, too_many=limit is not None and found > self.most)

    def sent(self, indices: Tensor, values: Tensor) -> None:
        """Take what was sent out of the residual, and add it to the estimate.

        Args:
            indices: int32 ``(k,)``.
            values: As the receivers read them, float32 ``(k,)``.
        """
        if self.residual is not None:
            self.residual.index_add_(0, indices, values, alpha=-1)
        if self.estimate is not None:
            self.estimate.index_add_(0, indices, values)

    def send_all(self, grad: Tensor, factor: float, *, added: bool, weight: float) -> Tensor:
        """Message of a dense step.

        Args:
            grad: float32 ``(numel,)``.
            factor: Multiplies it.
            added: Whether :meth:`select` has already added the gradient.
            weight: How far the estimate moves towards the message.

        Returns:
            What the receivers are to average and step along, float32 ``(numel,)``.
        """
        if added:
            grad, factor = (grad, factor) if self.average is None else (self.average, 1.0)
        else:
            self._averaged(grad, factor)  # followed, not sent: these steps are those of plain training
            if self.residual is not None:
                self.residual.add_(grad, alpha=factor)
                if self.estimate is not None:
                    self.residual.sub_(self.estimate)
        return whole_message(grad, self.residual, self.estimate, factor=factor, gain=self.gain, weight=weight)

    def received(self, total: Tensor) -> None:
        """Turn the mean of what the workers sent into the gradient to step along, in place.

        Args:
            total: float32 ``(numel,)``.
        """
        if self.mean is not None:
            self.mean.add_(total)
            total.copy_(self.mean)

    def received_all(self, total: Tensor, weight: float) -> None:
        """Follow the estimates of all workers in a dense step.

        Args:
            total: Mean of their messages, float32 ``(numel,)``.
            weight: As in :meth:`send_all`.
        """
        if self.mean is not None:
            self.mean.lerp_(total, weight)

    def unsent(self, grad: Tensor, factor: float, sent: Tensor) -> float:
        """Squared norm of what this step leaves unsent.

        Args:
            grad: float32 ``(numel,)``.
            factor: Multiplies it.
            sent: Values that were sent, after :meth:`sent`.
        """
        if self.residual is not None:
            return float(self.residual.double().square().sum())
        if self.estimate is not None:
            wanted = grad.double() * factor if self.average is None else self.average.double()
            return float((wanted - self.estimate).square().sum())
        return max(0.0, float((grad.double() * factor).square().sum() - sent.double().square().sum()))

    def _averaged(self, grad: Tensor, factor: float) -> tuple[Tensor, float]:
        """Add a gradient to the running mean, and take that and its factor instead where there is one."""
        if self.average is None:
            return grad, factor
        self.seen += 1
        # The plain mean at first, so that it does not start from zero.
        self.average.lerp_(grad if factor == 1.0 else grad * factor, max(self._weight, 1.0 / self.seen))
        return self.average, 1.0

    def remember(self) -> None:
        """Keep the state, in case the optimizer skips the step."""
        self._before = self._state()

    def settle(self, skipped: bool) -> None:
        """Go back to what :meth:`remember` kept if the step was skipped, and forget it."""
        if skipped and self._before is not None:
            self.load_state_dict(self._before)
        self._before = None

    def _state(self) -> dict[str, Any]:
        tensors = {name: getattr(self, name) for name in _TENSORS}
        kept = {name: tensor.clone() for name, tensor in tensors.items() if tensor is not None}
        return {name: getattr(self, name) for name in _NUMBERS} | kept

    def state_dict(self) -> dict[str, Any]:
        """Copies of everything that a resumed run needs."""
        state = self._state()
        if isinstance(self.threshold, Tensor):
            state["threshold"] = float(self.threshold)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state.

        Args:
            state: From :meth:`state_dict`.

        Raises:
            ValueError: If it is that of another parameter or another kind of feedback, or lacks an entry; nothing is
                taken over then.
        """
        for name in _TENSORS:
            mine: Tensor | None = getattr(self, name)
            saved: Tensor | None = state.get(name)
            if (None if mine is None else mine.shape) != (None if saved is None else saved.shape):
                raise ValueError(
                    f"parameter {self.name!r} has {_shown(mine)} as {name}, and the saved state has {_shown(saved)}."
                    " Use the saved settings of feedback, parameters and min_numel"
                )
        numbers = dict(state)
        if self.average is None:
            numbers.setdefault("seen", 0)  # counts for a running mean only; states from before those lack it
        missing = [name for name in _NUMBERS if name not in numbers]
        if missing:
            raise ValueError(
                f"the saved state of parameter {self.name!r} lacks {', '.join(map(repr, missing))}: another version of"
                " this package wrote it. Resume with that version, or take the state of GradientThresholding out of"
                " the 'callbacks' of the checkpoint to start over with empty residuals"
            )
        for name in _TENSORS:
            mine = getattr(self, name)
            if mine is not None:
                mine.copy_(state[name])
        for name in _NUMBERS:
            setattr(self, name, numbers[name])


def _shown(tensor: Tensor | None) -> str:
    return "nothing" if tensor is None else f"{tensor.numel()} entries"

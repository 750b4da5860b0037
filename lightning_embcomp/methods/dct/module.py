"""State of the thresholded parameters of a worker: threshold, residual and estimates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from lightning_embcomp.kernels.threshold import SMALLEST, select_large
from lightning_embcomp.methods.dct.config import ErrorFeedback, ThresholdSettings
from lightning_embcomp.methods.dct.functional import largest, sampled_threshold, wanted_entries, whole_message

_TENSORS = ("residual", "estimate", "mean", "average")
_NUMBERS = ("threshold", "age", "refreshes", "stale", "seen")


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
        self.threshold: float | None = None
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
        if self.threshold is None or self.stale or self.age >= self.thresholds.life_span:
            self.threshold = sampled_threshold(
                grad,
                self.residual,
                self.estimate,
                factor=factor,
                gain=self.gain,
                wanted=self.wanted,
                samples=self.thresholds.samples,
                seed=crc32(f"{self.name} {self.refreshes}".encode()),
            )
            self.age, self.stale = 0, False
            self.refreshes += 1
        self.age += 1
        indices, values = select_large(
            grad, self.residual, self.estimate, factor=factor, gain=self.gain, threshold=self.threshold
        )
        finite = bool(torch.isfinite(values).all())
        found, drift, limit = values.numel(), self.thresholds.drift, self.thresholds.max_overshoot
        self.stale = found * drift < self.wanted and self.threshold > SMALLEST
        if found <= self.wanted or not finite:
            return Selection(indices=indices, values=values, finite=finite, too_many=False)
        drifted = found > drift * self.wanted
        if limit is None or drifted:
            kept, smallest = largest(values, self.wanted)
            if drifted:  # those kept are the largest of all: the exact threshold comes for free
                self.threshold, self.age = max(smallest, SMALLEST), 0
            if limit is None:
                indices, values = indices[kept], values[kept]
        too_many = limit is not None and found > limit * self.wanted
        return Selection(indices=indices, values=values, finite=True, too_many=too_many)

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
        self._before = self.state_dict()

    def settle(self, skipped: bool) -> None:
        """Go back to what :meth:`remember` kept if the step was skipped, and forget it."""
        if skipped and self._before is not None:
            self.load_state_dict(self._before)
        self._before = None

    def state_dict(self) -> dict[str, Any]:
        """Copies of everything that a resumed run needs."""
        tensors = {name: getattr(self, name) for name in _TENSORS}
        kept = {name: tensor.clone() for name, tensor in tensors.items() if tensor is not None}
        return {name: getattr(self, name) for name in _NUMBERS} | kept

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state.

        Args:
            state: From :meth:`state_dict`.

        Raises:
            ValueError: If it is that of another parameter or another kind of feedback.
        """
        for name in _TENSORS:
            mine: Tensor | None = getattr(self, name)
            saved: Tensor | None = state.get(name)
            if (None if mine is None else mine.shape) != (None if saved is None else saved.shape):
                raise ValueError(
                    f"parameter {self.name!r} has {_shown(mine)} as {name}, and the saved state has {_shown(saved)}"
                )
            if mine is not None and saved is not None:
                mine.copy_(saved)
        for name in _NUMBERS:
            setattr(self, name, state[name])


def _shown(tensor: Tensor | None) -> str:
    return "nothing" if tensor is None else f"{tensor.numel()} entries"

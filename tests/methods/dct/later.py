"""Selection in two halves, for devices that the host should not wait for, against selection at once."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from lightning_embcomp.methods.dct.config import ErrorFeedback, ThresholdSettings
from lightning_embcomp.methods.dct.module import Candidates, Selection, ThresholdedParameter

KINDS = ("ec", "ef21", "econtrol", "none")
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "sampled": {"samples": 1000, "drift": 1.1, "life_span": 7},
    "limited": {"samples": 1000, "max_overshoot": 1.2},
    "generous": {"max_overshoot": 10.0},
}
STEPS = 20


def parameter(
    kind: str,
    settings: dict[str, Any],
    numel: int = 3000,
    device: torch.device | None = None,
    momentum: float | None = None,
) -> ThresholdedParameter:
    return ThresholdedParameter(
        "p",
        numel,
        device or torch.device("cpu"),
        density=0.05,
        # Dyadic, so that every backend takes the same share of the residual, to the bit.
        feedback=ErrorFeedback(kind=kind, eta=0.03125 if kind == "econtrol" else None, momentum=momentum),  # type: ignore[arg-type]
        thresholds=ThresholdSettings(**settings),
    )


def gradient(step: int, numel: int = 3000) -> torch.Tensor:
    """Sizes fall and rise again: thresholds become too large, and then so small that there is no room."""
    size = {5: 0.1, 6: 0.1, 9: 1e3, 10: 1e4, 13: 1e5, 16: 1e6, 19: 1e7}.get(step, 1.0)
    return size * torch.randn(numel, generator=torch.Generator().manual_seed(step))


def keep(state: ThresholdedParameter, candidates: Candidates) -> Selection:
    """Second half, with figures as the host reads them."""
    packed = candidates.packed
    return state.keep(
        candidates,
        found=int(packed.found),
        finite=bool(torch.isfinite(packed.largest)),
        threshold=float(candidates.threshold),
    )


def compare(
    kind: str,
    name: str,
    backend: Callable[[], AbstractContextManager[Any]] = nullcontext,
    device: torch.device | None = None,
    momentum: float | None = None,
) -> tuple[int, int]:
    """Train both for some steps; they must agree to the bit.

    Args:
        kind: Of feedback.
        name: Of settings.
        backend: In which the second one selects.
        device: Of the second one.
        momentum: Of running means, which other devices compute to other bits; 0 for none.

    Returns:
        Steps in which there was no room for all candidates, and in which too many were found.
    """
    device = device or torch.device("cpu")
    one = parameter(kind, SETTINGS[name], momentum=momentum)
    two = parameter(kind, SETTINGS[name], device=device, momentum=momentum)
    crowded = dense = 0
    for step in range(STEPS):
        grad = gradient(step)
        at_once = one.select(grad, 0.5)
        with backend():
            candidates = two.select_later(grad.to(device), 0.5)
            crowded += int(candidates.packed.found) > candidates.packed.values.numel()
            later = keep(two, candidates)
        where = f"{kind} {name} step {step}"
        assert at_once.finite and later.finite, where
        assert at_once.too_many == later.too_many, where
        dense += later.too_many
        if not later.too_many:
            assert torch.equal(at_once.indices, later.indices.cpu()), where
            assert torch.equal(at_once.values, later.values.cpu()), where
            for state, selection in ((one, at_once), (two, later)):
                state.sent(selection.indices, selection.values)
        else:
            for state, given in ((one, grad), (two, grad.to(device))):
                state.send_all(given, 0.5, added=True, weight=1.0)
        mine, theirs = one.state_dict(), two.state_dict()
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            same = torch.equal(value, theirs[key].cpu()) if torch.is_tensor(value) else value == theirs[key]
            assert same, f"{where}: {key} is {theirs[key]}, not {value}"
    return crowded, dense

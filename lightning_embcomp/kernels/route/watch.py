"""Ids outside of their table on a GPU: found by the kernel, reported by a later call.

Asking the device whether a batch is good would make the host wait for it in every step. Instead the answer travels to
pinned memory behind the kernel, and the first lookup after it has arrived raises. Until then such ids read as rows that
store nothing.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lightning_embcomp.kernels.graphs import capturing
from lightning_embcomp.kernels.route.reference import IdOutOfRangeError
from lightning_embcomp.kernels.types import BagLayout, RouterTensors

NEVER = 2**62
"""Position of the first bad id where there is none."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What a kernel found.

    Attributes:
        first: Position of the first bad id or :data:`NEVER`, int64 ``(1,)``.
        values: First bad id of every program, int64.
        block: Ids per program.
        bounds: First position of every feature, ``(F + 1,)``.
        limits: Rows of the table of every feature, int64 ``(F,)``.
    """

    first: Tensor
    values: Tensor
    block: int
    bounds: Tensor
    limits: Tensor

    @classmethod
    def prepare(cls, programs: int, block: int, offsets: Tensor, layout: BagLayout, router: RouterTensors) -> Findings:
        """Findings for a kernel to fill, nothing bad yet."""
        device = offsets.device
        return cls(
            first=torch.full((1,), NEVER, dtype=torch.int64, device=device),
            values=torch.empty(programs, dtype=torch.int64, device=device),
            block=block,
            bounds=offsets.index_select(0, layout.bag_start),
            limits=router.rows.index_select(0, layout.table),
        )


_waiting: defaultdict[torch.device, deque[tuple[Callable[[int], None], Tensor, torch.cuda.Event]]] = defaultdict(deque)


def report(findings: Findings) -> None:
    """Raise if there is a bad id; for a GPU once the answer is there, in this or a later call of this or :func:`check`.

    Raises:
        IdOutOfRangeError: If an id is negative or not below the rows of its table.
    """
    report_later(findings.first, partial(_raise_for, findings))


def report_later(found: Tensor, raise_for: Callable[[int], None]) -> None:
    """Hand a number to a function that may raise; for a GPU once the number is there, in a later call.

    Args:
        found: int64 ``(1,)``.
        raise_for: Called with the number.
    """
    device = found.device
    if device.type != "cuda":
        raise_for(found.tolist()[0])
        return
    check(device)
    if capturing(device):
        return  # a graph has nobody to report to
    answer = torch.empty(1, dtype=torch.int64, pin_memory=True)
    answer.copy_(found, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    _waiting[device].append((raise_for, answer, event))


def check(device: torch.device, *, wait: bool = False) -> None:
    """Raise for the first bad id of earlier batches.

    Args:
        device: A GPU; on other devices nothing is late.
        wait: Whether to wait for lookups that are still running.

    Raises:
        IdOutOfRangeError: If there was one; errors of :func:`report_later` as well.
    """
    if device.type != "cuda":
        return
    waiting = _waiting[_indexed(device)]
    while waiting and not capturing(device):
        raise_for, answer, event = waiting[0]
        if wait:
            event.synchronize()
        elif not event.query():
            return
        waiting.popleft()
        try:
            raise_for(int(answer[0]))
        except BaseException:
            waiting.clear()  # what followed belongs to the run that ends here
            raise


def forget(device: torch.device) -> None:
    """Drop what is still to be reported: it belongs to a run that has ended by another error.

    Args:
        device: A GPU; on other devices nothing is late.
    """
    if device.type == "cuda":
        _waiting.pop(_indexed(device), None)


def _indexed(device: torch.device) -> torch.device:
    return device if device.index is not None else torch.device(device.type, torch.cuda.current_device())


def _raise_for(findings: Findings, position: int) -> None:
    if position == NEVER:
        return
    feature = int(torch.searchsorted(findings.bounds[1:].contiguous(), position, right=True))
    value = int(findings.values[position // findings.block])
    raise IdOutOfRangeError(position, feature, value, int(findings.limits[feature]))

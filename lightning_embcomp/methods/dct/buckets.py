"""One gradient bucket of DistributedDataParallel while it is exchanged."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_embcomp.methods.dct.module import Candidates, ThresholdedParameter
from lightning_embcomp.methods.dct.traffic import Traffic
from lightning_embcomp.methods.dct.wire import Encoded


@dataclass(frozen=True)
class Part:
    """A parameter's entries in a bucket.

    Attributes:
        name: Name of the parameter.
        place: Its entries in the flat bucket.
        thresholded: Its state; None for a parameter that is sent whole.
    """

    name: str
    place: slice
    thresholded: ThresholdedParameter | None


@dataclass
class Bucket:
    """A bucket on its way.

    Attributes:
        buffer: Gradients of this worker, then the result, flat.
        parts: Its parameters, in order.
        promise: What DistributedDataParallel waits for: the buffer, or an exception.
        dense: Whether the bucket is exchanged whole.
        traffic: Figures.
        started: When the bucket was handed over.
        candidates: Of each thresholded parameter, until the host knows how many there are; None where it does at once.
        figures: How many, largest magnitudes and thresholds of the candidates, one after the other, float64.
        counts: Entries selected of each thresholded parameter.
        indices: Positions in the bucket of all selected entries, int32.
        message: What this worker sends.
        whole: What dense parameters of a thresholded bucket become, in one tensor.
        held: What collectives and a second stream of a GPU may still read: kept until the backward pass is over, since
            its own stream would reuse the memory at once.
        header: Headers of all workers.
        header_work: Their exchange.
        whole_work: Exchange of dense parameters, or of the whole buffer.
    """

    buffer: Tensor
    parts: list[Part]
    promise: torch.futures.Future[Any]
    dense: bool
    traffic: Traffic = field(default_factory=Traffic)
    started: float = field(default_factory=time.perf_counter)
    candidates: list[Candidates] | None = None
    figures: Tensor | None = None
    counts: list[int] = field(default_factory=list)
    indices: Tensor | None = None
    message: Encoded | None = None
    whole: Tensor | None = None
    held: list[Tensor] = field(default_factory=list)
    header: Tensor | None = None
    header_work: dist.Work | None = None
    whole_work: dist.Work | None = None

    @property
    def thresholded(self) -> list[tuple[ThresholdedParameter, slice]]:
        """Parameters of which only a part is sent, with their place."""
        return [(part.thresholded, part.place) for part in self.parts if part.thresholded is not None]

    @property
    def others(self) -> list[slice]:
        """Places of the parameters that are sent whole."""
        return [part.place for part in self.parts if part.thresholded is None]

    def gradient(self, place: slice) -> Tensor:
        """This worker's gradient of a parameter, float32; shares memory with the buffer if that is float32."""
        return self.buffer[place].float()

    def finish(self, outcome: Tensor | BaseException) -> None:
        """Let DistributedDataParallel go on with the buffer, or stop with an exception."""
        self.traffic.exchange_seconds += time.perf_counter() - self.started
        self.promise.set_result(outcome)

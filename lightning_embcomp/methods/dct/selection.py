"""Selection from a bucket, and what a process announces of it: on CPU when it is known, on other devices before.

A host that asks a GPU for a number waits for all that it has queued there. So headers are made on the GPU, and each
process reads its own figures together with the headers of all, once per bucket.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_embcomp.methods.dct.buckets import Bucket
from lightning_embcomp.methods.dct.config import ValueType
from lightning_embcomp.methods.dct.module import Selection
from lightning_embcomp.methods.dct.wire import encode, shared_exponent

HEADER = 4
"""Numbers in a header: entries, 1 + position of a part that is not finite, whether dense is wanted, exponent."""


def waits_at_once(device: torch.device) -> bool:
    """Whether the host may ask for numbers at any time: they are its own."""
    return device.type == "cpu"


def select(bucket: Bucket, factor: float, value_type: ValueType) -> Tensor:
    """Choose what to send of a bucket, and pack it.

    Args:
        bucket: On CPU.
        factor: Multiplies its gradients.
        value_type: Type of the values on the wire.

    Returns:
        Header, int32 ``(4,)``.
    """
    bad, selections = 0, []
    for number, part in enumerate(bucket.parts, 1):
        if part.thresholded is None:
            finite = bool(torch.isfinite(bucket.buffer[part.place]).all())
        else:
            selections.append(part.thresholded.select(bucket.gradient(part.place), factor))
            finite = selections[-1].finite
        if not finite:
            bad = bad or number
    exponent = 0
    if not bad:
        _pack(bucket, selections, value_type)
        assert bucket.message is not None
        exponent = bucket.message.exponent
    too_many = any(selection.too_many for selection in selections)
    return torch.tensor([sum(bucket.counts), bad, int(too_many), exponent], dtype=torch.int32)


def select_later(bucket: Bucket, factor: float, value_type: ValueType) -> Tensor:
    """Find the candidates of a bucket, without waiting for its device.

    Args:
        bucket: Its candidates and their figures are set.
        factor: As in :func:`select`.
        value_type: As in :func:`select`.

    Returns:
        As :func:`select`, on the device.
    """
    finite, bucket.candidates = [], []
    for part in bucket.parts:
        if part.thresholded is None:
            finite.append(torch.isfinite(bucket.buffer[part.place]).all().view(1))
        else:
            candidates = part.thresholded.select_later(bucket.gradient(part.place), factor)
            finite.append(torch.isfinite(candidates.packed.largest))
            bucket.candidates.append(candidates)
    found = torch.cat([candidates.packed.found for candidates in bucket.candidates])
    largest = torch.cat([candidates.packed.largest for candidates in bucket.candidates])
    thresholds = torch.cat([candidates.threshold for candidates in bucket.candidates])
    bucket.figures = torch.cat([found.double(), largest.double(), thresholds.double()])
    most = torch.cat([candidates.most for candidates in bucket.candidates])
    limited = any(parameter.thresholds.max_overshoot is not None for parameter, _ in bucket.thresholded)
    entries = torch.minimum(found, most).sum()
    too_many = (found > most).any() if limited else torch.zeros_like(entries)
    exponent = shared_exponent(largest.amax(), entries, value_type)
    return torch.stack([entries, _first_bad(finite), too_many.long(), exponent.long()]).int()


def announce_dense(bucket: Bucket) -> Tensor:
    """Header of a bucket that is exchanged whole, without waiting for its device.

    Args:
        bucket: Before anything is done to it.

    Returns:
        As :func:`select`, on the device.
    """
    bad = _first_bad([torch.isfinite(bucket.buffer[part.place]).all().view(1) for part in bucket.parts])
    return torch.stack([torch.zeros_like(bad), bad, torch.zeros_like(bad), torch.zeros_like(bad)]).int()


def keep(bucket: Bucket, figures: Sequence[float], exponent: int, value_type: ValueType) -> None:
    """Choose what to send of the candidates, and pack it.

    Args:
        bucket: From :func:`select_later`; all its gradients are finite.
        figures: Its figures.
        exponent: That its header tells.
        value_type: As in :func:`select`.
    """
    assert bucket.candidates is not None
    count = len(bucket.candidates)
    selections = [
        parameter.keep(candidates, found=int(found), finite=math.isfinite(largest), threshold=threshold)
        for (parameter, _), candidates, found, largest, threshold in zip(
            bucket.thresholded,
            bucket.candidates,
            figures[:count],
            figures[count : 2 * count],
            figures[2 * count :],
            strict=True,
        )
    ]
    bucket.candidates = None
    if not any(selection.too_many for selection in selections):
        _pack(bucket, selections, value_type, exponent)


def _pack(bucket: Bucket, selections: Sequence[Selection], value_type: ValueType, exponent: int | None = None) -> None:
    bucket.counts = [selection.values.numel() for selection in selections]
    places = [place for _, place in bucket.thresholded]
    bucket.indices = torch.cat(
        [selection.indices + place.start for selection, place in zip(selections, places, strict=True)]
    )
    values = torch.cat([selection.values for selection in selections])
    bucket.message = encode(bucket.indices, values, bucket.buffer.numel(), value_type, exponent)


def _first_bad(finite: Sequence[Tensor]) -> Tensor:
    """1 + position of the first part that is not finite, 0 if there is none."""
    bad = torch.cat(list(finite)).logical_not()
    return torch.where(bad.any(), bad.int().argmax() + 1, 0)

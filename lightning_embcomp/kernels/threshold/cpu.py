"""Selection by a threshold on CPU: one pass, sixteen entries at a time, that reads and writes each of them once."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from lightning_embcomp.kernels.compile import threaded, threads_for
from lightning_embcomp.kernels.threshold.lanes import LANES, add_and_mark, lowest

_VALUES_PER_THREAD = 1 << 18


@threaded()
def _select(
    grad: Any,
    residual: Any,
    estimate: Any,
    factor: Any,
    gain: Any,
    rest: Any,
    threshold: Any,
    indices: Any,
    values: Any,
    chunks: Any,
    counts: Any,
) -> None:
    """Chunk c writes what it selects from ``chunks[c]`` on, and how much that is to ``counts[c]``.

    Residual and estimate are arrays or None; the kernel is compiled for each of the four kinds of message.
    """
    for chunk in numba.prange(chunks.shape[0] - 1):
        written = chunks[chunk]
        end = chunks[chunk + 1]
        whole = chunks[chunk] + (end - chunks[chunk]) // LANES * LANES
        for start in range(chunks[chunk], whole, LANES):
            marks = add_and_mark(grad, residual, estimate, start, factor, gain, rest, threshold)
            while marks != 0:
                i = start + lowest(marks)
                marks &= marks - np.uint64(1)
                change = grad[i] * factor
                if estimate is not None:
                    change -= estimate[i]
                if residual is not None:
                    values[written] = residual[i] if estimate is None else gain * residual[i] + rest * change
                else:
                    values[written] = change
                indices[written] = i
                written += 1
        for i in range(whole, end):
            change = grad[i] * factor
            if estimate is not None:
                change -= estimate[i]
            message = change
            if residual is not None:
                residual[i] += change
                message = residual[i] if estimate is None else gain * residual[i] + rest * change
            if not abs(message) < threshold:
                indices[written] = i
                values[written] = message
                written += 1
        counts[chunk] = written - chunks[chunk]


def select_large(
    grad: Tensor, residual: Tensor | None, estimate: Tensor | None, factor: float, gain: float, threshold: float
) -> tuple[Tensor, Tensor]:
    """Numba twin of :func:`lightning_embcomp.kernels.threshold.reference.select_large`."""
    n = grad.numel()
    # As large as everything, but only the pages that are written to exist.
    indices, values = torch.empty(n, dtype=torch.int32), torch.empty(n, dtype=torch.float32)
    threads = threads_for(n, _VALUES_PER_THREAD)
    chunks = np.linspace(0, n, threads + 1).astype(np.int64)
    counts = np.zeros(threads, np.int64)
    _select(
        threads,
        grad.numpy(),
        None if residual is None else residual.numpy(),
        None if estimate is None else estimate.numpy(),
        np.float32(factor),
        np.float32(gain),
        np.float32(1.0 - gain),  # rounded once, as in the other twins
        np.float32(threshold),
        indices.numpy(),
        values.numpy(),
        chunks,
        counts,
    )
    # Copies, so that the large pieces of memory go back.
    parts = [slice(int(first), int(first + count)) for first, count in zip(chunks[:-1], counts, strict=True)]
    return torch.cat([indices[part] for part in parts]), torch.cat([values[part] for part in parts])


def kth_largest(sizes: Tensor, rank: int) -> float:
    """NumPy's twin of :func:`lightning_embcomp.kernels.threshold.reference.kth_largest`, faster than sorting."""
    place = sizes.numel() - rank
    return float(np.partition(sizes.numpy(), place)[place])

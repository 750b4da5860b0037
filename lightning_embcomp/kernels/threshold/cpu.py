"""Selection by a threshold on CPU: one pass in pieces that stay in the cache, skipping words without a mark."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from lightning_embcomp.kernels.compile import threaded, threads_for

_PIECE = 2048
"""Values whose message and marks fit into the first cache; a multiple of the eight marks of a word."""
_VALUES_PER_THREAD = 1 << 18


@threaded()
def _select(
    grad: Any,
    residual: Any,
    estimate: Any,
    factor: Any,
    gain: Any,
    threshold: Any,
    has_residual: Any,
    has_estimate: Any,
    indices: Any,
    values: Any,
    chunks: Any,
    counts: Any,
) -> None:
    """Chunk c writes what it selects from ``chunks[c]`` on, and how much that is to ``counts[c]``."""
    rest = np.float32(1.0) - gain
    for chunk in numba.prange(chunks.shape[0] - 1):
        message = np.empty(_PIECE, np.float32)
        mark = np.empty(_PIECE, np.uint8)
        marks = mark.view(np.uint64)
        written = chunks[chunk]
        for start in range(chunks[chunk], chunks[chunk + 1], _PIECE):
            end = min(start + _PIECE, chunks[chunk + 1])
            # Loops over slices from 0 on are what the compiler turns into vector instructions.
            g = grad[start:end]
            if has_residual and has_estimate:
                e, h = residual[start:end], estimate[start:end]
                for i in range(end - start):
                    change = g[i] * factor - h[i]
                    e[i] += change
                    message[i] = gain * e[i] + rest * change
            elif has_residual:
                e = residual[start:end]
                for i in range(end - start):
                    e[i] += g[i] * factor
                    message[i] = e[i]
            elif has_estimate:
                h = estimate[start:end]
                for i in range(end - start):
                    message[i] = g[i] * factor - h[i]
            else:
                for i in range(end - start):
                    message[i] = g[i] * factor
            for i in range(end - start):
                mark[i] = np.uint8(0) if abs(message[i]) < threshold else np.uint8(1)
            for i in range(end - start, (end - start + 7) // 8 * 8):
                mark[i] = np.uint8(0)
            for word in range((end - start + 7) // 8):
                if marks[word] != 0:
                    # Every value is written, and overwritten by the next unless it was marked.
                    for i in range(word * 8, min(word * 8 + 8, end - start)):
                        indices[written] = start + i
                        values[written] = message[i]
                        written += mark[i]
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
    nothing = np.empty(0, np.float32)
    _select(
        threads,
        grad.numpy(),
        nothing if residual is None else residual.numpy(),
        nothing if estimate is None else estimate.numpy(),
        np.float32(factor),
        np.float32(gain),
        np.float32(threshold),
        residual is not None,
        estimate is not None,
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

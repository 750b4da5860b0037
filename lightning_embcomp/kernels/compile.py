"""Compile a Numba loop twice: serial, and with its ``prange`` spread over threads.

Numba hands even a single-threaded parallel region to its pool and waits, which on a busy machine costs a scheduler
quantum per call. Where one thread is enough the serial twin runs in the caller.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any, cast

import numba
import numpy as np
import torch

WEIGHT_KIND = {torch.float32: np.float32(0), torch.float16: np.uint16(0)}
"""What kernels that read and write weights of several dtypes are told them by; Numba compiles once for each."""


class ThreadedKernel:
    """A loop compiled on first use for one thread and for several.

    Args:
        loop: Python source of the loop; its outer ``prange`` runs over threads.
        options: Options of ``numba.njit``.
    """

    def __init__(self, loop: Callable[..., None], **options: Any) -> None:  # noqa: ANN401
        self.serial = numba.njit(cache=True, boundscheck=False, **options)(loop)
        self.parallel = numba.njit(cache=True, boundscheck=False, parallel=True, **options)(_copy(loop, "_parallel"))

    def __call__(self, threads: int, *args: Any) -> None:  # noqa: ANN401
        """Run on that many threads."""
        if threads > 1:
            numba.set_num_threads(threads)
            self.parallel(*args)
        else:
            self.serial(*args)


def threaded(**options: Any) -> Callable[[Callable[..., None]], ThreadedKernel]:  # noqa: ANN401
    """Decorate a loop over threads; the result takes the number of threads as its first argument."""
    return lambda loop: ThreadedKernel(loop, **options)


def threads_for(work: int, grain: int) -> int:
    """Threads worth using: what PyTorch was given, as far as Numba has that many and each gets ``grain`` items."""
    available: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    return max(1, min(torch.get_num_threads(), available, work // grain))


def _copy(loop: Callable[..., None], suffix: str) -> Callable[..., None]:
    """Copy a function under another name: Numba's disk cache tells kernels apart by name, not by options."""
    source = cast(FunctionType, loop)
    copy = FunctionType(source.__code__, source.__globals__, source.__name__ + suffix, source.__defaults__)
    copy.__qualname__ = source.__qualname__ + suffix
    copy.__module__ = source.__module__
    return copy

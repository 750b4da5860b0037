"""Choice of the backend of a kernel: by the device of its input, or forced for a comparison."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import torch

Backend = Literal["reference", "cpu", "triton"]

_forced: ContextVar[Backend | None] = ContextVar("embcomp_kernel_backend", default=None)


def backend_for(device: torch.device, *, has_triton: bool = False) -> Backend:
    """Return the backend that runs for tensors on ``device``.

    Args:
        device: Where the tensors are.
        has_triton: Whether the operation has a Triton kernel.

    Example:
        >>> backend_for(torch.device("cpu"))
        'cpu'
    """
    forced = _forced.get()
    if forced is not None:
        return forced
    if device.type == "cpu":
        return "cpu"
    return "triton" if has_triton and device.type == "cuda" else "reference"


@contextmanager
def force_backend(backend: Backend) -> Iterator[None]:
    """Run every kernel called inside the block on ``backend``, to compare twins.

    Example:
        >>> with force_backend("reference"):
        ...     backend_for(torch.device("cpu"))
        'reference'
    """
    token = _forced.set(backend)
    try:
        yield
    finally:
        _forced.reset(token)

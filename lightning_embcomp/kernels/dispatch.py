"""Choice of the backend of a kernel: by the device of its input, or forced for a comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from typing import Any, Literal, TypeVar, cast

import torch

Backend = Literal["reference", "cpu", "triton"]
_Kernel = TypeVar("_Kernel", bound=Callable[..., Any])

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


def choose(device: torch.device, cpu: _Kernel, reference: _Kernel) -> _Kernel:
    """Return the twin of a kernel that runs for tensors on ``device``, for operations with a Triton kernel.

    Args:
        device: Where the tensors are.
        cpu: The Numba kernel.
        reference: The plain twin, in the module ``reference``; the Triton kernel has its name and lies beside it.

    Example:
        >>> from lightning_embcomp.kernels.route import cpu, reference
        >>> choose(torch.device("cpu"), cpu.find, reference.find) is cpu.find
        True
    """
    backend = backend_for(device, has_triton=True)
    if backend == "cpu":
        return cpu
    return reference if backend == "reference" else cast(_Kernel, _triton_twin(reference))


@cache
def _triton_twin(reference: Callable[..., Any]) -> Callable[..., Any]:
    """Import the Triton kernel when it is first needed: Triton is not installed where there is no CUDA."""
    package = reference.__module__.rpartition(".")[0]
    found: Callable[..., Any] = getattr(import_module(f"{package}.triton"), reference.__name__)
    return found


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

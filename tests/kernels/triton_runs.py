"""What the checks of Triton kernels share: batches, twins, and the promise not to wait for the device.

A check runs the twin on CPU and the kernel on the device. While a kernel runs that promises not to wait for the device,
whatever would wait raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_embcomp.engine.layout import LogicalTable
from lightning_embcomp.kernels.dispatch import force_backend

from .cases import CASES, ONE_ROW, make_case

T = TypeVar("T")
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
_WAITS = {
    "aten::_local_scalar_dense",
    "aten::bincount",
    "aten::equal",
    "aten::is_nonzero",
    "aten::item",
    "aten::masked_select",
    "aten::nonzero",
    "aten::unique_consecutive",
    "aten::unique_dim",
    "aten::_unique2",
}


class NoWaiting(TorchDispatchMode):
    """Raises at operations that would make the host wait, were the tensors on a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        by_mask = name in ("aten::index", "aten::index_put_", "aten::index_put") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in _WAITS or by_mask or (name == "aten::repeat_interleave" and kwargs.get("output_size") is None):
            raise RuntimeError(f"{name} waits for the device")
        return func(*args, **kwargs)


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        with NoWaiting():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def run(device: torch.device, kernel: Callable[[], T], *, waits: bool = False) -> T:
    """Run a kernel; twice on a GPU, because the first time compiles and copies constants."""
    with force_backend("triton"):
        if waits:
            return kernel()
        if device.type == "cuda":
            kernel()
        with no_waiting(device):
            return kernel()


def twin(kernel: Callable[[], T]) -> T:
    with force_backend("reference"):
        return kernel()


def on(device: torch.device, value: Any) -> Any:
    """Copy of tensors, and of what holds tensors, on a device."""
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    if is_dataclass(value) and not isinstance(value, type):
        changes = {field.name: on(device, getattr(value, field.name)) for field in fields(value)}
        if "address" in changes and "rows" in changes:
            changes["address"] = on(
                device, torch.tensor([rows.data_ptr() for rows in changes["rows"]], dtype=torch.int64)
            )
        return replace(value, **changes)
    if isinstance(value, (list, tuple)):
        return type(value)(on(device, entry) for entry in value)
    return value


def on_device(device: torch.device, *values: Any) -> list[Any]:
    return [on(device, value) for value in values]


def close(found: Any, wanted: Any, **tolerance: float) -> None:
    """Same tensors, wherever they are."""
    if isinstance(wanted, Tensor):
        torch.testing.assert_close(found.detach().cpu(), wanted, **(tolerance or CLOSE))
    elif wanted is None:
        assert found is None
    elif is_dataclass(wanted):
        for field in fields(wanted):
            close(getattr(found, field.name), getattr(wanted, field.name), **tolerance)
    elif isinstance(wanted, (list, tuple)):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            close(one, other, **tolerance)
    else:
        assert found == wanted


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def strided(tensor: Tensor) -> Tensor:
    """The same values, not contiguous."""
    return torch.stack([tensor, tensor], tensor.dim())[..., 0]


ODD = make_case(
    (LogicalTable(name="w", rows=200, dim=148, chunks=1), LogicalTable(name="n", rows=90, dim=20, chunks=5)),
    (1, 0),
    (True, False),
    batch_size=17,
    weighted=True,
    seed=8,
)
"""Output wider than a block of columns, and more bags than a block of rows."""
HOT = make_case(ONE_ROW, (0,), (True,), code=1, batch_size=6, longest_bag=90, weighted=True, seed=9)
"""A row with more occurrences than two pieces of sorted ids have."""
assert len(HOT.ids) > 200
ALL = {**CASES, "odd": ODD, "hot": HOT}
SOME = ("weighted", "duplicates", "nothing_stored", "all_empty", "no_batch", "odd", "hot")

CHECKS: dict[str, Callable[[torch.device], None]] = {}


def add(check: Callable[..., None], *variants: tuple[Any, ...]) -> None:
    def bound(variant: tuple[Any, ...]) -> Callable[[torch.device], None]:
        return lambda device: check(device, *variant)

    for variant in variants:
        words = [str(word).removeprefix("torch.") for word in variant]
        CHECKS["-".join([check.__name__.removeprefix("check_"), *words])] = bound(variant)

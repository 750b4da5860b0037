"""A GPU that is not there: tensors in host memory that count as tensors of ``cuda:0``.

Unlike tensors of PyTorch's fake mode they have values, so whole runs can be compared with runs on the CPU. What a GPU
refuses is refused: operations and exchanges over tensors of both devices, and NumPy's view of a tensor. Where the host
would wait is noted. Triton kernels are stood for by the CPU's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from importlib import import_module
from types import FrameType, SimpleNamespace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from lightning_embcomp.kernels.count import RowCounts

GPU = torch.device("cuda", 0)
_ATEN = torch.ops.aten
_COPY = _ATEN.copy_.default
_INDEXING = {_ATEN.index.Tensor, _ATEN.index_put_.default, _ATEN.index_put.default, _ATEN._index_put_impl_.default}
_WAITS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_consecutive",
    "equal",
    "bincount",
    "is_nonzero",
}


class PretendGPU(TorchDispatchMode):
    """Watches every operation.

    Attributes:
        waits: Where the host would have waited: package (``lightning_embcomp``, ``torchrec`` or other), file and name.
    """

    _held: ClassVar[dict[int, Any]] = {}
    """Storages of the GPU, kept alive so that none takes the place of another; for all, as caches outlive a block."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[tuple[str, str, str]] = []
        self._born: dict[int, Any] = {}
        self._off = 0

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor counts as one of the GPU."""
        return not self._off and _storage(tensor) in self._held

    def take(self, found: Any) -> Any:
        """Count all tensors in something as tensors of the GPU."""
        for tensor in _tensors(found):
            self._held[_storage(tensor)] = tensor.untyped_storage()
        return found

    @contextmanager
    def off(self) -> Iterator[None]:
        """Nothing counts inside the block."""
        self._off += 1
        try:
            with _disable_current_modes():
                yield
        finally:
            self._off -= 1

    def note(self, what: str) -> None:
        """Note that the host waits."""
        self.waits.append((*_origin(sys._getframe(1)), what))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device, target = kwargs.get("device"), None
        if device is not None:
            target = torch.device(device).type == "cuda"
            kwargs["device"] = torch.device("cpu") if target else device
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        given = list(_tensors((args, kwargs)))
        self._adopt(given)
        here = [self.holds(tensor) for tensor in given]
        self._check(func, args, kwargs, given, here)
        found = func(*args, **kwargs)
        # PyTorch fills the device in where a dtype changes; :meth:`torch.Tensor.to` is ours.
        if target or (any(here) and (target is None or func is _ATEN._to_copy.default) and func is not _COPY):
            self.take(found)
        elif target is False and _innermost(sys._getframe(1)) == _BACKWARD:
            self._born |= {_storage(tensor): tensor.untyped_storage() for tensor in _tensors(found)}
        return found

    def _adopt(self, given: list[Tensor]) -> None:
        """Tensors that autograd made, whose code does not ask us for the device, go where they are first used."""
        if self._born and any(self.holds(tensor) for tensor in given):
            self.take([tensor for tensor in given if _storage(tensor) in self._born])

    def _check(self, func: Any, args: Any, kwargs: Any, given: list[Tensor], here: list[bool]) -> None:
        name = func._schema.name.partition("::")[2]
        if func._schema.name.startswith("c10d::"):
            if not all(here) and not _of_pytorch(sys._getframe(2)):
                raise RuntimeError(f"{name}: a tensor in host memory is handed to NCCL")
            return
        if func in (_COPY, _ATEN.mul.out) and any(here) and _of_pytorch(sys._getframe(2)):
            self.take(given)  # buckets of DDP, whose code does not ask us for the device
            return
        if func is _COPY:
            if here[0] != here[1] and not (len(args) > 2 and args[2]) and (given[1].dim() or here[1]):
                self.note("copy")
            return
        if any(here):
            considered = given[:1] if func in _INDEXING else given
            if any(tensor.dim() and not self.holds(tensor) for tensor in considered):
                raise RuntimeError(f"{func}: tensors of both devices, of shapes {[tuple(t.shape) for t in given]}")
            masks = func in _INDEXING and any(t.dtype in (torch.bool, torch.uint8) for t in _tensors(args[1]))
            lists = func in _INDEXING and not all(here)
            unsized = name == "repeat_interleave" and len(given) == 1 and not (args[1:] or kwargs)
            if name in _WAITS or masks or lists or unsized:
                self.note(name)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _tensors(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        if found.layout == torch.strided:
            yield found
    elif isinstance(found, Mapping):
        for value in found.values():
            yield from _tensors(value)
    elif isinstance(found, list | tuple):
        for value in found:
            yield from _tensors(value)
    elif isinstance(found, RowCounts):
        yield from _tensors(found.tables)  # the rest is the host's
    elif is_dataclass(found) and not isinstance(found, type):
        for field in fields(found):
            yield from _tensors(getattr(found, field.name))


def _origin(frame: FrameType | None) -> tuple[str, str]:
    """Whose code is running, from the inside out."""
    while frame is not None:
        for package in ("lightning_embcomp", "torchrec"):
            place = frame.f_code.co_filename.rpartition(f"/{package}/")
            if place[1]:
                return package, place[2]
        frame = frame.f_back
    return "other", ""


def _of_pytorch(frame: FrameType | None) -> bool:
    """Whether it is PyTorch that exchanges: Python objects, which it puts where they belong, or gradients in DDP."""
    if _innermost(frame) == _BACKWARD:
        return True
    while frame is not None:
        code = frame.f_code
        if code.co_name.endswith(("_object", "_object_list", "barrier")):
            return True
        if code.co_filename.endswith("torch/nn/parallel/distributed.py"):
            return True
        frame = frame.f_back
    return False


_BACKWARD = "_engine_run_backward"


def _innermost(frame: FrameType | None) -> str:
    """The Python function that is running; for code of autograd, the one that runs the backward pass."""
    while frame is not None and frame.f_code.co_filename.endswith(("torch/_compile.py", "_dynamo/eval_frame.py")):
        frame = frame.f_back
    return "" if frame is None else frame.f_code.co_name


@contextmanager
def pretended_gpu() -> Iterator[PretendGPU]:
    """Let there be a GPU inside the block, and NCCL between those of several processes."""
    import lightning_embcomp.engine.group as group
    import lightning_embcomp.kernels.dispatch as dispatch

    gpu = PretendGPU()
    kept: list[tuple[Any, str, Any]] = []

    def put(owner: Any, name: str, value: Any) -> Any:
        before = getattr(owner, name)
        kept.append((owner, name, before))
        setattr(owner, name, value)
        return before

    device, cuda = cast(Any, torch.Tensor.device), cast(Any, torch.Tensor.is_cuda)
    put(torch.Tensor, "device", property(lambda t: GPU if gpu.holds(t) else device.__get__(t)))
    put(torch.Tensor, "is_cuda", property(lambda t: gpu.holds(t) or cuda.__get__(t)))

    def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kwargs.pop("copy", None)
        target, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        here = gpu.holds(tensor)
        result = tensor if dtype is None else before_to(tensor, dtype)
        if target is None or (target.type == "cuda") == here:
            return result
        if not non_blocking and tensor.dim():
            gpu.note("to")
        # Under autograd, as a copy is; what comes out belongs to the other device.
        moved = _Moved.apply(result, gpu, target.type == "cuda")
        return moved

    before_to = put(torch.Tensor, "to", to)
    put(torch.Tensor, "cpu", lambda tensor: tensor.to("cpu"))
    put(torch.Tensor, "cuda", lambda tensor: tensor.to(GPU))
    put(torch.Tensor, "pin_memory", lambda tensor: tensor)
    put(torch.Tensor, "record_stream", lambda tensor, stream: None)

    def numpy(tensor: Tensor) -> Any:
        if gpu.holds(tensor):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        return before_numpy(tensor)

    before_numpy = put(torch.Tensor, "numpy", numpy)

    def tolist(tensor: Tensor) -> Any:
        if gpu.holds(tensor):
            gpu.note("tolist")
        with gpu.off():
            return before_tolist(tensor)

    before_tolist = put(torch.Tensor, "tolist", tolist)

    def made(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def build(data: Any, **kwargs: Any) -> Tensor:
            place = kwargs.pop("device", None)
            found = make(data, **kwargs)
            return found if place is None else found.to(place)

        return build

    put(torch, "tensor", made(torch.tensor))
    put(torch, "as_tensor", made(torch.as_tensor))

    def twin(reference: Callable[..., Any]) -> Callable[..., Any]:
        if reference.__module__.split(".")[-2] in ("relocate", "decide"):
            return reference  # at events, where the host may wait and keeps some of the numbers
        package = reference.__module__.rpartition(".")[0]
        kernel = getattr(import_module(f"{package}.cpu"), reference.__name__, reference)

        def run(*args: Any, **kwargs: Any) -> Any:
            if not all(gpu.holds(tensor) for tensor in _tensors((args, kwargs)) if tensor.dim()):
                raise RuntimeError(f"{reference.__module__}.{reference.__name__}: a kernel is given host memory")
            with gpu.off():
                found = kernel(*args, **kwargs)
            return gpu.take(found)

        return run

    put(dispatch, "_triton_twin", twin)
    put(group, "device_types", lambda group=None: {"cuda"})
    stream = SimpleNamespace(synchronize=lambda: gpu.note("synchronize"), wait_stream=lambda other: None)
    event = SimpleNamespace(record=lambda stream: None, query=lambda: True, synchronize=stream.synchronize)
    put(torch.cuda, "current_stream", lambda device=None: stream)
    put(torch.cuda, "is_current_stream_capturing", lambda: False)
    put(torch.cuda, "Event", lambda: event)
    put(torch.cuda, "current_device", lambda: 0)
    put(torch.cuda, "set_device", lambda device: None)
    put(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    put(torch.cuda, "get_rng_state", lambda device=None: torch.zeros(16, dtype=torch.uint8))
    put(torch.cuda, "set_rng_state", lambda state, device=None: None)
    put(torch.cuda, "_lazy_init", lambda: None)
    try:
        with gpu:
            yield gpu
    finally:
        for owner, name, value in reversed(kept):
            setattr(owner, name, value)


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, gpu: PretendGPU, there: bool) -> Tensor:
        ctx.gpu, ctx.there = gpu, there
        return _copied(tensor, gpu, there)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _copied(grads[0], ctx.gpu, not ctx.there), None, None


def _copied(tensor: Tensor, gpu: PretendGPU, there: bool) -> Tensor:
    with gpu.off():
        found = tensor.detach().clone()
    return gpu.take(found) if there else found

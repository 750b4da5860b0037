"""Build modules without allocating their embedding tables.

A table that will be stored compressed must not exist in full first. Inside :func:`deferred_tables` embedding modules
put their weights on the meta device; the engine later initialises live weights only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection, FusedEmbeddingCollection

_FACTORIES = {
    torch.empty,
    torch.zeros,
}  # what embedding modules allocate tables with; small tensors come from torch.tensor


class DeferredTableError(RuntimeError):
    """Code changed the weights of a table that is not allocated yet."""


class _Deferral(TorchFunctionMode):
    """Inside table constructors: create tensors on the meta device. Outside: refuse in-place changes of them."""

    def __init__(self) -> None:
        super().__init__()
        self.constructors = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        given = dict(kwargs or {})
        if not self.constructors:
            _refuse_in_place(func, (*args, *given.values()))
        elif func in _FACTORIES and given.get("dtype") not in (torch.int32, torch.int64):
            given["device"] = torch.device("meta")
        return func(*args, **given)


def _refuse_in_place(func: Callable[..., Any], args: Sequence[Any]) -> None:
    name = getattr(func, "__name__", "")
    changes = name.endswith("_") and not name.endswith("__") and name not in ("requires_grad_", "detach_")
    changes = changes or name == "__setitem__"
    changed = next((arg for arg in args if isinstance(arg, torch.Tensor)), None)
    if changes and changed is not None and changed.is_meta:
        raise DeferredTableError(
            f"{name} on an embedding table of shape {tuple(changed.shape)} that is not allocated yet: its values would"
            " be lost. Give the initialiser to the table instead (init_fn of EmbeddingBagConfig), or build the model in"
            " __init__, where tables exist in full"
        )


@contextmanager
def deferred_tables() -> Iterator[None]:
    """Put the weights of all embedding modules built inside the block on the meta device.

    Covers ``nn.Embedding`` and ``nn.EmbeddingBag``, hence TorchRec's collections, and TorchRec's fused collections.
    Other modules are built as usual.

    Raises:
        DeferredTableError: If code inside the block initialises such a table in place.

    Example:
        >>> with deferred_tables():
        ...     table, dense = nn.EmbeddingBag(10**9, 64), nn.Linear(2, 2)
        >>> table.weight.device.type, dense.weight.device.type
        ('meta', 'cpu')
    """
    # TorchRec's collections run init_fn in their own constructors, after those of the embeddings inside.
    patched = (
        nn.Embedding,
        nn.EmbeddingBag,
        EmbeddingBagCollection,
        EmbeddingCollection,
        FusedEmbeddingBagCollection,
        FusedEmbeddingCollection,
    )
    originals = [cls.__init__ for cls in patched]
    deferral = _Deferral()
    for cls, original in zip(patched, originals, strict=True):
        cls.__init__ = _counted(original, deferral)
    try:
        with deferral:
            yield
    finally:
        for cls, original in zip(patched, originals, strict=True):
            cls.__init__ = original


def _counted(original: Callable[..., None], deferral: _Deferral) -> Callable[..., None]:
    @wraps(original)
    def init(self: nn.Module, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        deferral.constructors += 1
        try:
            original(self, *args, **kwargs)
        finally:
            deferral.constructors -= 1

    return init

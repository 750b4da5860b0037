"""The embedding collections of a module: which can be sharded, and which are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn
from torchrec.distributed.types import ModuleSharder, ShardedModule
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection, FusedEmbeddingCollection
from torchrec.modules.mc_embedding_modules import BaseManagedCollisionEmbeddingCollection

from lightning_embcomp.strategies.errors import ShardingError
from lightning_embcomp.strategies.sharders import SharderFor

STOCK = (EmbeddingBagCollection, EmbeddingCollection, FusedEmbeddingBagCollection, FusedEmbeddingCollection)
"""What TorchRec's own sharders take, by exact type."""

_MARK = "_embcomp_sharded"


@dataclass(frozen=True, kw_only=True)
class Shardable:
    """A collection that is to be sharded.

    Args:
        module: The collection.
        sharder: The sharder that the caller has chosen for it; None for the default one.
    """

    module: nn.Module
    sharder: ModuleSharder[nn.Module] | None


def mark_sharded(module: nn.Module) -> None:
    """Remember that a module holds this process's share of tables."""
    setattr(module, _MARK, True)


def is_sharded(module: nn.Module) -> bool:
    """Whether a module is a sharded collection: TorchRec's, or one that a sharder of the caller has built."""
    return isinstance(module, ShardedModule) or bool(getattr(module, _MARK, False))


def find_sharded(root: nn.Module) -> dict[str, nn.Module]:
    """Find the sharded collections below a module, by path.

    Args:
        root: The module; it may be one itself, with the empty path.

    Example:
        >>> find_sharded(nn.Linear(2, 2))
        {}
    """
    return dict(_outermost(root, lambda _, module: is_sharded(module)))


def find_shardable(root: nn.Module, sharder_for: SharderFor | None = None) -> dict[str, Shardable]:
    """Find the collections below a module that are still to be sharded, by path.

    A collection that is registered in several places appears once for each.

    Args:
        root: The module.
        sharder_for: Chooses a sharder by path and module, outermost modules first; None for the default one.

    Raises:
        ShardingError: If there is a collection that TorchRec would leave unsharded in silence, or train wrongly, or
            a chosen sharder is for another type of module.

    Example:
        >>> find_shardable(nn.Linear(2, 2))
        {}
    """
    chosen: dict[str, ModuleSharder[nn.Module]] = {}

    def wanted(path: str, module: nn.Module) -> bool:
        if is_sharded(module):
            return True
        sharder = sharder_for(path, module) if sharder_for is not None else None
        if sharder is not None:
            if sharder.module_type is not type(module):
                raise ShardingError(
                    f"{path!r} is a {type(module).__name__}, but the sharder given for it, {type(sharder).__name__},"
                    f" takes {sharder.module_type.__name__}: TorchRec compares exact types"
                )
            chosen[path] = sharder
            return True
        if type(module) in STOCK:
            return True
        _check_known(path, module)
        return False

    found = dict(_outermost(root, wanted))
    return {
        path: Shardable(module=module, sharder=chosen.get(path))
        for path, module in found.items()
        if not is_sharded(module)
    }


def _outermost(root: nn.Module, wanted: Callable[[str, nn.Module], bool]) -> Iterator[tuple[str, nn.Module]]:
    """Modules that are wanted, by path; what is inside them is not looked at."""
    queue = [("", root)]
    while queue:
        path, module = queue.pop(0)
        if wanted(path, module):
            yield path, module
            continue
        queue.extend((f"{path}.{name}" if path else name, child) for name, child in module.named_children())


def _check_known(path: str, module: nn.Module) -> None:
    if isinstance(module, STOCK):
        stock = next(cls for cls in STOCK if isinstance(module, cls))
        raise ShardingError(
            f"{path!r} is a {type(module).__name__}, a subclass of {stock.__name__}: TorchRec's sharders take the exact"
            f" type and would leave it whole on every process. Hold a {stock.__name__} inside a module of your own, or"
            " give a sharder for it (strategy.shard(..., sharder_for=...))"
        )
    if isinstance(module, BaseManagedCollisionEmbeddingCollection):
        raise ShardingError(
            f"{path!r} is a {type(module).__name__}, whose id maps would drift apart on several processes: give"
            " TorchRec's sharder for it (strategy.shard(..., sharder_for=...))"
        )

"""TorchRec's sharders, with every sharding type that works, and one sharder for each place in the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.fused_embedding import FusedEmbeddingCollectionSharder
from torchrec.distributed.fused_embeddingbag import FusedEmbeddingBagCollectionSharder
from torchrec.distributed.types import ModuleSharder, ParameterSharding, QuantizedCommCodecs, ShardingEnv, ShardingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from lightning_embcomp.engine.sharded.means import divide_by_name

SharderFor = Callable[[str, nn.Module], "ModuleSharder[nn.Module] | None"]
"""Chooses the sharder of the module at a path; None for the default one."""

Codecs = Mapping[str, QuantizedCommCodecs]


class _OpenTypes:
    """Offers row-wise sharding on the CPU too, where it works but is hidden."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        types: list[str] = super().sharding_types(compute_device_type)  # type: ignore[misc]
        return [*dict.fromkeys([*types, ShardingType.ROW_WISE.value])]


class _NamedMeans:
    """Has sums of rows divided by the feature's own bag lengths, where tables are averaged and sharded by rows."""

    def shard(
        self,
        module: EmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> Any:  # noqa: ANN401 - of TorchRec, another class for each sharder
        """Shard a collection."""
        sharded: Any = super().shard(module, params, env, device, module_fqn)  # type: ignore[misc]
        divide_by_name(sharded, module.embedding_bag_configs(), params)
        return sharded


class BagSharder(_OpenTypes, _NamedMeans, EmbeddingBagCollectionSharder):
    """Shards ``EmbeddingBagCollection``."""


class SequenceSharder(_OpenTypes, EmbeddingCollectionSharder):
    """Shards ``EmbeddingCollection``."""


class FusedBagSharder(_OpenTypes, _NamedMeans, FusedEmbeddingBagCollectionSharder):
    """Shards ``FusedEmbeddingBagCollection``."""


class FusedSequenceSharder(_OpenTypes, FusedEmbeddingCollectionSharder):
    """Shards ``FusedEmbeddingCollection``."""


def default_sharders(
    fused_params: Mapping[str, Any] | None = None, codecs: Codecs | None = None
) -> dict[type[nn.Module], ModuleSharder[nn.Module]]:
    """Build the sharders that are used where the caller gives none.

    Args:
        fused_params: Arguments for FBGEMM's tables, for those that have no optimizer of their own.
        codecs: Codecs of the exchange of rows and gradients, by TorchRec's name of the operation.

    Returns:
        A sharder for each type of module.

    Example:
        >>> sharder = default_sharders()[BagSharder().module_type]
        >>> "row_wise" in sharder.sharding_types("cpu")
        True
    """
    params = dict(fused_params) if fused_params else None
    registry = codecs if isinstance(codecs, dict) or codecs is None else dict(codecs)
    sharders: list[ModuleSharder[Any]] = [
        BagSharder(params, registry),
        SequenceSharder(params, registry),
        FusedBagSharder(params, registry),
        FusedSequenceSharder(params, registry),
    ]
    return {sharder.module_type: sharder for sharder in sharders}


class SharderByModule(ModuleSharder[nn.Module]):
    """One sharder in place of several for the same type, since TorchRec's planner knows one for each type.

    Args:
        module_type: The type.
        by_module: The sharder of each module, by its ``id``.
    """

    def __init__(self, module_type: type[nn.Module], by_module: Mapping[int, ModuleSharder[nn.Module]]) -> None:
        super().__init__()
        self._module_type = module_type
        self._by_module = dict(by_module)
        self._all = list({id(sharder): sharder for sharder in by_module.values()}.values())
        self.fused_params = next((p for s in self._all if (p := getattr(s, "fused_params", None))), None)

    @property
    def qcomm_codecs_registry(self) -> dict[str, QuantizedCommCodecs] | None:
        """Codecs, for the planner's estimates: those of the first sharder that has some."""
        return next((r for s in self._all if (r := s.qcomm_codecs_registry)), None)

    @property
    def module_type(self) -> type[nn.Module]:
        """The type of module."""
        return self._module_type

    def shard(
        self,
        module: nn.Module,
        params: Any,  # noqa: ANN401 - TorchRec's, which differs between sharders
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> Any:  # noqa: ANN401
        """Shard with the module's own sharder."""
        return self._by_module[id(module)].shard(module, params, env, device, module_fqn)

    def shardable_parameters(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """Tables of a module."""
        return self._by_module[id(module)].shardable_parameters(module)

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """What any of the sharders offers; constraints of each table narrow it."""
        return [*dict.fromkeys(t for s in self._all for t in s.sharding_types(compute_device_type))]

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        """What any of the sharders offers."""
        return [*dict.fromkeys(k for s in self._all for k in s.compute_kernels(sharding_type, compute_device_type))]

    def storage_usage(self, tensor: torch.Tensor, compute_device_type: str, compute_kernel: str) -> dict[str, int]:
        """Memory of a table."""
        return self._all[0].storage_usage(tensor, compute_device_type, compute_kernel)

"""Averages of bags whose rows are added up on several processes.

Where a table is sharded by rows, every process sums the rows that it holds, and the sum over processes has to be
divided by the length of the bag. TorchRec divides by place, and takes the place of another feature where a feature is
looked up in several tables or a collection mixes sharding types; here it is done by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, cat, nn
from torchrec.distributed.types import ParameterSharding, ShardingType
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import get_embedding_names_by_table
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

_SUMMED = (ShardingType.ROW_WISE.value, ShardingType.TABLE_ROW_WISE.value, ShardingType.GRID_SHARD.value)


def summed_means(configs: Sequence[EmbeddingBagConfig], plan: Mapping[str, ParameterSharding]) -> dict[str, str]:
    """Outputs that arrive as sums and are to be averages.

    Args:
        configs: Tables of the collection.
        plan: TorchRec's plan for them.

    Returns:
        Feature by name of the output.
    """
    return {
        name: feature
        for config, names in zip(configs, get_embedding_names_by_table(list(configs)), strict=True)
        if config.pooling == PoolingType.MEAN and plan[config.name].sharding_type in _SUMMED
        for name, feature in zip(names, config.feature_names, strict=True)
    }


def bag_lengths(features: KeyedJaggedTensor, summed: Mapping[str, str]) -> dict[str, Tensor]:
    """Lengths of the bags of some outputs.

    Args:
        features: The batch.
        summed: From :func:`summed_means`.

    Returns:
        Lengths ``(B,)`` by name of the output.

    Raises:
        ValueError: If the features differ in batch size.

    Example:
        >>> import torch
        >>> batch = KeyedJaggedTensor(["a"], torch.arange(3), lengths=torch.tensor([1, 2]))
        >>> bag_lengths(batch, {"a@t0": "a"})
        {'a@t0': tensor([1, 2])}
    """
    if features.variable_stride_per_key():
        raise ValueError(
            "the features of the batch differ in batch size, which tables that are averaged and sharded by rows do not"
            " support: shard them as a whole"
        )
    # By place, not by key, for which TorchRec would have to know how many ids each feature has.
    keys, lengths = features.keys(), features.lengths().reshape(len(features.keys()), features.stride())
    return {name: lengths[keys.index(feature)] for name, feature in summed.items()}


def averaged(pooled: KeyedTensor, lengths: Mapping[str, Tensor]) -> KeyedTensor:
    """Divide some outputs by the lengths of their bags; empty bags stay zero.

    Args:
        pooled: Sums.
        lengths: From :func:`bag_lengths`.
    """
    keys, widths = pooled.keys(), pooled.length_per_key()
    parts = [
        values / lengths[key].clamp(min=1).unsqueeze(1) if key in lengths else values
        for key, values in zip(keys, pooled.values().split(widths, 1), strict=True)
    ]
    return KeyedTensor(keys=keys, length_per_key=widths, values=cat(parts, 1))


def divide_by_name(
    module: Any,  # noqa: ANN401 - TorchRec's sharded collection of bags, of several classes
    configs: Sequence[EmbeddingBagConfig],
    plan: Mapping[str, ParameterSharding],
) -> None:
    """Put the division by name in the place of TorchRec's own in a sharded collection.

    Args:
        module: The sharded collection.
        configs: Its tables.
        plan: TorchRec's plan for them.
    """
    summed = summed_means(configs, plan)
    if not summed:
        return
    module._has_mean_pooling_callback = False
    # Hooks, so that the division happens whichever way a pipeline goes through the module.
    module.register_forward_hook(partial(_divide, summed), with_kwargs=True)


def _divide(
    summed: Mapping[str, str],
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    output: Any,  # noqa: ANN401 - TorchRec's lazy one, which takes callbacks
) -> None:
    features = args[0] if args else kwargs["features"]
    lengths = bag_lengths(features, summed)
    output.callbacks.append(lambda pooled: averaged(pooled, lengths))

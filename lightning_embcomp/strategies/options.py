"""Options of the strategy: reading and checking them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torchrec.distributed.fbgemm_qcomm_codec import QCommsConfig, get_qcomm_codecs_registry
from torchrec.distributed.types import QuantizedCommCodecs, ShardingType
from torchrec.distributed.utils import optimizer_type_to_emb_opt_type
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection, FusedEmbeddingCollection
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from lightning_embcomp.methods.dct.codecs import CodecRegistry, PooledThresholding, comm_codecs
from lightning_embcomp.strategies.errors import ShardingError

SHARDING_TYPES = tuple(kind.value for kind in ShardingType)
COLUMN_WISE = (ShardingType.COLUMN_WISE.value, ShardingType.TABLE_COLUMN_WISE.value)

_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "rowwise_adagrad": RowWiseAdagrad,
    "adam": torch.optim.Adam,
}


def check_sharding(sharding: Mapping[str, str | Sequence[str]] | None) -> dict[str, tuple[str, ...]]:
    """Read the sharding types that are allowed for tables.

    Args:
        sharding: Sharding types by a glob of table names.

    Returns:
        The same with a tuple for each glob.

    Raises:
        ValueError: If there is no such sharding type.

    Example:
        >>> check_sharding({"user_*": "row_wise"})
        {'user_*': ('row_wise',)}
    """
    read: dict[str, tuple[str, ...]] = {}
    for pattern, kinds in (sharding or {}).items():
        read[pattern] = (kinds,) if isinstance(kinds, str) else tuple(kinds)
        for kind in read[pattern]:
            if kind not in SHARDING_TYPES:
                raise ValueError(
                    f"sharding={{{pattern!r}: {kind!r}}}: there is no such sharding type; choose from"
                    f" {', '.join(SHARDING_TYPES)}"
                )
        if not read[pattern]:
            raise ValueError(f"sharding={{{pattern!r}: []}} leaves no sharding type; drop the entry to allow all")
    return read


def check_fused_params(fused_params: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Read the arguments for FBGEMM's tables; the optimizer may be given by name.

    Args:
        fused_params: ``optimizer`` (``sgd``, ``adagrad``, ``rowwise_adagrad``, ``adam``, or FBGEMM's ``EmbOptimType``),
            ``learning_rate``, and whatever else FBGEMM's table batched embeddings take.

    Returns:
        What TorchRec's sharders take.

    Raises:
        ValueError: If there is an optimizer without a learning rate, or the other way round, or an unknown name.

    Example:
        >>> str(check_fused_params({"optimizer": "sgd", "learning_rate": 0.1})["optimizer"])
        'exact_sgd'
    """
    if fused_params is None:
        return None
    params = dict(fused_params)
    if ("optimizer" in params) != ("learning_rate" in params):
        # FBGEMM would fill the gap with SGD, or with a rate of 0.01.
        raise ValueError(f"fused_params={params!r}: give both 'optimizer' and 'learning_rate', or neither")
    name = params.get("optimizer")
    if isinstance(name, str):
        if name not in _OPTIMIZERS:
            raise ValueError(
                f"fused_params: there is no optimizer {name!r}; choose from {', '.join(_OPTIMIZERS)}, or give FBGEMM's"
                " EmbOptimType"
            )
        params["optimizer"] = optimizer_type_to_emb_opt_type(_OPTIMIZERS[name])
    return params


def read_codecs(
    codecs: PooledThresholding | QCommsConfig | Mapping[str, QuantizedCommCodecs] | None, device: torch.device
) -> dict[str, QuantizedCommCodecs] | None:
    """Read the codecs of the exchange of rows and gradients.

    Args:
        codecs: Our configuration, TorchRec's, or codecs by operation.
        device: Where tensors are encoded.

    Returns:
        Codecs by TorchRec's name of the operation; None for plain exchange.

    Example:
        >>> read_codecs(None, torch.device("cpu")) is None
        True
    """
    if codecs is None:
        return None
    if isinstance(codecs, QCommsConfig):
        return get_qcomm_codecs_registry(codecs, device=device)
    if isinstance(codecs, PooledThresholding):
        return comm_codecs(codecs)
    return codecs if isinstance(codecs, dict) else dict(codecs)


def check_earlier_codecs(asked: Mapping[str, QuantizedCommCodecs] | None, earlier: Mapping[str, nn.Module]) -> None:
    """Refuse codecs that come too late for collections which were sharded before: these keep what they have.

    Args:
        asked: Codecs of the strategy; None leaves the collections as they are.
        earlier: The collections, by path.

    Raises:
        ShardingError: If a collection was sharded with other codecs.

    Example:
        >>> check_earlier_codecs(comm_codecs(PooledThresholding(row_dim=8, forward_density=0.5)), {"bags": nn.Module()})
        Traceback (most recent call last):
            ...
        lightning_embcomp.strategies.errors.ShardingError: codecs come too late for 'bags', which was sharded...
    """
    for path, module in earlier.items() if asked else ():
        held: Mapping[str, QuantizedCommCodecs] = getattr(module, "qcomm_codecs_registry", None) or {}
        configs = [codecs.config for codecs in (asked, held) if isinstance(codecs, CodecRegistry)]
        if held != asked and not (len(configs) == 2 and configs[0] == configs[1]):
            raise ShardingError(
                f"codecs come too late for {path!r}, which was sharded before with {'other' if held else 'no'} codecs"
                " and keeps them. Leave codecs out, or save a checkpoint and load it into a new module"
            )


def column_width(columns: int, processes: int) -> int:
    """Choose the columns of a shard when a table is to be cut by columns.

    Args:
        columns: Columns of the table.
        processes: Number of processes.

    Returns:
        The smallest multiple of 4 that divides ``columns`` and needs at most ``processes`` shards; all columns where
        there is none.

    Example:
        >>> column_width(64, 2), column_width(24, 4), column_width(6, 2)
        (32, 8, 6)
    """
    widths = (width for width in range(4, columns + 1, 4) if columns % width == 0 and columns // width <= processes)
    return next(widths, columns)


def fused_optimizer_name(
    module: nn.Module, parameter: torch.Tensor, fused_params: Mapping[str, Any] | None
) -> str | None:
    """Name the optimizer that runs inside the backward pass of a table.

    Args:
        module: The collection that holds the table.
        parameter: The table's weights.
        fused_params: Arguments for tables without an optimizer of their own.

    Returns:
        The name; None for a table that is trained from ``configure_optimizers``.

    Example:
        >>> fused_optimizer_name(nn.Module(), torch.zeros(2), None) is None
        True
    """
    if isinstance(module, FusedEmbeddingBagCollection | FusedEmbeddingCollection):
        return module.optimizer_type().__name__
    classes = getattr(parameter, "_optimizer_classes", None)
    if classes:
        return str(classes[0].__name__)
    optimizer = (fused_params or {}).get("optimizer")
    return None if optimizer is None else str(optimizer)

"""Build the embedding tables of the reference models."""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingBagCollectionInterface
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

EmbeddingOptimizer: TypeAlias = Literal["rowwise_adagrad", "sgd", "none"]
Pooling: TypeAlias = Literal["sum", "mean"]

_FUSED: dict[str, type[torch.optim.Optimizer]] = {"rowwise_adagrad": RowWiseAdagrad, "sgd": torch.optim.SGD}
_POOLING = {"sum": PoolingType.SUM, "mean": PoolingType.MEAN}


def table_configs(
    features: Sequence[dict[str, Any]], embedding_dim: int, pooling: Pooling = "sum"
) -> list[EmbeddingBagConfig]:
    """Describe one table for each feature.

    The table of feature ``user`` is called ``t_user``: a bare ``type`` or ``values`` would collide with an
    attribute of ``torch.nn.ModuleDict``, where TorchRec keeps its tables.

    Args:
        features: Records of :func:`~lightning_embcomp.models.features.feature_records`.
        embedding_dim: Columns of each table.
        pooling: How the rows of a bag are combined.

    Returns:
        One configuration for each feature, in order.

    Example:
        >>> [config] = table_configs([{"name": "user", "num_embeddings": 10}], embedding_dim=4)
        >>> config.name, config.num_embeddings, config.feature_names
        ('t_user', 10, ['user'])
    """
    return [
        EmbeddingBagConfig(
            name=f"t_{feature['name']}",
            num_embeddings=feature["num_embeddings"],
            embedding_dim=embedding_dim,
            feature_names=[feature["name"]],
            pooling=_POOLING[pooling],
        )
        for feature in features
    ]


def build_collection(
    configs: Sequence[EmbeddingBagConfig],
    optimizer: EmbeddingOptimizer,
    lr: float,
    device: torch.device | None = None,
) -> EmbeddingBagCollectionInterface:
    """Build an embedding bag collection, with its optimizer fused into the backward pass if it has one.

    Args:
        configs: Tables; all of one pooling, since TorchRec's fused collection confuses keys otherwise.
        optimizer: Fused optimizer, or ``"none"`` for stock tables whose gradients reach ``.grad``.
        lr: Learning rate of the fused optimizer; unused for ``"none"``.
        device: Where the tables live; the CPU by default. Fused tables do not follow ``module.to``.

    Returns:
        The collection: ``forward(KeyedJaggedTensor) -> KeyedTensor``.

    Example:
        >>> configs = table_configs([{"name": "user", "num_embeddings": 10}], embedding_dim=4)
        >>> type(build_collection(configs, "sgd", lr=0.1)).__name__
        'FusedEmbeddingBagCollection'
    """
    device = device or torch.device("cpu")
    if optimizer == "none":
        return EmbeddingBagCollection(tables=list(configs), device=device)
    return FusedEmbeddingBagCollection(
        tables=list(configs), optimizer_type=_FUSED[optimizer], optimizer_kwargs={"lr": lr}, device=device
    )

"""Assemble TorchRec's click-through architectures; each returns logits of shape ``(B, 1)``."""

from collections.abc import Sequence
from typing import Literal, TypeAlias

from torch import nn
from torchrec.models.deepfm import SimpleDeepFMNN
from torchrec.models.dlrm import DLRM, DLRM_DCN, DenseArch
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface
from torchrec.modules.mlp import MLP

Architecture: TypeAlias = Literal["dlrm", "dcn", "deepfm"]


def build_dlrm(
    collection: EmbeddingBagCollectionInterface, num_dense: int, dense_layers: Sequence[int], over_layers: Sequence[int]
) -> DLRM:
    """Build DLRM: pairwise dot products of the embeddings, then an MLP [1]_.

    Args:
        collection: Embedding tables, all of one dimension.
        num_dense: Number of dense features, at least 1.
        dense_layers: Hidden sizes of the dense MLP; a last layer of the embedding dimension is added.
        over_layers: Hidden sizes of the top MLP, at least one; a last layer of size 1 is added.

    Returns:
        The module, ``forward(dense, sparse) -> logits``.

    References:
        .. [1] Naumov et al., 2019, https://arxiv.org/abs/1906.00091
    """
    return DLRM(
        embedding_bag_collection=collection,
        dense_in_features=num_dense,
        dense_arch_layer_sizes=[*dense_layers, _dimension(collection)],
        over_arch_layer_sizes=[*over_layers, 1],
    )


def build_dcn(
    collection: EmbeddingBagCollectionInterface,
    num_dense: int,
    dense_layers: Sequence[int],
    over_layers: Sequence[int],
    cross_layers: int = 3,
    cross_rank: int = 64,
) -> DLRM_DCN:
    """Build DCN-v2, stacked: low-rank cross layers over all embeddings, then an MLP [1]_.

    Args:
        collection: Embedding tables, all of one dimension.
        num_dense: Number of dense features, at least 1.
        dense_layers: Hidden sizes of the dense MLP; a last layer of the embedding dimension is added.
        over_layers: Hidden sizes of the top MLP, at least one; a last layer of size 1 is added.
        cross_layers: Number of cross layers.
        cross_rank: Rank of each cross layer's weight.

    Returns:
        The module, ``forward(dense, sparse) -> logits``.

    References:
        .. [1] Wang et al., 2021, https://arxiv.org/abs/2008.13535
    """
    return DLRM_DCN(
        embedding_bag_collection=collection,
        dense_in_features=num_dense,
        dense_arch_layer_sizes=[*dense_layers, _dimension(collection)],
        over_arch_layer_sizes=[*over_layers, 1],
        dcn_num_layers=cross_layers,
        dcn_low_rank_dim=cross_rank,
    )


def build_deepfm(
    collection: EmbeddingBagCollectionInterface, num_dense: int, dense_layers: Sequence[int], over_layers: Sequence[int]
) -> SimpleDeepFMNN:
    """Build DeepFM: a factorisation machine beside an MLP, both over the same embeddings [1]_.

    TorchRec's ``SimpleDeepFMNN`` ends in a sigmoid, although it documents logits, and has one hidden layer in
    each part; here it ends in the linear layer, and both parts take the sizes given. Its factorisation machine
    sums over all coordinates of the concatenated embeddings, not coordinate by coordinate as in the paper.

    Args:
        collection: Embedding tables, all of one dimension.
        num_dense: Number of dense features, at least 1.
        dense_layers: Hidden sizes of the dense MLP; a last layer of the embedding dimension is added.
        over_layers: Sizes of the deep component, at least one; a last layer of size 1 joins it with the rest.

    Returns:
        The module, ``forward(dense, sparse) -> logits``.

    References:
        .. [1] Guo et al., 2017, https://arxiv.org/abs/1703.04247
    """
    dim = _dimension(collection)
    num_features = sum(len(config.feature_names) for config in collection.embedding_bag_configs())
    model = SimpleDeepFMNN(
        num_dense_features=num_dense,
        embedding_bag_collection=collection,
        hidden_layer_size=dim,
        deep_fm_dimension=over_layers[-1],
    )
    model.dense_arch = DenseArch(num_dense, [*dense_layers, dim])
    model.inter_arch.deep_fm.dense_module = MLP((num_features + 1) * dim, list(over_layers))
    model.over_arch = nn.Linear(dim + over_layers[-1] + 1, 1)
    return model


def _dimension(collection: EmbeddingBagCollectionInterface) -> int:
    return collection.embedding_bag_configs()[0].embedding_dim

"""Tables of float16 values: FBGEMM's lookup as TorchRec's fused kernels use it.

TorchRec's unsharded ``FusedEmbeddingBagCollection`` takes no notice of ``data_type``, so the kernel is called here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    EmbeddingLocation,
    PoolingMode,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from lightning_embcomp.models.collections import table_configs


class HalfLookup(nn.Module):
    """One lookup in several tables, with row-wise Adagrad in backward."""

    def __init__(self, rows: Sequence[int], dim: int, lr: float) -> None:
        super().__init__()
        self._emb_module = SplitTableBatchedEmbeddingBagsCodegen(
            [(r, dim, EmbeddingLocation.HOST, ComputeDevice.CPU) for r in rows],
            optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
            weights_precision=SparseType.FP16,
            pooling_mode=PoolingMode.SUM,
            learning_rate=lr,
        )
        for weight, r in zip(self.split_embedding_weights(), rows, strict=True):
            weight.detach().copy_((torch.rand(r, dim) * 2 - 1) * r**-0.5)

    def split_embedding_weights(self) -> list[Tensor]:
        """Weights of the tables."""
        return list(self._emb_module.split_embedding_weights())

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        """Look up and pool."""
        return self._emb_module(ids, offsets)


class HalfBags(nn.Module):
    """A collection of float16 tables.

    Args:
        features: Records with ``name`` and ``num_embeddings``, one table each.
        dim: Columns.
        lr: Rate of row-wise Adagrad, whose state stays float32.
    """

    def __init__(self, features: Sequence[dict[str, Any]], dim: int, lr: float) -> None:
        super().__init__()
        self.configs = table_configs(features, dim)
        self.names = [feature["name"] for feature in features]
        self.dim = dim
        self._emb_modules = [HalfLookup([feature["num_embeddings"] for feature in features], dim, lr)]

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """Configurations of the tables."""
        return self.configs

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Look up and pool.

        Args:
            features: Ids, with the features in the order of the constructor.

        Returns:
            ``(B, features * dim)``, float32.
        """
        values = self._emb_modules[0](features.values(), features.offsets())
        return KeyedTensor(keys=self.names, length_per_key=[self.dim] * len(self.names), values=values.float())

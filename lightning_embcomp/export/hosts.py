"""Served modules with the interface of those that they replace."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollectionInterface,
    EmbeddingCollectionInterface,
    get_embedding_names_by_table,
)
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from lightning_embcomp.engine.extent import check_extent
from lightning_embcomp.engine.hosts import in_order
from lightning_embcomp.export.errors import ExportError
from lightning_embcomp.export.manifest import HostSpec, TableSpec
from lightning_embcomp.export.serving import ServedTables


class ServedEmbeddingBagCollection(EmbeddingBagCollectionInterface):
    """In place of an ``EmbeddingBagCollection``.

    Args:
        tables: Its tables, one feature per feature name, in order.
        is_weighted: Whether batches carry per-sample weights.
    """

    def __init__(self, tables: ServedTables, *, is_weighted: bool) -> None:
        super().__init__()
        self.served = tables
        self._is_weighted = is_weighted
        self._configs = [
            EmbeddingBagConfig(**_config(table), pooling=PoolingType.MEAN if table.mean else PoolingType.SUM)
            for table in tables.tables
        ]
        self._features = [name for table in tables.tables for name in table.features]
        self._embedding_names = [name for names in get_embedding_names_by_table(self._configs) for name in names]
        self._lengths = [table.dim for table in tables.tables for _ in table.features]

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Pool the features.

        Args:
            features: Batch with at least the features of the tables.

        Returns:
            One pooled embedding per feature.

        Raises:
            KeyError: If a feature is missing.
            IndexError: If an id is outside its table.
        """
        features = in_order(features, self._features)
        weights = features.weights() if self._is_weighted else None
        pooled = self.served(features.values(), features.offsets(), weights)
        return KeyedTensor(keys=self._embedding_names, values=pooled, length_per_key=self._lengths)

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """Table configurations."""
        return self._configs

    def is_weighted(self) -> bool:
        """Whether batches carry per-sample weights."""
        return self._is_weighted

    @property
    def device(self) -> torch.device:
        """Device of the tables."""
        return self.served.device


class ServedEmbeddingCollection(EmbeddingCollectionInterface):
    """In place of an ``EmbeddingCollection``.

    Args:
        tables: Its tables, one feature per feature name, in order.
        need_indices: Whether outputs carry their ids as weights.
    """

    def __init__(self, tables: ServedTables, *, need_indices: bool) -> None:
        super().__init__()
        self.served = tables
        self._need_indices = need_indices
        self._configs = [EmbeddingConfig(**_config(table)) for table in tables.tables]
        self._features = [name for table in tables.tables for name in table.features]
        self._names_by_table = get_embedding_names_by_table(self._configs)

    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """Look single rows up.

        Args:
            features: Batch with at least the features of the tables.

        Returns:
            Rows of each feature.
        """
        features = in_order(features, self._features)
        counts = features.length_per_key()
        rows = self.served.lookup_rows(features.values(), counts).split(counts)
        per_feature = features.to_dict()
        names = [name for names in self._names_by_table for name in names]
        return {
            name: JaggedTensor(
                values=values,
                lengths=per_feature[feature].lengths(),
                weights=per_feature[feature].values() if self._need_indices else None,
            )
            for name, feature, values in zip(names, self._features, rows, strict=True)
        }

    def embedding_configs(self) -> list[EmbeddingConfig]:
        """Table configurations."""
        return self._configs

    def need_indices(self) -> bool:
        """Whether outputs carry their ids as weights."""
        return self._need_indices

    def embedding_dim(self) -> int:
        """Columns of every table."""
        return self._configs[0].embedding_dim

    def embedding_names_by_table(self) -> list[list[str]]:
        """Names of the outputs of each table."""
        return self._names_by_table

    @property
    def device(self) -> torch.device:
        """Device of the tables."""
        return self.served.device


class ServedEmbeddingBag(nn.Module):
    """In place of an ``nn.EmbeddingBag`` with mode ``sum`` or ``mean``.

    Args:
        table: Its table.
        include_last_offset: As in ``nn.EmbeddingBag``.
        padding_idx: Id that is left out of every bag, also of its length; None for none.
    """

    def __init__(self, table: ServedTables, *, include_last_offset: bool, padding_idx: int | None) -> None:
        super().__init__()
        self.served = table
        self.num_embeddings, self.embedding_dim = table.tables[0].rows, table.tables[0].dim
        self.include_last_offset = include_last_offset
        self.padding_idx = padding_idx

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """Pool bags of ids; arguments as in ``nn.EmbeddingBag.forward``.

        Raises:
            ValueError: If offsets are missing for 1-D ids, given for 2-D ids, or do not go through the ids in order.
        """
        if input.dim() == 2:
            if offsets is not None:
                raise ValueError("offsets must be None when input is 2-D: its rows are the bags")
            offsets = torch.arange(input.shape[0] + 1, device=input.device) * input.shape[1]
            per_sample_weights = None if per_sample_weights is None else per_sample_weights.reshape(-1)
            input = input.reshape(-1)
        elif offsets is None:
            raise ValueError("offsets are needed when input is 1-D")
        elif not self.include_last_offset:
            offsets = torch.cat([offsets, offsets.new_full((1,), input.numel())])
        if self.padding_idx is not None:
            if not torch.compiler.is_compiling():
                check_extent(input, offsets, per_sample_weights)  # before offsets are used to count what is left
            kept = input != self.padding_idx
            kept_before = torch.cat([kept.new_zeros(1, dtype=torch.int64), kept.long().cumsum(0)])
            offsets = kept_before[offsets.long()]
            input = input[kept]
            per_sample_weights = None if per_sample_weights is None else per_sample_weights[kept]
        pooled: Tensor = self.served(input, offsets, per_sample_weights)
        return pooled


class ServedEmbedding(nn.Module):
    """In place of an ``nn.Embedding``.

    Args:
        table: Its table.
        padding_idx: Id that reads as zero; None for none.
    """

    def __init__(self, table: ServedTables, *, padding_idx: int | None) -> None:
        super().__init__()
        self.served = table
        self.num_embeddings, self.embedding_dim = table.tables[0].rows, table.tables[0].dim
        self.padding_idx = padding_idx

    def forward(self, input: Tensor) -> Tensor:
        """Look rows up: ``(*)`` ids give ``(*, D)``; the padding id gives zeros."""
        ids = input.reshape(-1)
        if self.padding_idx is None:
            offsets = torch.arange(ids.numel() + 1, device=ids.device)
        else:
            kept = ids != self.padding_idx
            offsets = torch.cat([kept.new_zeros(1, dtype=torch.int64), kept.long().cumsum(0)])
            ids = ids[kept]
        rows: Tensor = self.served(ids, offsets)
        return rows.view(*input.shape, self.embedding_dim)


ServedHost = ServedEmbeddingBagCollection | ServedEmbeddingCollection | ServedEmbeddingBag | ServedEmbedding


def serve_host(host: HostSpec, tables: Sequence[TableSpec], served: ServedTables) -> ServedHost:
    """Put a module around served tables.

    Args:
        host: What the module was.
        tables: Its tables.
        served: The same, served.

    Raises:
        ExportError: If the export does not say what the module was.
    """
    if host.kind == "unknown" or (
        host.kind in ("bag_collection", "collection") and not all(t.features for t in tables)
    ):
        raise ExportError(
            f"the export was made from a checkpoint that does not say what kind of module {host.path!r} is or which"
            " features its tables have: put it into the model with load_model(DIR, model), or export again with the"
            " configuration of the run (-c)"
        )
    if host.kind == "bag_collection":
        return ServedEmbeddingBagCollection(served, is_weighted=host.is_weighted)
    if host.kind == "collection":
        return ServedEmbeddingCollection(served, need_indices=host.need_indices)
    if host.kind == "embedding_bag":
        return ServedEmbeddingBag(served, include_last_offset=host.include_last_offset, padding_idx=host.padding_idx)
    return ServedEmbedding(served, padding_idx=host.padding_idx)


def feature_tables(tables: Sequence[TableSpec]) -> list[int]:
    """Position of the table of every feature; stand-alone embeddings have one without a name.

    Example:
        >>> feature_tables([TableSpec(name="t", rows=1, dim=4, classes=(), features=("a", "b"))])
        [0, 0]
    """
    return [t for t, table in enumerate(tables) for _ in (table.features or ("",))]


def _config(table: TableSpec) -> dict[str, object]:
    return {
        "name": table.name,
        "num_embeddings": table.rows,
        "embedding_dim": table.dim,
        "feature_names": list(table.features),
    }

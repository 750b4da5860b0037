"""Modules that take the place of TorchRec's and PyTorch's embedding modules and look rows up in an engine.

Each keeps the interface of what it replaces. They load checkpoints of their own kind and of the module that they
replaced: in the latter case the rows that have storage are read from the full tables, and the rest is left behind.
Tables that such a checkpoint lacks are reported as missing and keep their rows.

Compilers see lookups as opaque calls: how much there is to look up changes from batch to batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollectionInterface,
    EmbeddingCollectionInterface,
    get_embedding_names_by_table,
)
from torchrec.optim.fused import FusedOptimizer
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from lightning_embcomp.engine import state
from lightning_embcomp.engine.host import OneEngine
from lightning_embcomp.engine.routed import RoutedEmbeddings
from lightning_embcomp.engine.router import slabs
from lightning_embcomp.engine.row_class import WEIGHT, FusedRows


class RoutedHost(OneEngine, nn.Module):
    """Base of the modules that hold an engine with all of their tables.

    Args:
        engine: The engine.
        plain_keys: State-dict key of each table's full weights in the module that was replaced.
    """

    def __init__(self, engine: RoutedEmbeddings, plain_keys: Sequence[str]) -> None:
        nn.Module.__init__(self)
        self.engine = engine
        self._plain_keys = tuple(plain_keys)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - PyTorch's signature
        if name in ("weight", "embedding_bags", "embeddings") and "_plain_keys" in self.__dict__:
            if name == self._plain_keys[0].partition(".")[0]:
                label = self.engine.tables[0].label
                raise AttributeError(
                    f"table {label!r} is compressed and has no full weight (.{name}): call the module for rows, write"
                    " all of them out with lightning_embcomp.surgery.to_plain(module), or leave the table out of the"
                    f" callback (tables='!{label}')"
                )
        return super().__getattr__(name)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        child = prefix + "engine."
        plain = [prefix + key for key in self._plain_keys]
        found = {t: state_dict[key] for t, key in enumerate(plain) if key in state_dict}
        # Told apart by the kind that the checkpoint is of: of the other kind, no key belongs.
        known = set(plain) if found else {key for key in state_dict if key.startswith(child)}
        unexpected_keys.extend(key for key in state_dict if key.startswith(prefix) and key not in known)
        if found:
            missing_keys.extend(key for key in plain if key not in state_dict)
            wrong = [message for t, weights in found.items() if (message := self._misfit(plain[t], t, weights))]
            error_msgs.extend(wrong)
            if not wrong:
                warm_start(self.engine, found)
        elif state.load(self.engine, state_dict, child, missing_keys, unexpected_keys, error_msgs):
            self._after_load()
        state.mark_loaded(state_dict, child)

    def _misfit(self, key: str, t: int, weights: object) -> str | None:
        table = self.engine.tables[t]
        if not isinstance(weights, Tensor):
            return f"{key} is a {type(weights).__name__}, not a tensor"
        if tuple(weights.shape) != (table.rows, table.dim):
            return (
                f"size mismatch for {key}: the checkpoint has {tuple(weights.shape)}, table {table.label!r} is"
                f" {(table.rows, table.dim)}"
            )
        return None

    def _after_load(self) -> None:
        """Called when the engine has taken a saved state."""


@torch.no_grad()
def warm_start(engine: RoutedEmbeddings, tables: Mapping[int, Tensor]) -> None:
    """Read the rows that have storage from full tables; their fused optimizer state starts at zero.

    Args:
        engine: The engine.
        tables: Full weights ``(R, D)`` by table index.
    """
    for t, weights in tables.items():
        for start, stop in slabs(engine.tables[t].rows):
            engine.load_rows(t, start, weights[start:stop])
        for c, rows in enumerate(engine.classes):
            first, last = engine.class_span(t, c)
            if isinstance(rows, FusedRows):
                for name, storage in rows.storages().items():
                    if name != WEIGHT:
                        storage.tensor[first:last].zero_()


class RoutedFusedOptimizer(FusedOptimizer):
    """Handle on the fused optimizer of an engine: schedulers set its rate, nothing else is to do."""

    def __init__(self, engine: RoutedEmbeddings) -> None:
        self._engine = engine
        super().__init__({}, {}, [{"params": [], "lr": self._engine_rate()}])

    @property
    def rate(self) -> float:
        """The rate that the next step or ``zero_grad`` gives to the rows."""
        return float(cast("list[dict[str, float]]", self.param_groups)[0]["lr"])

    def pull_rate(self) -> None:
        """Take the rate over that the engine was loaded with."""
        cast("list[dict[str, float]]", self.param_groups)[0]["lr"] = self._engine_rate()

    def _engine_rate(self) -> float:
        return next(rows.learning_rate for rows in self._engine.classes if isinstance(rows, FusedRows))

    def step(self, closure: Any = None) -> None:  # noqa: ANN401
        """Push the learning rate; the rows were updated in the backward pass."""
        self._engine.set_learning_rate(self.rate)

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Push the learning rate; there are no gradients to clear."""
        self.step()


class RoutedEmbeddingBagCollection(RoutedHost, EmbeddingBagCollectionInterface):
    """In place of an ``EmbeddingBagCollection`` or ``FusedEmbeddingBagCollection``.

    Args:
        engine: Engine over the tables of ``configs``, one feature per feature name, in order.
        configs: Table configurations.
        is_weighted: Whether batches carry per-sample weights.
    """

    def __init__(self, engine: RoutedEmbeddings, configs: list[EmbeddingBagConfig], *, is_weighted: bool) -> None:
        super().__init__(engine, [f"embedding_bags.{config.name}.weight" for config in configs])
        self._configs = configs
        self._is_weighted = is_weighted
        self._features = [name for config in configs for name in config.feature_names]
        self._embedding_names = [name for names in get_embedding_names_by_table(configs) for name in names]
        self._lengths = [config.embedding_dim for config in configs for _ in config.feature_names]
        self._optimizer = RoutedFusedOptimizer(engine) if engine.options.optimizer else None
        self.register_state_dict_post_hook(_save_scheduled_rate)

    def _after_load(self) -> None:
        if self._optimizer is not None:
            self._optimizer.pull_rate()

    @torch.compiler.disable
    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Pool the features.

        Args:
            features: Batch with at least the features of the tables.

        Returns:
            One pooled embedding per feature.
        """
        features = in_order(features, self._features)
        weights = features.weights() if self._is_weighted else None
        pooled = self.engine(features.values(), features.offsets(), weights)
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
        return self.engine.options.device

    def fused_optimizer(self) -> FusedOptimizer:
        """Handle on the fused optimizer.

        Raises:
            RuntimeError: If the rows are trained by an optimizer of ``configure_optimizers``.
        """
        if self._optimizer is None:
            raise RuntimeError("these tables have no fused optimizer: they are trained from configure_optimizers")
        return self._optimizer


def _save_scheduled_rate(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
) -> None:
    """Save the rate that a scheduler has set for the next step, which the engine does not know yet."""
    optimizer = cast(RoutedEmbeddingBagCollection, module)._optimizer
    if optimizer is not None:
        state_dict[prefix + "engine.rate"].fill_(optimizer.rate)


class RoutedEmbeddingCollection(RoutedHost, EmbeddingCollectionInterface):
    """In place of an ``EmbeddingCollection``.

    Args:
        engine: Engine over the tables of ``configs``, one feature per feature name, in order.
        configs: Table configurations.
        need_indices: Whether outputs carry their ids as weights.
    """

    def __init__(self, engine: RoutedEmbeddings, configs: list[EmbeddingConfig], *, need_indices: bool) -> None:
        super().__init__(engine, [f"embeddings.{config.name}.weight" for config in configs])
        self._configs = configs
        self._need_indices = need_indices
        self._features = [name for config in configs for name in config.feature_names]
        self._names_by_table = get_embedding_names_by_table(configs)

    @torch.compiler.disable
    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """Look single rows up.

        Args:
            features: Batch with at least the features of the tables.

        Returns:
            Rows of each feature.
        """
        features = in_order(features, self._features)
        counts = features.length_per_key()
        rows = self.engine.lookup_rows(features.values(), counts).split(counts)
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
        return self.engine.options.device


class _RoutedTable(RoutedHost):
    """A single table with the plain attributes of PyTorch's modules.

    Args:
        engine: Engine over one table.
    """

    max_norm: float | None = None
    norm_type: float = 2.0
    scale_grad_by_freq: bool = False

    def __init__(self, engine: RoutedEmbeddings) -> None:
        super().__init__(engine, ["weight"])
        self.num_embeddings, self.embedding_dim = engine.tables[0].rows, engine.tables[0].dim
        self.sparse = engine.options.sparse

    @property
    def device(self) -> torch.device:
        """Device of the table."""
        return self.engine.options.device


class RoutedEmbeddingBag(_RoutedTable):
    """In place of an ``nn.EmbeddingBag`` with mode ``sum`` or ``mean``.

    Args:
        engine: Engine over one table.
        include_last_offset: As in ``nn.EmbeddingBag``.
        padding_idx: Id that is left out of every bag, also of its length; None for none.
    """

    def __init__(self, engine: RoutedEmbeddings, *, include_last_offset: bool, padding_idx: int | None) -> None:
        super().__init__(engine)
        self.mode = "mean" if engine.mean[0] else "sum"
        self.include_last_offset = include_last_offset
        self.padding_idx = padding_idx

    @torch.compiler.disable
    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """Pool bags of ids; arguments as in ``nn.EmbeddingBag.forward``.

        Raises:
            ValueError: If offsets are missing for 1-D ids or given for 2-D ids.
        """
        if input.dim() == 2:
            if offsets is not None:
                raise ValueError("offsets must be None when input is 2-D: its rows are the bags")
            offsets = torch.arange(0, input.numel() + 1, input.shape[1], device=input.device)
            per_sample_weights = None if per_sample_weights is None else per_sample_weights.reshape(-1)
            input = input.reshape(-1)
        elif offsets is None:
            raise ValueError("offsets are needed when input is 1-D")
        elif not self.include_last_offset:
            offsets = torch.cat([offsets, offsets.new_full((1,), input.numel())])
        if self.padding_idx is not None:
            kept = input != self.padding_idx
            kept_before = torch.cat([kept.new_zeros(1, dtype=torch.int64), kept.long().cumsum(0)])
            offsets = kept_before[offsets.long()]
            input = input[kept]
            per_sample_weights = None if per_sample_weights is None else per_sample_weights[kept]
        return self.engine(input, offsets, per_sample_weights)


class RoutedEmbedding(_RoutedTable):
    """In place of an ``nn.Embedding``.

    Args:
        engine: Engine over one table.
        padding_idx: Id whose row is never trained; None for none.
    """

    def __init__(self, engine: RoutedEmbeddings, *, padding_idx: int | None) -> None:
        super().__init__(engine)
        self.padding_idx = padding_idx

    @torch.compiler.disable
    def forward(self, input: Tensor) -> Tensor:
        """Look rows up: ``(*)`` ids give ``(*, D)``; the padding id gives zeros."""
        ids = input.reshape(-1)
        if self.padding_idx is None:
            rows = self.engine.lookup_rows(ids, [ids.numel()])
        else:
            # An empty bag reads as zero and trains nothing.
            kept = ids != self.padding_idx
            offsets = torch.cat([kept.new_zeros(1, dtype=torch.int64), kept.long().cumsum(0)])
            rows = self.engine(ids[kept], offsets)
        return rows.view(*input.shape, self.embedding_dim)


def in_order(features: KeyedJaggedTensor, names: list[str]) -> KeyedJaggedTensor:
    """Bring the features of a batch into the given order, without a copy where they already are.

    Raises:
        KeyError: If a feature is missing.
        ValueError: If the features differ in batch size.
    """
    if features.variable_stride_per_key():
        raise ValueError("the features of the batch differ in batch size, which these tables do not support")
    keys = features.keys()
    if keys == names:
        return features
    position = {key: i for i, key in enumerate(keys)}
    missing = [name for name in names if name not in position]
    if missing:
        raise KeyError(f"the batch lacks feature {missing[0]!r}; it has {keys}")
    return features.permute([position[name] for name in names])

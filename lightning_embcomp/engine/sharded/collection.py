"""TorchRec's sharded ``EmbeddingBagCollection`` with engines in the place of its lookups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys
from torchrec.distributed.embedding_types import EmbeddingComputeKernel, KJTList
from torchrec.distributed.embeddingbag import (
    EmbeddingBagCollectionContext,
    EmbeddingBagCollectionSharder,
    ShardedEmbeddingBagCollection,
)
from torchrec.distributed.types import (
    Awaitable,
    LazyAwaitable,
    ParameterSharding,
    QuantizedCommCodecs,
    ShardingEnv,
    ShardingType,
)
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, get_embedding_names_by_table
from torchrec.optim.fused import FusedOptimizer
from torchrec.optim.keyed import CombinedOptimizer
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from lightning_embcomp.engine.group import Group, ProcessGroup
from lightning_embcomp.engine.host import EngineHost, TableShard
from lightning_embcomp.engine.hosts import RoutedFusedOptimizer
from lightning_embcomp.engine.layout import LogicalTable, row_numbers
from lightning_embcomp.engine.routed import RoutedEmbeddings, RoutedOptions
from lightning_embcomp.engine.sharded import storage
from lightning_embcomp.engine.sharded.lookup import ReplicatedLookup, RoutedLookup
from lightning_embcomp.engine.sharded.means import averaged, bag_lengths, summed_means
from lightning_embcomp.engine.sharded.norms import GradientNorms
from lightning_embcomp.engine.sharded.parts import COLUMN_WISE, check_plan, local_tables
from lightning_embcomp.engine.sharded.whole import WholeReader
from lightning_embcomp.kernels.route.watch import check


@dataclass(frozen=True)
class ShardedSpec:
    """How the tables of a collection are to be stored.

    Args:
        tables: The whole tables, in the collection's order.
        options: Storage and optimizer.
    """

    tables: tuple[LogicalTable, ...]
    options: RoutedOptions


class ShardedRoutedBags(EngineHost, ShardedEmbeddingBagCollection):
    """In place of TorchRec's ``ShardedEmbeddingBagCollection``.

    Planning, distribution of ids and of pooled rows are TorchRec's; rows are looked up and trained in engines, one for
    each sharding type. Tables start without storage.

    Args:
        spec: How the tables are stored.
        module: The collection to shard; its weights may be on the meta device and are not read.
        params: TorchRec's plan for the collection.
        env: The processes.
        device: Device of the tables.
        codecs: Codecs for what is exchanged, by operation.
        path: Path of the module, for profiles.
    """

    def __init__(
        self,
        spec: ShardedSpec,
        module: EmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        codecs: dict[str, QuantizedCommCodecs] | None = None,
        path: str | None = None,
    ) -> None:
        check_plan(spec.tables, params)
        assert env.process_group is not None
        # TorchRec's constructor calls the methods below, which need these.
        self.__dict__["spec"] = spec
        self.__dict__["group"] = ProcessGroup(env.process_group)
        self.__dict__["_plan"] = params
        configs = module.embedding_bag_configs()
        outputs = get_embedding_names_by_table(configs)
        names = [
            name
            for config, of_table in zip(configs, outputs, strict=True)
            if params[config.name].sharding_type in COLUMN_WISE
            for name in of_table
        ]
        self.__dict__["norms"] = GradientNorms(self.group, names)
        super().__init__(module, params, env, None, device, codecs, path)
        # TorchRec's own division mixes features up where one is shared or sharding types are mixed.
        self._has_mean_pooling_callback = False
        self._summed = summed_means(configs, params)
        seed = torch.tensor([torch.initial_seed() & (1 << 63) - 1], device=device)
        self.__dict__["seed"] = int(self.group.broadcast(seed, source=0))

    group: Group
    spec: ShardedSpec
    norms: GradientNorms
    seed: int
    """Seed of first values, that of process 0 everywhere: copies of a table have to draw the same numbers."""

    def _create_lookups(self) -> None:
        numbers = row_numbers(self.spec.tables)
        for kind, sharding in zip(self._sharding_types, self._embedding_shardings, strict=True):
            parts = local_tables(sharding._grouped_embedding_configs, self.spec.tables, numbers, kind)
            if kind == ShardingType.DATA_PARALLEL.value:
                lookup: RoutedLookup = ReplicatedLookup(
                    parts, self.spec.options, self.group, is_weighted=self._is_weighted
                )
            else:
                norms = self.norms if kind in COLUMN_WISE else None
                lookup = RoutedLookup(parts, self.spec.options, is_weighted=self._is_weighted, norms=norms)
            self._lookups.append(lookup)
        fused = [RoutedFusedOptimizer(e) for e in self.engines] if self.spec.options.optimizer else []
        self._fused = fused

    def init_data_parallel(self) -> None:
        """Copies are kept equal by their lookups, not by DDP."""

    def _initialize_torch_state(self, skip_registering: bool = False) -> None:
        """The tables are no parameters: engines hold and save them."""
        self.embedding_bags = nn.ModuleDict()
        self._optim = CombinedOptimizer([(f"{e}", optimizer) for e, optimizer in enumerate(self._fused)])
        self.register_state_dict_pre_hook(_refuse_state_dict)

    def input_dist(
        self, ctx: EmbeddingBagCollectionContext, features: KeyedJaggedTensor
    ) -> Awaitable[Awaitable[KJTList]]:
        """See TorchRec; keeps the lengths of bags that are averaged after their parts were added up.

        Raises:
            ValueError: If the features differ in batch size.
        """
        if features.variable_stride_per_key():
            raise ValueError("the features of the batch differ in batch size, which these tables do not support")
        if self._summed:
            ctx.divisor = bag_lengths(features, self._summed)
        return super().input_dist(ctx, features)

    def compute_and_output_dist(self, ctx: EmbeddingBagCollectionContext, input: KJTList) -> LazyAwaitable[KeyedTensor]:
        """See TorchRec; gradients of tables that are cut by columns are measured on their way back."""
        awaitable = super().compute_and_output_dist(ctx, input)
        return self._finished(ctx, awaitable)

    def output_dist(self, ctx: EmbeddingBagCollectionContext, output: list[Tensor]) -> LazyAwaitable[KeyedTensor]:
        """See TorchRec."""
        return self._finished(ctx, super().output_dist(ctx, output))

    def _finished(
        self, ctx: EmbeddingBagCollectionContext, awaitable: LazyAwaitable[KeyedTensor]
    ) -> LazyAwaitable[KeyedTensor]:
        if self._summed:
            lengths: Any = ctx.divisor
            awaitable.callbacks.append(lambda pooled: averaged(pooled, lengths))
        if self.norms.names and self.training:
            awaitable.callbacks.append(partial(self.norms.watch, batches=self._batches(ctx)))
        return awaitable

    def _batches(self, ctx: EmbeddingBagCollectionContext) -> list[int] | None:
        """Samples of every process in a batch, where the exchange of ids has told."""
        known = [c.batch_size_per_rank for c in ctx.sharding_contexts if len(c.batch_size_per_rank) == self.group.size]
        return known[0] if known else None

    def train(self, mode: bool = True) -> ShardedRoutedBags:
        """Set the mode of the engines as well, which TorchRec keeps out of the module tree."""
        super().train(mode)
        for lookup in self._lookups:
            lookup.train(mode)
        return self

    def update_shards(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Refuse to move shards while training.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "shards of compressed tables do not move while training: save a checkpoint and resume with another plan"
        )

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """Configurations of the whole tables."""
        return self._embedding_bag_configs

    def distributed_state(self) -> dict[str, Any]:
        """Parts of this process for a distributed checkpoint; all processes call it together.

        See :mod:`lightning_embcomp.engine.sharded.storage`.
        """
        check(self.options.device, wait=True)
        return storage.distributed_state(self)

    def load_distributed_state(self, prefix: str, reader: storage.Reader) -> None:
        """Bring the parts of this process to a saved state; see :mod:`lightning_embcomp.engine.sharded.storage`.

        Args:
            prefix: Path of the module in the checkpoint, with a dot at its end.
            reader: The checkpoint.

        Raises:
            StateError: If the checkpoint does not fit.
        """
        storage.load_distributed_state(self, prefix, reader)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:  # noqa: ANN401
        """Read the rows of this process from the state of the unsharded module, compressed or plain.

        Args:
            state_dict: The whole state dict.
            strict: Has no effect: tables are loaded as a whole.
            assign: Has no effect: rows are copied.

        Raises:
            StateError: If the state does not fit.
        """
        # TorchRec's constructor copies tables of a GPU; they may be on the meta device, and are filled later anyway.
        if "seed" in self.__dict__:
            storage.load_distributed_state(self, "", WholeReader(state_dict, self.logical_tables))
        return _IncompatibleKeys([], [])

    @property
    def learning_rate(self) -> float | None:
        """Rate of the next step of the fused optimizer; None if this process holds no rows."""
        return self._fused[0].rate if self._fused else None

    def set_learning_rate(self, rate: float) -> None:
        """Set the rate of the fused optimizer."""
        for engine, optimizer in zip(self.engines, self._fused, strict=True):
            engine.set_learning_rate(rate)
            optimizer.pull_rate()

    @property
    def fused_optimizers(self) -> Sequence[FusedOptimizer]:
        """Handles on the fused optimizers of the engines of this process."""
        return self._fused

    @property
    def logical_tables(self) -> Sequence[LogicalTable]:
        """The whole tables."""
        return self.spec.tables

    @property
    def engines(self) -> Sequence[RoutedEmbeddings]:
        """Engines of this process, one for each sharding type of which it holds a part."""
        return [lookup.engine for lookup in self._lookups if lookup.engine is not None]

    @property
    def options(self) -> RoutedOptions:
        """How all rows are stored and trained."""
        return self.spec.options

    def use_options(self, options: RoutedOptions) -> None:
        """See :meth:`lightning_embcomp.engine.host.EngineHost.use_options`."""
        super().use_options(options)
        self.__dict__["spec"] = replace(self.spec, options=options)

    def shards(self, table: int) -> tuple[TableShard, ...]:
        """Parts of a table that this process holds."""
        replicated = self.is_replicated(table)
        found = []
        for lookup in self._lookups:
            for index, part in enumerate(lookup.parts):
                if part.table == table:
                    first = part.logical.shard is not None and part.logical.shard.first_column == 0
                    primary = first and (self.group.rank == 0 or not replicated)
                    found.append(TableShard(lookup.engine, index, primary))
        return tuple(found)

    def row_owners(self, table: int) -> tuple[int, ...]:
        """See :meth:`lightning_embcomp.engine.host.EngineHost.row_owners`."""
        sharding = self._plan[self.spec.tables[table].name]
        if sharding.sharding_type == ShardingType.DATA_PARALLEL.value:
            return (0,)
        shards = getattr(sharding.sharding_spec, "shards")  # noqa: B009 - other specs have none
        first = [(s.shard_offsets[0], s.placement.rank()) for s in shards if s.shard_offsets[1] == 0]
        return tuple(rank for _, rank in sorted(first))

    def is_cut_by_columns(self, table: int) -> bool:
        """See :meth:`lightning_embcomp.engine.host.EngineHost.is_cut_by_columns`."""
        return self._plan[self.spec.tables[table].name].sharding_type in COLUMN_WISE

    def want_gradient_norms(self) -> None:
        """See :meth:`lightning_embcomp.engine.host.EngineHost.want_gradient_norms`."""
        self.norms.wanted = True

    def is_replicated(self, table: int) -> bool:
        """Whether every process holds a copy of a table."""
        return self._plan[self.spec.tables[table].name].sharding_type == ShardingType.DATA_PARALLEL.value


class RoutedBagsSharder(EmbeddingBagCollectionSharder):
    """Shards one ``EmbeddingBagCollection`` or ``FusedEmbeddingBagCollection`` into engines.

    Args:
        spec: How its tables are stored.
        module_type: Type of the collection.
        codecs: Codecs for what is exchanged, by operation.
    """

    carries_weights = True
    """Whoever asks for engines fills their tables: rows that are not stored need no values."""

    def __init__(
        self,
        spec: ShardedSpec,
        module_type: type[nn.Module] = EmbeddingBagCollection,
        codecs: Mapping[str, QuantizedCommCodecs] | None = None,
    ) -> None:
        super().__init__(qcomm_codecs_registry=codecs if isinstance(codecs, dict) or codecs is None else dict(codecs))
        self.spec = spec
        self._module_type = module_type

    @property
    def module_type(self) -> Any:  # noqa: ANN401 - narrower in TorchRec, whose planner takes both
        """Type of the collection."""
        return self._module_type

    def shardable_parameters(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """Weights by table name."""
        state = module.state_dict(keep_vars=True)
        return {key.split(".")[-2]: weight for key, weight in state.items() if key.endswith(".weight")}

    def shard(
        self,
        module: EmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedRoutedBags:
        """Build the sharded module; its tables have no storage yet."""
        return ShardedRoutedBags(self.spec, module, params, env, device, self.qcomm_codecs_registry, module_fqn)

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """What engines can follow, on every device."""
        return [
            ShardingType.TABLE_WISE.value,
            ShardingType.ROW_WISE.value,
            ShardingType.COLUMN_WISE.value,
            ShardingType.DATA_PARALLEL.value,
        ]

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        """The engine, which TorchRec knows by the name of the fused kernel."""
        return [EmbeddingComputeKernel.FUSED.value]


def _refuse_state_dict(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    raise RuntimeError(
        f"the tables of {prefix.rstrip('.') or 'the module'} are spread over processes: a checkpoint of them is written"
        " by the strategy (trainer.save_checkpoint), not by state_dict()"
    )

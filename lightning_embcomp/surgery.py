"""Put the engine in the place of embedding modules, and take it out again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection, FusedEmbeddingCollection

from lightning_embcomp.engine.host import EngineHost, TableShard
from lightning_embcomp.engine.hosts import (
    RoutedEmbedding,
    RoutedEmbeddingBag,
    RoutedEmbeddingBagCollection,
    RoutedEmbeddingCollection,
    RoutedHost,
    warm_start,
)
from lightning_embcomp.engine.layout import PLAIN_TABLE, ChunkLayout, LogicalTable
from lightning_embcomp.engine.optimizer import FusedOptimizerSpec, UnsupportedOptimizerError
from lightning_embcomp.engine.placement import RowPlacement, check_placement
from lightning_embcomp.engine.routed import RoutedEmbeddings, RoutedOptions
from lightning_embcomp.engine.router import slabs
from lightning_embcomp.engine.sharded.collection import ShardedRoutedBags, ShardedSpec
from lightning_embcomp.engine.sharded.copies import from_first
from lightning_embcomp.tables import PLAIN_HOSTS, HostView, TableView, in_backward_optimizer

_ROUTED_HOSTS = (RoutedEmbeddingBagCollection, RoutedEmbeddingCollection, RoutedEmbeddingBag, RoutedEmbedding)


class UnsupportedTableError(ValueError):
    """A table uses a feature that the engine does not have."""


def build_host(
    host: HostView,
    cuts: Mapping[str, tuple[int, ChunkLayout]],
    device: torch.device,
    placement: RowPlacement | None = None,
) -> RoutedHost:
    """Make the routed stand-in of an embedding module; it has no storage yet.

    Args:
        host: The module to replace.
        cuts: Chunks and layout by unique table name; tables that are not listed stay whole.
        device: Device of the tables.
        placement: Where their rows live on a GPU; on the device by default.

    Returns:
        A module with the interface of the one it replaces.

    Raises:
        UnsupportedTableError: If the module uses something that the engine does not have.
        UnsupportedOptimizerError: If its fused optimizer is not supported.
        ValueError: If a table cannot be cut that way.
    """
    module = host.module
    logical, options = _stored(host, cuts, device, placement)
    feature_tables = [t for t, table in enumerate(host.tables) for _ in (table.features or ("",))]
    mean = [host.tables[t].mean for t in feature_tables]
    engine = RoutedEmbeddings(logical, feature_tables, mean, options)
    if isinstance(module, EmbeddingBagCollection | FusedEmbeddingBagCollection):
        return RoutedEmbeddingBagCollection(engine, module.embedding_bag_configs(), is_weighted=module.is_weighted())
    if isinstance(module, EmbeddingCollection | FusedEmbeddingCollection):
        return RoutedEmbeddingCollection(engine, module.embedding_configs(), need_indices=module.need_indices())
    if isinstance(module, nn.EmbeddingBag):
        return RoutedEmbeddingBag(
            engine, include_last_offset=module.include_last_offset, padding_idx=module.padding_idx
        )
    assert isinstance(module, nn.Embedding)
    return RoutedEmbedding(engine, padding_idx=module.padding_idx)


def sharded_spec(
    host: HostView,
    cuts: Mapping[str, tuple[int, ChunkLayout]],
    device: torch.device,
    placement: RowPlacement | None = None,
) -> ShardedSpec:
    """Say how a collection is to be stored that TorchRec shards; arguments and errors as in :func:`build_host`.

    Raises:
        UnsupportedTableError: Beside what :func:`build_host` refuses, if TorchRec cannot shard the module, or its rows
            are trained by an optimizer of ``configure_optimizers``.
    """
    if type(host.module) not in (EmbeddingBagCollection, FusedEmbeddingBagCollection):
        raise UnsupportedTableError(
            f"table {host.tables[0].name!r} is held by {type(host.module).__name__}; of the modules that TorchRec"
            " shards, only EmbeddingBagCollection and FusedEmbeddingBagCollection can be compressed. Leave it out of"
            " the callback (tables), or train with one process (strategy='auto')"
        )
    for config in cast(EmbeddingBagCollection, host.module).embedding_bag_configs():
        if config.data_type not in (DataType.FP32, DataType.FP16):
            raise UnsupportedTableError(
                f"table {config.name!r} has data_type={config.data_type.name}, but rows of compressed tables hold FP32"
                " or FP16: an INT8 row has one scale for all of its columns, which rows that gain and lose columns"
                " cannot keep, and other types have no kernels. Use one of the two, or put the table into a collection"
                " of its own and leave it out of the callback"
            )
    logical, options = _stored(host, cuts, device, placement)
    if options.optimizer is None:
        raise UnsupportedTableError(
            f"table {host.tables[0].name!r} is trained by an optimizer of configure_optimizers, whose state cannot"
            " follow rows over processes: give the tables of its collection a fused one (apply_optimizer_in_backward),"
            " or train with one process (strategy='auto')"
        )
    return ShardedSpec(tuple(logical), options)


def _stored(
    host: HostView,
    cuts: Mapping[str, tuple[int, ChunkLayout]],
    device: torch.device,
    placement: RowPlacement | None,
) -> tuple[list[LogicalTable], RoutedOptions]:
    logical = [_logical(table, cuts) for table in host.tables]
    _check_supported(host)
    sparse = bool(getattr(host.module, "sparse", False))
    optimizer, placement = _optimizer(host), placement or RowPlacement()
    check_placement(placement, optimizer, f"table {host.tables[0].name!r}")
    return logical, RoutedOptions(
        optimizer=optimizer, dtype=_dtype(host), device=device, sparse=sparse, placement=placement
    )


def fill(routed: EngineHost, table: int, host: HostView) -> None:
    """Give the live rows of a table their first values: those of the plain table, or of its initialiser.

    A table on the meta device is initialised in place, live weights only; the full table never exists. Shards draw
    numbers of their own; copies are equal, and those of a plain table are process 0's.

    Args:
        routed: Stand-in of ``host``.
        table: Index of the table.
        host: The module that was replaced.
    """
    view = host.tables[table]
    assert view.weight is not None
    weight = view.weight.detach()
    if isinstance(routed, ShardedRoutedBags) and routed.is_replicated(table) and not weight.is_meta:
        weight = from_first(routed, weight)
    for shard in routed.shards(table):
        if not weight.is_meta:
            warm_start(shard.engine, {shard.index: part_of(weight, shard.logical)})
        else:
            _initialise(shard, _initialiser(host, view), _seed(routed))


def part_of(weight: Tensor, table: LogicalTable) -> Tensor:
    """The rows and columns of full weights ``(R, D)`` that a part of a table holds, as a view."""
    if table.shard is None:
        return weight
    row, column = table.shard.first_row, table.shard.first_column
    return weight[row : row + table.rows, column : column + table.dim]


def _seed(routed: EngineHost) -> int:
    return routed.seed if isinstance(routed, ShardedRoutedBags) else torch.initial_seed()


def _initialise(shard: TableShard, init: Callable[[Tensor], Any], seed: int, *, again: bool = False) -> None:
    part = shard.logical.shard
    if part is None:
        shard.engine.initialise(shard.index, init)
        return
    # Copies of rows draw the same numbers, other parts others; the state of the generator stays equal everywhere.
    device = shard.engine.options.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        seed = hash((seed, part.number, part.first_column, *([again] if again else [])))
        torch.manual_seed(seed & 0x7FFFFFFF)
        shard.engine.initialise(shard.index, init)


def table_configs(routed: EngineHost) -> Sequence[EmbeddingBagConfig | EmbeddingConfig] | None:
    """TorchRec's configurations of the tables of a collection; None for a table outside collections."""
    if isinstance(routed, RoutedEmbeddingBagCollection | ShardedRoutedBags):
        return routed.embedding_bag_configs()
    return routed.embedding_configs() if isinstance(routed, RoutedEmbeddingCollection) else None


def reinitialise(routed: EngineHost, table: int, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Give the live rows of a table new initial values, with zero optimizer state.

    Shards draw numbers of their own, other ones than when they were filled.

    Args:
        routed: Module that holds the table.
        table: Index of the table.
        optimizers: The user's optimizers.
    """
    configs = table_configs(routed)
    init = nn.init.normal_ if configs is None else _configured_initialiser(configs[table])
    for shard in routed.shards(table):
        _initialise(shard, init, _seed(routed), again=True)
        shard.engine.clear_row_state(shard.index, optimizers)


def replace(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module in the place of another, wherever the root refers to the old one.

    A module that several paths share is replaced at all of them.
    """
    old = root.get_submodule(path)
    for parent in list(root.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                parent._modules[name] = module
    module.train(old.training)


def to_plain(routed: RoutedHost) -> nn.Module:
    """Write the tables back to an ordinary, full-size module; columns without storage are zero.

    Args:
        routed: The stand-in.

    Returns:
        ``EmbeddingBagCollection``, ``EmbeddingCollection``, ``nn.EmbeddingBag`` or ``nn.Embedding``.
    """
    engine = routed.engine
    device, dtype = engine.options.device, engine.options.dtype
    if isinstance(routed, RoutedEmbeddingBagCollection):
        bags = EmbeddingBagCollection(routed.embedding_bag_configs(), is_weighted=routed.is_weighted(), device=device)
        for t, config in enumerate(routed.embedding_bag_configs()):
            write_table(engine, t, bags.embedding_bags[config.name].weight)
        return bags
    if isinstance(routed, RoutedEmbeddingCollection):
        single = EmbeddingCollection(routed.embedding_configs(), device=device, need_indices=routed.need_indices())
        for t, config in enumerate(routed.embedding_configs()):
            write_table(engine, t, single.embeddings[config.name].weight)
        return single
    rows, dim = engine.tables[0].rows, engine.tables[0].dim
    plain: nn.EmbeddingBag | nn.Embedding
    if isinstance(routed, RoutedEmbeddingBag):
        plain = nn.EmbeddingBag(
            rows,
            dim,
            mode="mean" if engine.mean[0] else "sum",
            include_last_offset=routed.include_last_offset,
            padding_idx=routed.padding_idx,
            sparse=engine.options.sparse,
            device=device,
            dtype=dtype,
        )
    elif isinstance(routed, RoutedEmbedding):
        plain = nn.Embedding(
            rows, dim, padding_idx=routed.padding_idx, sparse=engine.options.sparse, device=device, dtype=dtype
        )
    else:
        raise TypeError(f"{type(routed).__name__} has no plain counterpart")
    write_table(engine, 0, plain.weight)
    if isinstance(plain, nn.Embedding) and plain.padding_idx is not None:
        with torch.no_grad():
            plain.weight[plain.padding_idx] = 0  # what the engine reads there
    return plain


@torch.no_grad()
def write_table(engine: RoutedEmbeddings, table: int, weight: Tensor) -> None:
    """Write a logical table into full-size weights ``(R, D)``, rounded if its rows are.

    Raises:
        ValueError: If the bits of its rows are still being searched.
    """
    precision = engine.precision(table)
    if precision is None and engine.values is not None and engine.values.tensors(table):
        raise ValueError(
            f"the bits of table {engine.tables[table].label!r} are still being searched: end the search first"
        )
    for start, stop in slabs(engine.tables[table].rows):
        rows = engine.read_rows(table, start, stop)
        weight[start:stop] = rows if precision is None else precision.round(rows, start)


def _logical(table: TableView, cuts: Mapping[str, tuple[int, ChunkLayout]]) -> LogicalTable:
    chunks, layout = cuts.get(table.name, (1, "prefix"))
    return LogicalTable(
        name=table.key or PLAIN_TABLE,
        rows=table.rows,
        dim=table.dim,
        chunks=chunks,
        layout=layout,
        path="" if table.key else table.host,
    )


def what_a_stand_in_loses(module: nn.Module) -> str | None:
    """Say what a module does beside looking rows up, so that another module in its place would not.

    Args:
        module: A module that holds tables, of one of the kinds that are known.

    Returns:
        The first such thing, to be put behind the name of the table; None if there is none.

    Example:
        >>> class Scaled(nn.Embedding):
        ...     def forward(self, ids: Tensor) -> Tensor:
        ...         return 2 * super().forward(ids)
        >>> what_a_stand_in_loses(Scaled(3, 4)), what_a_stand_in_loses(nn.Embedding(3, 4))
        ('is a Scaled with a forward of its own', None)
    """
    base = next((kind for kind in (*PLAIN_HOSTS, *_ROUTED_HOSTS) if isinstance(module, kind)), type(module))
    if type(module).forward is not base.forward or "forward" in vars(module):
        return f"is a {type(module).__name__} with a forward of its own"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "has hooks"
    if is_parametrized(module):
        return "has a parametrization"
    return None


def _check_supported(host: HostView) -> None:
    module = host.module

    def refuse(what: str, name: str = host.path) -> None:
        raise UnsupportedTableError(f"table {name!r} {what}: leave it out of the callback")

    lost = what_a_stand_in_loses(module)
    if lost is not None:
        refuse(f"{lost}, which the engine would drop")
    if not isinstance(module, FusedEmbeddingBagCollection | FusedEmbeddingCollection):
        for table in host.tables:
            if table.weight is not None and not table.weight.requires_grad:
                refuse("is frozen", table.name)
    if not isinstance(module, nn.EmbeddingBag | nn.Embedding):
        return
    for option in ("max_norm", "scale_grad_by_freq"):
        if getattr(module, option):
            refuse(f"uses {option}, which the engine does not have")
    if isinstance(module, nn.EmbeddingBag) and module.mode == "max":
        refuse("is pooled by max; the engine pools by sum or mean")
    if isinstance(module, nn.Embedding) and module.padding_idx is not None and not module.weight.is_meta:
        if bool(module.weight[module.padding_idx].any()):
            refuse("has values in its padding row, which the engine reads as zero")


def _dtype(host: HostView) -> torch.dtype:
    dtypes = {table.weight.dtype for table in host.tables if table.weight is not None}
    if len(dtypes) != 1:
        raise UnsupportedTableError(
            f"{host.path!r} mixes table dtypes {sorted(map(str, dtypes))}: put each dtype into a collection of its own"
        )
    dtype = dtypes.pop()
    if dtype not in (torch.float32, torch.float16):
        raise UnsupportedTableError(f"{host.path!r} holds {dtype} tables; float32 and float16 are supported")
    return dtype


def _optimizer(host: HostView) -> FusedOptimizerSpec | None:
    module = host.module
    if isinstance(module, FusedEmbeddingBagCollection | FusedEmbeddingCollection):
        return FusedOptimizerSpec.from_torch(module.optimizer_type(), module.optimizer_kwargs(), host.tables[0].name)
    specs = []
    for table in host.tables:
        attached = in_backward_optimizer(table.weight)
        specs.append(FusedOptimizerSpec.from_in_backward(*attached, table.name) if attached else None)
    if any(spec != specs[0] for spec in specs):
        raise UnsupportedOptimizerError(
            f"the tables of {host.path!r} have different optimizers in backward: put each optimizer into a"
            " collection of its own"
        )
    return specs[0]


def _initialiser(host: HostView, table: TableView) -> Callable[[Tensor], Any]:
    """Initialiser of a table that was never materialised."""
    module = host.module
    if isinstance(module, nn.EmbeddingBag | nn.Embedding):
        return nn.init.normal_
    configs = (
        module.embedding_bag_configs()
        if isinstance(module, EmbeddingBagCollection | FusedEmbeddingBagCollection)
        else module.embedding_configs()  # type: ignore[operator]
    )
    config: EmbeddingBagConfig = next(config for config in configs if config.name == table.key)
    if isinstance(module, FusedEmbeddingBagCollection | FusedEmbeddingCollection):
        low, high = config.get_weight_init_min(), config.get_weight_init_max()
        return lambda weight: weight.uniform_(low, high)
    return _configured_initialiser(config)


def _configured_initialiser(config: EmbeddingBagConfig | EmbeddingConfig) -> Callable[[Tensor], Any]:
    assert config.init_fn is not None  # TorchRec sets a uniform one where none is given
    return config.init_fn

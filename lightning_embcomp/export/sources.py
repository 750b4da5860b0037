"""The tables of a module in memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection, FusedEmbeddingCollection

from lightning_embcomp.engine.hosts import (
    RoutedEmbedding,
    RoutedEmbeddingBag,
    RoutedEmbeddingBagCollection,
    RoutedEmbeddingCollection,
    RoutedHost,
)
from lightning_embcomp.engine.layout import PLAIN_TABLE
from lightning_embcomp.engine.routed import RoutedEmbeddings
from lightning_embcomp.export.errors import STILL_SEARCHED, ExportError
from lightning_embcomp.export.tables import ExportHost, ExportTable, HostKind, full_name
from lightning_embcomp.surgery import what_a_stand_in_loses
from lightning_embcomp.tables import HostView, TableView, find_hosts


def hosts_of(root: nn.Module, *, trained: bool = True) -> list[ExportHost]:
    """Collect the embedding tables of a module, plain and compressed.

    Args:
        root: The module; it may be a collection itself.
        trained: Whether tables must be ready to be read; before a training, bits may still have to be searched.

    Returns:
        One record per module that holds tables, in the order of ``named_modules``. Rows are read when they are
        written, not before.

    Raises:
        ExportError: If there is no table, or one of a kind that cannot be served.

    Example:
        >>> [host.full_name(table) for host in hosts_of(nn.EmbeddingBag(10, 4, mode="sum")) for table in host.tables]
        ['']
    """
    hosts = [describe(view, trained=trained) for view in find_hosts(root)]
    if not hosts:
        raise ExportError(
            f"{type(root).__name__} holds no embedding table: there is nothing to export. Sharded tables are exported"
            " from a checkpoint: embcomp consolidate, then embcomp export --ckpt"
        )
    return hosts


def describe(view: HostView, *, trained: bool = True) -> ExportHost:
    """Describe a module that holds tables; they may be unallocated, but cannot be read then.

    Args:
        view: The module.
        trained: As in :func:`hosts_of`.

    Raises:
        ExportError: If it cannot be served.
    """
    module = view.module
    lost = what_a_stand_in_loses(module)
    if lost is not None:
        raise ExportError(f"table {view.path!r} {lost}, which its exported tables would not have: remove it first")
    if isinstance(module, RoutedHost):
        return _routed(view, module, trained)
    if isinstance(module, EmbeddingBagCollection | FusedEmbeddingBagCollection):
        kind: HostKind = "bag_collection"
        options = {"is_weighted": module.is_weighted()}
    elif isinstance(module, EmbeddingCollection | FusedEmbeddingCollection):
        kind, options = "collection", {"need_indices": module.need_indices()}
    elif isinstance(module, nn.EmbeddingBag):
        if module.mode == "max":
            raise ExportError(f"table {view.path!r} is pooled by max; exported tables pool by sum or mean")
        kind, options = "embedding_bag", {"include_last_offset": module.include_last_offset}
    else:
        # The padding row of a plain nn.Embedding is a row like any other in a lookup: what it holds is exported.
        kind, options = "embedding", {}
    if isinstance(module, nn.EmbeddingBag | nn.Embedding) and module.max_norm is not None:
        raise ExportError(f"table {view.path!r} uses max_norm, which exported tables do not have")
    padding = module.padding_idx if isinstance(module, nn.EmbeddingBag) else None
    tables = tuple(_plain(table) for table in view.tables)
    return ExportHost(path=view.path, kind=kind, tables=tables, padding_idx=padding, **options)


def _plain(view: TableView) -> ExportTable:
    weight = view.weight
    assert weight is not None
    return ExportTable(
        name=view.key,
        rows=view.rows,
        dim=view.dim,
        read_rows=rows_of(weight),
        mean=view.mean,
        features=view.features,
        dtype=weight.dtype,
    )


def rows_of(weight: Tensor) -> Callable[[int, int], Tensor]:
    """Read ranges of rows of a full table as float32.

    Args:
        weight: ``(R, D)``.
    """

    def read(start: int, stop: int) -> Tensor:
        if weight.is_meta:
            raise ExportError("is not allocated: load the weights of the model before the export")
        return weight.detach()[start:stop].to("cpu", torch.float32)

    return read


def _routed(view: HostView, module: RoutedHost, trained: bool) -> ExportHost:
    engine = module.engine
    engine.check_intact()
    features: list[list[str]] = [[] for _ in engine.tables]
    mean = [False] * len(engine.tables)
    for f, t in enumerate(engine.feature_tables):
        mean[t] = engine.mean[f]
    kinds: dict[type[RoutedHost], HostKind] = {
        RoutedEmbeddingBagCollection: "bag_collection",
        RoutedEmbeddingCollection: "collection",
        RoutedEmbeddingBag: "embedding_bag",
        RoutedEmbedding: "embedding",
    }
    kind = next((name for cls, name in kinds.items() if isinstance(module, cls)), None)
    if kind is None:
        raise ExportError(f"{view.path!r} is a {type(module).__name__}, which cannot be exported")
    if isinstance(module, RoutedEmbeddingBagCollection):
        features = [list(config.feature_names) for config in module.embedding_bag_configs()]
    elif isinstance(module, RoutedEmbeddingCollection):
        features = [list(config.feature_names) for config in module.embedding_configs()]
    tables = tuple(
        _routed_table(engine, t, table.key, tuple(features[t]), mean[t], trained) for t, table in enumerate(view.tables)
    )
    return ExportHost(
        path=view.path,
        kind=kind,
        tables=tables,
        is_weighted=isinstance(module, RoutedEmbeddingBagCollection) and module.is_weighted(),
        need_indices=isinstance(module, RoutedEmbeddingCollection) and module.need_indices(),
        include_last_offset=isinstance(module, RoutedEmbeddingBag) and module.include_last_offset,
        padding_idx=module.padding_idx if isinstance(module, RoutedEmbeddingBag | RoutedEmbedding) else None,
    )


def _routed_table(
    engine: RoutedEmbeddings, t: int, key: str, features: tuple[str, ...], mean: bool, trained: bool
) -> ExportTable:
    table = engine.tables[t]
    precision = engine.precision(t)
    if trained and precision is None and engine.values is not None and engine.values.tensors(t):
        raise ExportError(STILL_SEARCHED.format(name=key or PLAIN_TABLE))
    return ExportTable(
        name=key,
        rows=table.rows,
        dim=table.dim,
        read_rows=lambda start, stop: engine.read_rows(t, start, stop).to("cpu", torch.float32),
        mean=mean,
        features=features,
        columns=tuple(table.columns_of(code) for code in range(table.codes)),
        read_codes=lambda start, stop: engine.router.read(t, start, stop)[0].cpu(),
        precision=precision,
        dtype=engine.options.dtype,
    )


def dense_state(root: nn.Module) -> dict[str, Tensor]:
    """State dict of a module without its embedding tables.

    Args:
        root: The module.

    Returns:
        Copies of all tensors that are not part of a module that holds tables.
    """
    inside = tuple(full_name(view.path, "") + "." if view.path else "" for view in find_hosts(root))
    state = root.state_dict()
    return {
        key: value.detach().cpu().clone()
        for key, value in state.items()
        if isinstance(value, Tensor) and not key.startswith(inside)
    }

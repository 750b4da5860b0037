"""Find the embedding tables of any module: one view over TorchRec's collections and PyTorch's embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torchrec.modules.embedding_configs import PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection, FusedEmbeddingCollection

from lightning_embcomp.engine.host import EngineHost
from lightning_embcomp.engine.layout import LANES, PLAIN_TABLE

PLAIN_HOSTS = (
    EmbeddingBagCollection,
    EmbeddingCollection,
    FusedEmbeddingBagCollection,
    FusedEmbeddingCollection,
    nn.EmbeddingBag,
    nn.Embedding,
)


class UnknownTableError(ValueError):
    """A table pattern matches nothing, or the patterns leave no table."""


@dataclass(frozen=True, kw_only=True)
class TableView:
    """One embedding table as the user configured it.

    Args:
        host: Path of the module that holds it, from the root.
        key: Its name inside a collection; empty for a plain embedding.
        rows: Logical rows.
        dim: Columns.
        weight: Full weights, possibly on the meta device; None if an engine holds the table.
        mean: Whether bags are averaged.
        features: Feature names, empty for plain embeddings.
    """

    host: str
    key: str
    rows: int
    dim: int
    weight: torch.Tensor | None
    mean: bool = False
    features: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Unique name: path of the module, and the table's own name in a collection."""
        return ".".join(part for part in (self.host, self.key) if part)

    def matches(self, pattern: str) -> bool:
        """Whether a glob matches the unique name or the table's own name."""
        return any(fnmatchcase(name, pattern) for name in (self.name, self.key, self.host.rpartition(".")[2]) if name)


@dataclass(frozen=True, kw_only=True)
class HostView:
    """A module that holds embedding tables.

    Args:
        path: Its path from the root.
        module: The module.
        tables: Its tables, in order.
    """

    path: str
    module: nn.Module
    tables: tuple[TableView, ...]


def find_hosts(root: nn.Module) -> list[HostView]:
    """Collect all modules that hold embedding tables, in the order of ``named_modules``.

    Args:
        root: Module to search.

    Returns:
        Collections and stand-alone embeddings; embeddings inside a collection belong to the collection.

    Example:
        >>> root = nn.ModuleDict({"user": nn.Embedding(5, 4)})
        >>> [table.name for host in find_hosts(root) for table in host.tables]
        ['user']
    """
    hosts: list[HostView] = []
    inside: list[str] = []
    for path, module in root.named_modules():
        if any(not parent or path.startswith(parent + ".") for parent in inside):
            continue
        if _is_host(module):
            hosts.append(HostView(path=path, module=module, tables=_tables(path, module)))
            inside.append(path)
    return hosts


def select_tables(hosts: Sequence[HostView], patterns: Sequence[str], who: str) -> list[TableView]:
    """Tables that the patterns choose, whatever the order of the patterns.

    Args:
        hosts: Modules to choose from.
        patterns: Globs; ``*`` matches every table. One that starts with ``!`` excludes what it matches from what the
            others select; without others, from all tables. Single tables that only wildcards match are left out if
            their dim is no multiple of 4, which the engine needs.
        who: Name of the caller for the error.

    Returns:
        Chosen tables in order.

    Raises:
        UnknownTableError: If a pattern, excluding or not, matches no table, or if no table is left.

    Example:
        >>> hosts = find_hosts(nn.ModuleDict({"user": nn.Embedding(5, 4), "item": nn.Embedding(9, 4)}))
        >>> [table.name for table in select_tables(hosts, ["*", "!user"], "me")]
        ['item']
    """
    tables = [table for host in hosts for table in host.tables]
    names = ", ".join(table.name for table in tables) or "none: the model holds no embedding tables"
    for pattern in patterns:
        if not any(table.matches(pattern.removeprefix("!")) for table in tables):
            raise UnknownTableError(f"{who}: no embedding table matches {pattern!r}. Tables of the model: {names}")
    chosen = _matching(tables, patterns)
    left = {table.name for table in _left_plain(chosen, patterns)}
    if patterns and chosen and len(left) == len(chosen):
        raise UnknownTableError(
            f"{who}: {', '.join(map(repr, patterns))} match only tables whose dim is no multiple of {LANES}, which"
            f" cannot be compressed: pad their dim. Tables: {', '.join(f'{t.name} (dim {t.dim})' for t in chosen)}"
        )
    if patterns and not chosen:
        raise UnknownTableError(
            f"{who}: {', '.join(map(repr, patterns))} leave no embedding table: exclude fewer. Tables of the model:"
            f" {names}"
        )
    return [table for table in chosen if table.name not in left]


def left_plain(hosts: Sequence[HostView], patterns: Sequence[str]) -> list[TableView]:
    """Tables that the patterns match, but that :func:`select_tables` leaves as they are.

    These are single tables, outside of collections, whose dim is no multiple of 4 and which no pattern names exactly.

    Args:
        hosts: Modules to choose from.
        patterns: Globs as for :func:`select_tables`.

    Example:
        >>> hosts = find_hosts(nn.ModuleDict({"user": nn.Embedding(5, 4), "wide": nn.Embedding(5, 1)}))
        >>> [table.name for table in left_plain(hosts, ["*"])], left_plain(hosts, ["*", "wide"])
        (['wide'], [])
    """
    return _left_plain(_matching([table for host in hosts for table in host.tables], patterns), patterns)


def _matching(tables: Sequence[TableView], patterns: Sequence[str]) -> list[TableView]:
    excluded = [pattern.removeprefix("!") for pattern in patterns if pattern.startswith("!")]
    included = [pattern for pattern in patterns if not pattern.startswith("!")]
    if excluded and not included:
        included = ["*"]
    return [
        table
        for table in tables
        if any(table.matches(pattern) for pattern in included)
        and not any(table.matches(pattern) for pattern in excluded)
    ]


def _left_plain(chosen: Sequence[TableView], patterns: Sequence[str]) -> list[TableView]:
    exact = [pattern for pattern in patterns if not pattern.startswith("!") and not set(pattern) & set("*?[")]
    return [
        table
        for table in chosen
        if not table.key and table.dim % LANES and not any(table.matches(pattern) for pattern in exact)
    ]


def in_backward_optimizer(weight: Any) -> tuple[type[torch.optim.Optimizer], Mapping[str, Any]] | None:  # noqa: ANN401
    """Optimizer that ``apply_optimizer_in_backward`` attached to a parameter, None without one.

    Raises:
        ValueError: If it has several.
    """
    classes, options = getattr(weight, "_optimizer_classes", None), getattr(weight, "_optimizer_kwargs", None)
    if not classes:
        return None
    if len(classes) > 1:
        raise ValueError(f"a table has {len(classes)} optimizers applied in backward; one is supported")
    return classes[0], (options or [{}])[0]


def _is_host(module: nn.Module) -> bool:
    return isinstance(module, (*PLAIN_HOSTS, EngineHost))


def _tables(path: str, module: nn.Module) -> tuple[TableView, ...]:
    if isinstance(module, EngineHost):
        bare = len(module.logical_tables) == 1 and module.logical_tables[0].name == PLAIN_TABLE
        return tuple(
            TableView(host=path, key="" if bare else t.name, rows=t.rows, dim=t.dim, weight=None)
            for t in module.logical_tables
        )
    if isinstance(module, EmbeddingBagCollection | FusedEmbeddingBagCollection):
        return tuple(
            TableView(
                host=path,
                key=config.name,
                rows=config.num_embeddings,
                dim=config.embedding_dim,
                weight=module.embedding_bags[config.name].weight,
                mean=config.pooling == PoolingType.MEAN,
                features=tuple(config.feature_names),
            )
            for config in module.embedding_bag_configs()
        )
    if isinstance(module, EmbeddingCollection | FusedEmbeddingCollection):
        return tuple(
            TableView(
                host=path,
                key=config.name,
                rows=config.num_embeddings,
                dim=config.embedding_dim,
                weight=module.embeddings[config.name].weight,
                features=tuple(config.feature_names),
            )
            for config in module.embedding_configs()
        )
    assert isinstance(module, nn.EmbeddingBag | nn.Embedding)
    return (
        TableView(
            host=path,
            key="",
            rows=module.num_embeddings,
            dim=module.embedding_dim,
            weight=module.weight,
            mean=isinstance(module, nn.EmbeddingBag) and module.mode == "mean",
        ),
    )

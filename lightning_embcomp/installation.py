"""Put engines in the place of the modules that hold tables, whole or sharded, once for all callbacks of a trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torchrec.distributed.types import ModuleSharder, QuantizedCommCodecs, ShardingPlanner

from lightning_embcomp.composition import Ownership
from lightning_embcomp.engine.host import EngineHost
from lightning_embcomp.engine.layout import LANES, ChunkLayout
from lightning_embcomp.engine.placement import RowPlacement
from lightning_embcomp.engine.plan import FixedPlan
from lightning_embcomp.engine.sharded.collection import RoutedBagsSharder
from lightning_embcomp.errors import SetupError
from lightning_embcomp.planners.callbacks import FootprintCallback, callback_footprints
from lightning_embcomp.planners.planner import CompressionAwarePlanner
from lightning_embcomp.references import check_references
from lightning_embcomp.surgery import build_host, fill, replace, sharded_spec
from lightning_embcomp.tables import HostView, find_hosts, left_plain, select_tables

Cuts = Mapping[str, tuple[int, ChunkLayout]]
"""Chunks and layout by unique table name."""


class ShardingStrategy(Protocol):
    """What callbacks need of a strategy that shards tables over processes."""

    @property
    def planner(self) -> object | None:
        """The user's planner, if he gave one."""

    @property
    def codec_registry(self) -> Mapping[str, QuantizedCommCodecs] | None:
        """Codecs for what processes exchange, by operation."""

    def shard(
        self,
        pl_module: pl.LightningModule,
        sharder_for: Callable[[str, nn.Module], ModuleSharder[Any] | None] | None = None,
        planner: Callable[..., ShardingPlanner] | None = None,
    ) -> None:
        """Shard the embedding collections of a module in place; nothing happens to those that are sharded already.

        Args:
            pl_module: The module.
            sharder_for: Sharder by path and module; None for the usual one.
            planner: Makes the planner.
        """


def install(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    hosts: Sequence[HostView],
    callbacks: Sequence[FootprintCallback],
) -> None:
    """Replace every module that holds a table of any callback; all callbacks of the trainer agree on one engine.

    Args:
        trainer: The trainer, whose strategy may shard the tables.
        pl_module: The module.
        hosts: Its modules that hold tables.
        callbacks: All compression callbacks, in stage order.

    Raises:
        OwnershipError: If two callbacks own the same property of a table.
        SetupError: If a table cannot be replaced.
    """
    cuts: dict[str, tuple[int, ChunkLayout]] = {}
    placed: dict[str, tuple[str, RowPlacement]] = {}
    claimed: set[str] = set()
    ownership = Ownership()
    for callback in callbacks:
        selected = select_tables(hosts, callback.patterns, callback.state_key)
        names = [table.name for table in selected]
        ownership.claim(callback.state_key, callback.owns, names)
        claimed.update(names)
        if callback.owns == "width":
            cuts.update(callback.table_cuts(selected))
            placed.update(dict.fromkeys(names, (callback.state_key, callback.row_placement)))
    wanted = []
    for host in hosts:
        if isinstance(host.module, EngineHost):
            _check_same_cuts(host, cuts)
            if trainer.strategy.root_device.type == "cuda":
                _check_same_placement(host, placed)
            continue
        unallocated = any(table.weight is not None and table.weight.is_meta for table in host.tables)
        if unallocated or any(table.name in claimed for table in host.tables):
            _check_untied(pl_module, host)
            wanted.append(host)
    check_references(pl_module, wanted)
    if wanted:
        _warn_of_plain(hosts, callbacks)
    strategy = sharding_strategy(trainer)
    if strategy is None:
        for host in wanted:
            replace(pl_module, host.path, build_host(host, cuts, pl_module.device, _placement(host, placed)))
    elif wanted:
        wanted = [host for host in wanted if any(table.name in claimed for table in host.tables)]
        _shard(trainer, strategy, pl_module, wanted, callbacks, cuts, placed)
    for host in wanted:
        _start(pl_module.get_submodule(host.path), host, cuts)


def _placement(host: HostView, placed: Mapping[str, tuple[str, RowPlacement]]) -> RowPlacement:
    """Where the rows of a collection live: its tables share row classes, and thus one placement."""
    asked = {table.name: placed[table.name] for table in host.tables if table.name in placed}
    first = next(iter(asked), None)
    for table, (owner, placement) in asked.items():
        if first is not None and placement != asked[first][1]:
            raise SetupError(
                f"tables {first!r} and {table!r} are of one collection, but {asked[first][0]} wants its rows in"
                f" {asked[first][1].kind!r} and {owner} in {placement.kind!r} memory: give both the same placement and"
                " cache, or put the tables into collections of their own"
            )
    return RowPlacement() if first is None else asked[first][1]


def _warn_of_plain(hosts: Sequence[HostView], callbacks: Sequence[FootprintCallback]) -> None:
    left = {table.name: table.dim for c in callbacks for table in left_plain(hosts, c.patterns)}
    if left:
        rank_zero_warn(
            f"tables whose dim is no multiple of {LANES} stay as they are: "
            + ", ".join(f"{name} (dim {dim})" for name, dim in left.items())
            + f". Pad them to compress them, or exclude them (tables={['*', *(f'!{name}' for name in left)]})"
        )


def _shard(
    trainer: pl.Trainer,
    strategy: ShardingStrategy,
    pl_module: pl.LightningModule,
    hosts: Sequence[HostView],
    callbacks: Sequence[FootprintCallback],
    cuts: Cuts,
    placed: Mapping[str, tuple[str, RowPlacement]],
) -> None:
    """Have collections sharded into engines, by a plan that knows how small their tables will be."""
    device = trainer.strategy.root_device
    specs = {host.path: sharded_spec(host, cuts, device, _placement(host, placed)) for host in hosts}
    planner = None
    if strategy.planner is None:
        planner = partial(CompressionAwarePlanner, footprints=callback_footprints(find_hosts(pl_module), callbacks))
    strategy.shard(
        pl_module,
        lambda path, module: (
            RoutedBagsSharder(specs[path], type(module), strategy.codec_registry) if path in specs else None
        ),
        planner,
    )


def _start(routed: nn.Module, source: HostView, cuts: Cuts) -> None:
    """Give tables that stay whole their rows; those that are cut start without, until their owner has chosen them."""
    assert isinstance(routed, EngineHost)
    whole = [table.name not in cuts for table in source.tables]
    stays = {(id(s.engine), s.index) for t, stay in enumerate(whole) if stay for s in routed.shards(t)}
    for engine in routed.engines:
        engine.move(
            FixedPlan([table.full_code if (id(engine), t) in stays else 0 for t, table in enumerate(engine.tables)])
        )
        engine.clear_row_state()
    routed.__dict__["_sources"] = {}
    for t, stay in enumerate(whole):
        if stay:
            fill(routed, t, source)
        else:
            sources(routed)[t] = source


def sharding_strategy(trainer: pl.Trainer) -> ShardingStrategy | None:
    """The strategy, if it shards tables."""
    strategy: Any = trainer.strategy
    return strategy if callable(getattr(strategy, "shard", None)) else None


def sources(host: EngineHost) -> dict[int, HostView]:
    """Replaced modules of tables that have no rows yet, by table index."""
    sources: dict[int, HostView] = host.__dict__.setdefault("_sources", {})
    return sources


def _check_untied(pl_module: pl.LightningModule, host: HostView) -> None:
    """Refuse tables whose weights are also used elsewhere: they would drift apart."""
    mine = {id(table.weight): table.name for table in host.tables}
    inside = {id(parameter) for parameter in host.module.parameters()}
    outside = {id(module) for module in pl_module.modules()} - {id(module) for module in host.module.modules()}
    for path, module in pl_module.named_modules():
        for name, parameter in module._parameters.items() if id(module) in outside else ():
            if id(parameter) in mine and id(parameter) in inside:
                raise SetupError(
                    f"table {mine[id(parameter)]!r} shares its weights with {f'{path}.{name}'.lstrip('.')}, which would"
                    " keep the old ones: leave it out of the callback"
                )


def _check_same_placement(host: HostView, placed: Mapping[str, tuple[str, RowPlacement]]) -> None:
    assert isinstance(host.module, EngineHost)
    wanted, found = _placement(host, placed), host.module.options.placement
    if wanted != found and any(table.name in placed for table in host.tables):
        raise SetupError(
            f"the rows of {host.path!r} were made for {_shown(found)}, but {_shown(wanted)} is asked for: use the"
            " settings of the first run, or start from a plain module and load a checkpoint into it"
        )


def _shown(placement: RowPlacement) -> str:
    cache = f" with {placement.cache}" if placement.kind == "managed_caching" else ""
    return f"placement={placement.kind!r}{cache}"


def _check_same_cuts(host: HostView, cuts: Cuts) -> None:
    assert isinstance(host.module, EngineHost)
    for view, table in zip(host.tables, host.module.logical_tables, strict=True):
        wanted = cuts.get(view.name)
        if wanted is not None and wanted != (table.chunks, table.layout):
            raise SetupError(
                f"table {view.name!r} is already stored in {table.chunks} chunks with layout {table.layout!r}, but"
                f" {wanted[0]} chunks with layout {wanted[1]!r} are asked for: use the settings of the first run, or"
                " start from a plain module"
            )

"""Why there is no plan, and what to change."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from torchrec.distributed.planner.types import ShardingOption, Storage, Topology
from torchrec.distributed.types import ShardingType

from lightning_embcomp.engine.layout import LogicalTable, fitting_chunks
from lightning_embcomp.engine.optimizer import FusedOptimizerSpec, UnsupportedOptimizerError
from lightning_embcomp.planners.footprint import TableFootprint
from lightning_embcomp.planners.pruning import PrunedTable, pruned_footprints
from lightning_embcomp.planners.router import in_engine
from lightning_embcomp.planners.rules import fused_optimizer, name_of
from lightning_embcomp.report.view import size

TARGETS = (0.25, 0.5, 0.65, 0.8, 0.9, 0.95, 0.98)
"""Fractions of weight bytes to remove that are tried."""

_CHUNKS = 4  # the default of dimension pruning


def diagnose(
    options: list[ShardingOption],
    topology: Topology,
    reserved: Topology,
    footprints: Mapping[str, TableFootprint],
    target: float | None,
) -> str:
    """Explain why tables do not fit.

    Args:
        options: All ways of sharding each table.
        topology: Ranks and their memory.
        reserved: The same without what is kept free.
        footprints: What compressed tables take.
        target: Pruning target under which there is a plan, if one was found.

    Returns:
        Several lines: what misses, table by table where one is too large for a rank, and what helps.
    """
    ranks, kind = topology.world_size, "ddr" if topology.compute_device == "cpu" else "hbm"
    capacity = max(_bytes(device.storage, kind) for device in reserved.devices)
    kept_free = max(_bytes(device.storage, kind) for device in topology.devices) - capacity
    by_table: dict[str, list[ShardingOption]] = {}
    for option in options:
        by_table.setdefault(name_of(option), []).append(option)
    least = {name: min(_total(option, kind) for option in found) for name, found in by_table.items()}
    total, available = sum(least.values()), ranks * capacity
    free = f", {size(kept_free)} more kept free" if kept_free else ""
    lines = [f"no plan places the tables on {ranks} ranks with {size(capacity)} of {kind} each{free}."]
    if total > available:
        lines.append(
            f"All tables take {size(total)} at least, {size(total - available)} more than the {size(available)} of all"
            " ranks."
        )
    helps = []
    too_large = {name: found for name, found in by_table.items() if _largest_shard(found, kind) > capacity}
    for name, found in too_large.items():
        needed = _largest_shard(found, kind)
        types = ", ".join(dict.fromkeys(option.sharding_type for option in found))
        lines.append(
            f"Table {name!r} needs a rank with {size(needed)} (allowed: {types}), {size(needed - capacity)} more than"
            " there is."
        )
        if all(option.sharding_type != ShardingType.ROW_WISE.value for option in found):
            helps.append(f"allow row_wise for {name!r}")
    if total <= available and not too_large:
        lines.append(
            f"All tables take {size(total)} of the {size(available)} of all ranks, but their shards do not pack: the"
            f" largest table takes {size(max(least.values()))}."
        )
        helps.append("allow row_wise for the largest tables")
    if target is not None:
        pruned = "prune more" if any(f.kept < 1 for f in footprints.values()) else "prune the tables"
        helps.append(f"{pruned}: DimensionPruning(target={target:g}) fits")
    if total > available:
        helps.append(f"use at least {math.ceil(total / capacity) if capacity else ranks + 1} ranks of this size")
        helps.append(f"use ranks with {size(math.ceil(total / ranks) + kept_free)} of {kind} or more")
    else:
        helps.append(f"use more ranks, or ranks with more {kind}")
    return "\n".join([*lines, f"What helps: {'; or '.join(dict.fromkeys(helps))}."])


def prunable(
    options: list[ShardingOption], footprints: Mapping[str, TableFootprint]
) -> Iterator[tuple[float, dict[str, TableFootprint]]]:
    """Footprints under rising pruning targets, of all tables that can be pruned.

    Args:
        options: All ways of sharding each table.
        footprints: What compressed tables take now; targets that remove less are left out.

    Yields:
        Target and footprints; nothing if no table can be pruned.
    """
    tables = {
        name_of(option): PrunedTable(name=name_of(option), rows=option.tensor.shape[0], dim=option.tensor.shape[1])
        for option in options
        if _can_be_pruned(option)
    }
    plain = sum(table.plain for table in tables.values())
    kept = sum(table.plain * footprints.get(name, TableFootprint()).kept for name, table in tables.items())
    for target in TARGETS:
        if not tables or target <= 1 - kept / plain + 1e-6:
            continue
        pruned = pruned_footprints(list(tables.values()), target=target, chunks=_CHUNKS)
        yield (
            target,
            {**footprints, **{name: in_engine(found, len(found.live), "prefix") for name, found in pruned.items()}},
        )


def _can_be_pruned(option: ShardingOption) -> bool:
    rows, dim = option.tensor.shape
    optimizer = fused_optimizer(option.module[1], option.tensor)
    try:
        LogicalTable(name=option.name, rows=rows, dim=dim, chunks=fitting_chunks(dim, _CHUNKS))
        return optimizer is not None and bool(FusedOptimizerSpec.from_torch(optimizer, {}, option.name))
    except (ValueError, UnsupportedOptimizerError):
        return False


def _largest_shard(options: list[ShardingOption], kind: str) -> int:
    """Bytes that a rank needs at least, whichever option is chosen."""
    return min(max(_bytes(shard.storage, kind) for shard in option.shards) for option in options)


def _total(option: ShardingOption, kind: str) -> int:
    return _bytes(option.total_storage, kind)


def _bytes(storage: Storage | None, kind: str) -> int:
    return int(getattr(storage, kind))

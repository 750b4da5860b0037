"""The plan of plain tables beside that of compressed ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.types import ModuleSharder

from lightning_embcomp.engine.routed import RoutedOptions
from lightning_embcomp.engine.sharded.collection import RoutedBagsSharder, ShardedSpec
from lightning_embcomp.planners.footprint import TableFootprint
from lightning_embcomp.planners.options import Machine, TableRules
from lightning_embcomp.planners.planner import RESERVED, CompressionAwarePlanner
from lightning_embcomp.planners.summary import PlanSummary
from lightning_embcomp.strategies.sharders import SharderByModule, default_sharders
from lightning_embcomp.tables import TableView, find_hosts

DEFAULT_BATCH = 512


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """What to plan.

    Args:
        root: Module with the tables, on the meta device.
        machine: The ranks.
        rules: What may be done with the tables.
        batch_size: Samples per rank.
        reserved: Share of device memory to keep free.
    """

    root: nn.Module
    machine: Machine
    rules: TableRules = field(default_factory=TableRules)
    batch_size: int = DEFAULT_BATCH
    reserved: float = RESERVED


@dataclass(frozen=True, kw_only=True)
class PlanOutcome:
    """A plan, or why there is none.

    Args:
        summary: The plan in numbers.
        refusal: Why there is no plan, and what to change.
    """

    summary: PlanSummary | None = None
    refusal: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {"plan": None if self.summary is None else self.summary.as_dict(), "refusal": self.refusal}


def plan_tables(request: PlanRequest, footprints: Mapping[str, TableFootprint] | None = None) -> PlanOutcome:
    """Plan tables without any process group, device or allocation.

    Args:
        request: What to plan.
        footprints: What compressed tables take; all are plain by default.

    Returns:
        The plan that training would get, or the reason why there is none.

    Raises:
        PlanInputError: If a rule matches no table, or cannot be kept to.
    """
    found = _sharders(request, footprints or {})
    topology = request.machine.topology()
    planner = CompressionAwarePlanner(
        topology,
        batch_size=request.batch_size,
        storage_reservation=FixedPercentageStorageReservation(percentage=request.reserved),
        constraints=request.rules.constraints(request.root, found, request.machine),
        footprints=footprints,
        stats=[],
        debug=False,
    )
    try:
        planner.plan(request.root, _by_type(request.root, found))
    except PlannerError as error:
        return PlanOutcome(refusal=str(error).strip())
    return PlanOutcome(summary=PlanSummary.of(planner.chosen, topology))


def _sharders(request: PlanRequest, footprints: Mapping[str, TableFootprint]) -> dict[str, ModuleSharder[nn.Module]]:
    """Sharder of every collection, by path: that of engines where a table is compressed."""
    defaults = default_sharders(request.rules.fused_params)
    engines = {kind: RoutedBagsSharder(ShardedSpec((), RoutedOptions(optimizer=None)), kind) for kind in defaults}
    found: dict[str, ModuleSharder[nn.Module]] = {}
    for host in find_hosts(request.root):
        kind = type(host.module)
        if kind in defaults:
            compressed = any(table.name in footprints for table in host.tables)
            found[host.path] = engines[kind] if compressed else defaults[kind]
    return found


def _by_type(root: nn.Module, found: Mapping[str, ModuleSharder[nn.Module]]) -> list[ModuleSharder[nn.Module]]:
    """One sharder for each type, which is what TorchRec's planner can take."""
    by_type: dict[type[nn.Module], dict[int, ModuleSharder[nn.Module]]] = {}
    for path, sharder in found.items():
        module = root.get_submodule(path)
        by_type.setdefault(type(module), {})[id(module)] = sharder
    return [
        next(iter(by_module.values()))
        if len(set(map(id, by_module.values()))) == 1
        else SharderByModule(kind, by_module)
        for kind, by_module in by_type.items()
    ]


def sharded_tables(request: PlanRequest) -> list[TableView]:
    """Tables that are sharded, in order; stand-alone embeddings are copied to every rank instead."""
    types = default_sharders(request.rules.fused_params)
    return [table for host in find_hosts(request.root) if type(host.module) in types for table in host.tables]

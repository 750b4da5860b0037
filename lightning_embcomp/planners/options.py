"""Machines, and what may be done with tables, as the command line and configurations give them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner.types import (
    HardwareConfig,
    KernelConfig,
    ParameterConstraints,
    Topology,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.types import ModuleSharder, ShardingType

from lightning_embcomp.engine.sharded.collection import RoutedBagsSharder
from lightning_embcomp.planners.rules import table_name
from lightning_embcomp.strategies.options import COLUMN_WISE, column_width, fused_optimizer_name

_DENSE, _FUSED = EmbeddingComputeKernel.DENSE.value, EmbeddingComputeKernel.FUSED.value


class PlanInputError(ValueError):
    """Something that a plan needs is missing or cannot be read."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Ranks to plan for.

    Args:
        ranks: Processes, one device each.
        local_ranks: Processes on a machine; all by default.
        hbm: Device memory of a rank in bytes; None plans for CPUs.
        ddr: Host memory of a rank that tables may use, in bytes; None for none beside devices.

    Raises:
        PlanInputError: If there is no memory, or ranks do not fill machines.

    Example:
        >>> Machine(ranks=8, hbm=80 * 10**9).device
        'cuda'
    """

    ranks: int
    local_ranks: int | None = None
    hbm: int | None = None
    ddr: int | None = None

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise PlanInputError(f"the number of ranks must be at least 1, not {self.ranks}")
        if self.local_ranks is not None and (self.local_ranks < 1 or self.ranks % self.local_ranks):
            raise PlanInputError(f"{self.ranks} ranks do not fill machines of {self.local_ranks}")
        if self.hbm is None and self.ddr is None:
            raise PlanInputError(
                "give the memory of a rank: --hbm 80GB for a GPU, or --ddr 64GB alone for tables in host memory"
            )

    @property
    def device(self) -> str:
        """``cuda`` or ``cpu``."""
        return "cpu" if self.hbm is None else "cuda"

    def topology(self) -> Topology:
        """The ranks as TorchRec's planner sees them, with its default bandwidths."""
        return TopologyFactory.create_topology(
            TrainerConfig(world_size=self.ranks, local_world_size=self.local_ranks or self.ranks),
            HardwareConfig(hbm_cap_bytes=self.hbm, ddr_cap_bytes=self.ddr),
            KernelConfig(compute_device=self.device),
        )


@dataclass(frozen=True, kw_only=True)
class TableRules:
    """What may be done with tables, by globs of their names; the first glob that matches counts.

    Args:
        sharding: Allowed sharding types.
        pooling: Ids per sample and feature; 1 by default.
        fused_params: Optimizer for tables without one of their own.
    """

    sharding: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    pooling: Mapping[str, float] = field(default_factory=dict)
    fused_params: Mapping[str, Any] | None = None

    def constraints(
        self, root: nn.Module, sharders: Mapping[str, ModuleSharder[nn.Module]], machine: Machine
    ) -> dict[str, ParameterConstraints]:
        """TorchRec's constraints, as ``TorchRecStrategy`` sets them.

        Args:
            root: Module whose collections are to be sharded.
            sharders: Sharder of each collection, by path.
            machine: The ranks.

        Returns:
            Constraints by a table's own name, which is all that TorchRec's planner knows.

        Raises:
            PlanInputError: If a glob matches no table, or a table cannot be sharded as asked.
        """
        found: dict[str, ParameterConstraints] = {}
        names: list[tuple[str, str]] = []
        for path, sharder in sharders.items():
            module = root.get_submodule(path)
            features = {config.name: len(config.feature_names) for config in _configs(module)}
            for name, weight in sharder.shardable_parameters(module).items():
                names.append((name, table_name(path, name)))
                optimizer = fused_optimizer_name(module, weight, self.fused_params)
                kinds = self._kinds(names[-1], optimizer, sharder, machine)
                if name in found:
                    kinds = [kind for kind in kinds if kind in (found[name].sharding_types or ())]
                cut = _first(self.sharding, names[-1]) is not None and any(kind in COLUMN_WISE for kind in kinds)
                factor = _first(self.pooling, names[-1]) or 1.0
                kernels = [_FUSED, _DENSE] if optimizer is None else [_FUSED] if machine.ddr is None else None
                found[name] = ParameterConstraints(
                    sharding_types=kinds,
                    compute_kernels=kernels,
                    min_partition=column_width(weight.shape[1], machine.ranks) if cut else None,
                    pooling_factors=[float(factor)] * features.get(name, 1),
                )
        for pattern in (*self.sharding, *self.pooling):
            if not any(_matches(pattern, name) for name in names):
                raise PlanInputError(
                    f"{pattern!r} matches no table; there are {', '.join(unique for _, unique in names) or 'none'}"
                )
        return found

    def _kinds(
        self, name: tuple[str, str], optimizer: str | None, sharder: ModuleSharder[nn.Module], machine: Machine
    ) -> list[str]:
        offered = sharder.sharding_types(machine.device)
        asked = _first(self.sharding, name)
        if asked is not None:
            missing = [kind for kind in asked if kind not in offered]
            if missing:
                raise PlanInputError(
                    f"table {name[1]!r} cannot be sharded {missing[0]} on {machine.device}; it can be"
                    f" {', '.join(offered)}"
                )
            return list(asked)
        if isinstance(sharder, RoutedBagsSharder):
            return offered
        left_out = {ShardingType.GRID_SHARD.value}
        if machine.device == "cpu":
            left_out.add(ShardingType.TABLE_ROW_WISE.value)
        if optimizer is not None:
            left_out.add(ShardingType.DATA_PARALLEL.value)
            if "rowwise" in optimizer.lower().replace("_", ""):
                left_out.update(COLUMN_WISE)  # every part would keep an accumulator of its own
        return [kind for kind in offered if kind not in left_out]


def by_glob(entries: Sequence[str], option: str) -> dict[str, str]:
    """Read entries of the form GLOB=VALUE.

    Args:
        entries: What was given.
        option: Name of the option, for the message.

    Raises:
        PlanInputError: If one has another form.

    Example:
        >>> by_glob(["t_*=row_wise"], "--sharding")
        {'t_*': 'row_wise'}
    """
    found = {}
    for entry in entries:
        pattern, equals, value = entry.partition("=")
        if not equals or not pattern or not value:
            raise PlanInputError(f"{option} takes GLOB=VALUE, not {entry!r}")
        found[pattern] = value
    return found


def _configs(module: nn.Module) -> Sequence[Any]:
    for method in ("embedding_bag_configs", "embedding_configs"):
        configs: Any = getattr(module, method, None)
        if callable(configs):
            found: Sequence[Any] = configs()
            return found
    return ()


def _matches(pattern: str, name: tuple[str, str]) -> bool:
    return any(fnmatchcase(part, pattern) for part in name)


def _first(entries: Mapping[str, Any], name: tuple[str, str]) -> Any:  # noqa: ANN401
    return next((value for pattern, value in entries.items() if _matches(pattern, name)), None)

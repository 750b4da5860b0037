"""TorchRec's search space, without what would not keep what was asked for."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.types import (
    ParameterConstraints,
    PlannerError,
    PlannerErrorType,
    ShardingOption,
    Topology,
)
from torchrec.distributed.types import ModuleSharder

from lightning_embcomp.compat import fused_params
from lightning_embcomp.planners.footprint import TableFootprint
from lightning_embcomp.planners.perf import CompressedPerfEstimator
from lightning_embcomp.planners.rules import is_second_choice, name_of, refusal
from lightning_embcomp.planners.storage import CompressedStorageEstimator


class CompressedEnumerator(EmbeddingEnumerator):
    """Ways of sharding tables, with bytes and time that know how tables are compressed.

    Args:
        topology: Ranks and their memory.
        batch_size: Samples per rank.
        footprints: What compressed tables take, by unique name; others are plain.
        constraints: TorchRec's constraints, by a table's own name.
    """

    def __init__(
        self,
        topology: Topology,
        batch_size: int,
        footprints: Mapping[str, TableFootprint],
        constraints: dict[str, ParameterConstraints] | None = None,
    ) -> None:
        super().__init__(
            topology,
            batch_size,
            constraints,
            estimator=[
                CompressedPerfEstimator(topology, constraints, footprints=footprints),
                CompressedStorageEstimator(topology, constraints, footprints=footprints),
            ],
        )
        self._footprints = dict(footprints)

    def enumerate(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> list[ShardingOption]:
        """All ways of sharding each table.

        Args:
            module: The module.
            sharders: TorchRec's sharders.

        Returns:
            Options with bytes and time of every shard.

        Raises:
            PlannerError: If none is left for a table, or a footprint belongs to no table.
        """
        kept: dict[str, list[ShardingOption]] = {}
        reasons: dict[str, list[str]] = {}
        found = super().enumerate(module, sharders)
        for option in found:
            params = fused_params(self, option.module_type_key)
            name = name_of(option)
            reason = refusal(option, self._footprint(name), "optimizer" in params)
            reasons.setdefault(name, []).append(reason or "")
            if reason is None:
                kept.setdefault(name, []).append(option)
        for name, given in reasons.items():
            if all(given):
                raise PlannerError(
                    f"table {name!r} cannot be sharded: {'; '.join(dict.fromkeys(given))}. Allow other sharding types"
                    " or kernels for it, or leave it out of the callback",
                    PlannerErrorType.STRICT_CONSTRAINTS,
                )
        unknown = sorted(set(self._footprints) - set(reasons))
        if found and unknown:
            raise PlannerError(
                f"there is a footprint for {unknown[0]!r}, but the tables are {', '.join(reasons)}",
                PlannerErrorType.OTHER,
            )
        return [option for name, options in kept.items() for option in self._faithful(name, options)]

    # TorchRec's order is that of a set of strings, which changes from run to run: so would plans among equals.

    def _filter_sharding_types(self, name: str, allowed_sharding_types: list[str], *args: str) -> list[str]:
        found = super()._filter_sharding_types(name, allowed_sharding_types, *args)
        return [kind for kind in allowed_sharding_types if kind in found]

    def _filter_compute_kernels(self, name: str, allowed_compute_kernels: list[str], *args: str) -> list[str]:
        found = super()._filter_compute_kernels(name, allowed_compute_kernels, *args)
        return [kernel for kernel in allowed_compute_kernels if kernel in found]

    def _footprint(self, name: str) -> TableFootprint:
        return self._footprints.get(name, TableFootprint())

    def _faithful(self, name: str, options: list[ShardingOption]) -> list[ShardingOption]:
        """Without second choices, unless nothing else was allowed."""
        return [option for option in options if not is_second_choice(option, self._footprint(name))] or options

"""What the parts of the strategy know of the sharded tables."""

from __future__ import annotations

from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torchrec.distributed.types import ShardingPlan

from lightning_embcomp.strategies.discovery import find_sharded


class ShardsTables(DDPStrategy):
    """Base of the parts of the strategy.

    Attributes:
        plan: Plan of all sharded collections; None before anything is sharded.
    """

    plan: ShardingPlan | None
    _fused_tables: list[str]
    """Names of the tables whose optimizer runs inside the backward pass."""
    _parameter_order: list[list[list[str]]]
    """Names of all parameters that ``configure_optimizers`` gave to each group of each optimizer, fused ones too."""

    @property
    def sharded_paths(self) -> list[str]:
        """Paths of the sharded collections in the module."""
        return [] if self.lightning_module is None else list(self.sharded_modules)

    @property
    def sharded_modules(self) -> dict[str, nn.Module]:
        """The sharded collections of the module, by path."""
        return {} if self.lightning_module is None else find_sharded(self.lightning_module)

    def _names(self) -> dict[int, str]:
        """Names of all parameters, by ``id``."""
        assert self.lightning_module is not None
        names = {id(parameter): name for name, parameter in self.lightning_module.named_parameters()}
        for path, module in self.sharded_modules.items():
            for inner, child in module.named_modules(prefix=path):
                names.update({id(p): f"{inner}.{n}" for n, p in child._parameters.items() if p is not None})
        return names

"""The part of the strategy that runs optimizers, beside tables that are updated in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torchrec.optim.keyed import KeyedOptimizer

from lightning_embcomp.strategies.base import ShardsTables
from lightning_embcomp.strategies.clipping import clip_grad_norm, spread_parameters
from lightning_embcomp.strategies.errors import ShardingError
from lightning_embcomp.strategies.optimizer_state import plain_parts
from lightning_embcomp.strategies.optimizers import (
    FusedRates,
    drop_fused_parameters,
    fused_optimizers,
    is_fused,
    step_after_closure,
)


class StepsOnce(ShardsTables):
    """The part of the strategy that runs each closure once, and clips by the norm over all processes."""

    _rates: FusedRates | None = None

    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        """Build the optimizers, and take fused tables out of them.

        Args:
            trainer: The trainer.
        """
        super().setup_optimizers(trainer)
        modules = list(self.sharded_modules.values())
        names = self._names()
        self._parameter_order = [
            [[names.get(id(p), "") for p in group["params"]] for group in optimizer.param_groups]
            for _, optimizer in plain_parts(self.optimizers)
        ]
        drop_fused_parameters(self.optimizers, (p for m in modules for p in m.parameters() if is_fused(p)))
        self._rates = FusedRates(fused_optimizers(modules, self.optimizers))

    def setup_precision_plugin(self) -> None:
        """Connect the precision plugin, and let it clip by the norm over all processes."""
        super().setup_precision_plugin()
        # Lightning asks the plugin, whatever its class, and leaves no other place for a strategy.
        self.precision_plugin.clip_grad_by_norm = self._clip_grad_by_norm  # type: ignore[method-assign]

    def _clip_grad_by_norm(self, optimizer: torch.optim.Optimizer, clip_val: int | float) -> None:
        if self._fused_tables:
            raise ShardingError("gradient clipping does not reach fused tables: train them from configure_optimizers")
        if clip_val > 0:
            spread = spread_parameters(self.sharded_modules, self.plan)
            parameters = list(self.precision_plugin.main_params(optimizer))
            clip_grad_norm(
                [p for p in parameters if id(p) in spread],
                [p for p in parameters if id(p) not in spread],
                float(clip_val),
                self.root_device,
            )

    def training_step(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Bring learning rates to the fused tables, which note them in the forward pass, and run the module's step."""
        if self._rates is not None:
            self._rates.push()
        return super().training_step(*args, **kwargs)

    def optimizer_step(
        self,
        optimizer: torch.optim.Optimizer,
        closure: Callable[[], Any],
        model: pl.LightningModule | nn.Module | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Run the closure exactly once, and step.

        Args:
            optimizer: The optimizer.
            closure: Forward and backward pass.
            model: The module.
            **kwargs: Arguments for the optimizer's step.
        """
        has_scaler = getattr(self.precision_plugin, "scaler", None) is not None  # runs the closure by itself
        if isinstance(optimizer, KeyedOptimizer) and not has_scaler:
            assert self.lightning_module is not None
            return step_after_closure(self.precision_plugin, optimizer, self.lightning_module, closure)
        return super().optimizer_step(optimizer, closure, model, **kwargs)

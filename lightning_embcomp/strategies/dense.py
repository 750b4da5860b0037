"""The part of the strategy that wraps the dense rest of a module in DDP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch.overrides.distributed import _register_ddp_comm_hook
from torch.nn.parallel import DistributedDataParallel

from lightning_embcomp.strategies.base import ShardsTables
from lightning_embcomp.strategies.errors import ShardingError
from lightning_embcomp.strategies.sharding import materialise
from lightning_embcomp.strategies.wrapping import has_dense_parameters, move_dense, sync_dense_states


class WrapsDense(ShardsTables):
    """The part of the strategy that sees to everything but the tables."""

    def model_to_device(self) -> None:
        """Move the dense rest to the device; tables were built there."""
        assert self.lightning_module is not None
        materialise(self.lightning_module, self.root_device)
        move_dense(self.lightning_module, self.sharded_paths, self.root_device)

    def configure_ddp(self) -> None:
        """Wrap the module in DDP, with sharded parameters left out; a module of tables alone stays as it is."""
        assert self.lightning_module is not None
        if has_dense_parameters(self.lightning_module):
            super().configure_ddp()
            return
        if self._ddp_comm_hook is not None:
            raise ShardingError("a communication hook has no effect on a module without dense parameters: drop it")
        sync_dense_states(self.lightning_module)

    def _register_ddp_hooks(self) -> None:
        if self._ddp_comm_hook is not None:
            assert isinstance(self.model, DistributedDataParallel)
            _register_ddp_comm_hook(
                model=self.model,
                ddp_comm_state=self._ddp_comm_state,
                ddp_comm_hook=self._ddp_comm_hook,
                ddp_comm_wrapper=self._ddp_comm_wrapper,
            )

    def register_comm_hook(self, state: object, hook: Callable[..., Any]) -> None:
        """Set the communication hook for gradients of the dense rest, before or after the module is wrapped.

        Args:
            state: Handed to the hook.
            hook: Called with the state and a bucket; DDP wants it annotated
                ``-> torch.futures.Future[torch.Tensor]``.

        Raises:
            ShardingError: If there is a hook already.

        Example:
            >>> from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
            >>> from lightning_embcomp.strategies import TorchRecStrategy
            >>> strategy = TorchRecStrategy()
            >>> strategy.register_comm_hook(None, bf16_compress_hook)
        """
        if self._ddp_comm_hook is not None:
            name = getattr(self._ddp_comm_hook, "__name__", repr(self._ddp_comm_hook))
            raise ShardingError(
                f"DDP takes one communication hook, and {name} is set already: drop ddp_comm_hook=..., or one of the"
                " callbacks that set a hook"
            )
        self._ddp_comm_hook, self._ddp_comm_state = hook, state
        if isinstance(self.model, DistributedDataParallel):
            self._register_ddp_hooks()

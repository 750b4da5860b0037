"""Bring trained tables back from processes that Lightning spawns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from lightning_embcomp.checkpoints import as_slices
from lightning_embcomp.strategies.discovery import find_sharded
from lightning_embcomp.strategies.errors import ShardingError
from lightning_embcomp.strategies.weights import scatter_whole


def gather_tables(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Put whole tables together on process 0; all processes call it.

    Args:
        modules: Sharded collections, by path.

    Returns:
        Whole tables by their keys in the state dict, in the memory of process 0; nothing on the others.

    Raises:
        ShardingError: If a collection keeps its tables in a form of its own.
    """
    whole: dict[str, Tensor] = {}
    for path, module in modules.items():
        if hasattr(module, "distributed_state"):
            raise ShardingError(
                f"the compressed tables of {path!r} cannot be handed back by spawned processes: use start_method="
                "'popen', or torchrun"
            )
        for key, tensor in module.state_dict().items():
            parts = as_slices(tensor)
            pieces = [(offsets, piece.cpu()) for offsets, piece in parts.pieces]
            gathered: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
            dist.gather_object(pieces, gathered)
            if gathered is not None:
                full = torch.empty(parts.shape, dtype=next(p.dtype for found in gathered for _, p in found))
                for offsets, piece in (entry for found in gathered for entry in found):
                    place = tuple(slice(o, o + s) for o, s in zip(offsets, piece.shape, strict=True))
                    scatter_whole(piece, [((0,) * piece.dim(), full[place])])
                whole[f"{path}.{key}"] = full
    return whole


class TableLauncher(_MultiProcessingLauncher):
    """Lightning's launcher, which hands the trained module back to the main process, with whole tables.

    That needs room for all tables in one process: ``popen``, torchrun and SLURM do not.
    """

    def launch(
        self,
        function: Callable[..., Any],
        *args: Any,  # noqa: ANN401 - of the function
        trainer: pl.Trainer | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Spawn the processes.

        Args:
            function: What to run in each of them.
            *args: Its arguments, the module among them.
            trainer: The trainer.
            **kwargs: Its arguments.

        Raises:
            ShardingError: If the module would lose optimizers on its way.
        """
        for module in args:
            if isinstance(module, nn.Module):
                for name, parameter in module.named_parameters():
                    if hasattr(parameter, "_in_backward_optimizers"):
                        raise ShardingError(
                            f"{name} would reach spawned processes without the optimizer that"
                            " apply_optimizer_in_backward has given it: use start_method='popen' or torchrun, or build"
                            " the tables in configure_model"
                        )
        return super().launch(function, *args, trainer=trainer, **kwargs)

    def _collect_rank_zero_results(self, trainer: pl.Trainer, results: Any) -> Any:  # noqa: ANN401 - Lightning's own
        module = trainer.lightning_module
        whole = gather_tables(find_sharded(module)) if trainer.state.fn == TrainerFn.FITTING else {}

        def put(_: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:  # noqa: ANN401
            if not prefix:
                state.update(whole)

        handle = module.register_state_dict_post_hook(put)
        try:
            return super()._collect_rank_zero_results(trainer, results)
        finally:
            handle.remove()

"""State and learning rates of fused optimizers, by table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.optim.fused import FusedOptimizerModule

from lightning_embcomp.checkpoints import CheckpointReader, as_slices
from lightning_embcomp.strategies.errors import ShardingError
from lightning_embcomp.strategies.optimizers import fused_optimizers
from lightning_embcomp.strategies.weights import scatter_whole

FUSED = "fused/"
"""Before the names of fused optimizers' state in a checkpoint; the rest is ``path/parameter/state``."""


def fused_state(modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    """State tensors of all fused optimizers, such as the accumulators of Adagrad.

    Args:
        modules: Sharded collections by path. Those that save themselves are left out.

    Returns:
        Sharded tensors, which share memory with the optimizers, by name in a checkpoint.
    """
    return {
        f"{FUSED}{path}/{key}/{name}": tensor
        for path, module in _saved_by_strategy(modules)
        for key, state in module.fused_optimizer.state_dict()["state"].items()
        for name, tensor in state.items()
    }


def load_fused_state(modules: Mapping[str, nn.Module], reader: CheckpointReader) -> None:
    """Read the state back, for any number of processes and other sharding types.

    Row-wise Adagrad keeps the mean square of a row's gradients, and one for each part of it where the table is cut by
    columns. The mean of these, for parts of one width, is exactly that of the row; going the other way, every part gets
    that of the row.

    Args:
        modules: Sharded collections by path.
        reader: The checkpoint.

    Raises:
        ShardingError: If the checkpoint has no such state: its tables were not trained by that fused optimizer.
    """
    available = reader.keys()
    for name, tensor in fused_state(modules).items():
        wanted, saved = tensor.size(), reader.shape(name) if name in available else None
        if wanted == saved:
            reader.read_into({name: tensor})
            continue
        rows = _table_rows(modules, name)
        if saved is None or len(saved) != 1 or len(wanted) != 1 or saved[0] % rows or wanted[0] % rows:
            raise ShardingError(
                f"the checkpoint's state for {name.removeprefix(FUSED)!r} has shape {saved and tuple(saved)}, this"
                f" run's {tuple(wanted)}: its table had another fused optimizer. Use that of the saved run, or load"
                " the weights alone"
            )
        # One value per row and column shard, one shard's rows after the other's.
        whole = torch.empty(saved, dtype=reader.dtype(name))
        reader.read_into({name: whole})
        scatter_whole(whole.view(-1, rows).mean(0).repeat(wanted[0] // rows), as_slices(tensor).pieces)


def _table_rows(modules: Mapping[str, nn.Module], name: str) -> int:
    path, key, _ = name.removeprefix(FUSED).split("/", 2)
    weight = modules[path].state_dict()[key]
    return int(weight.size()[0])


def rates(modules: Mapping[str, nn.Module]) -> dict[str, dict[str, float]]:
    """Learning rate, and number of updates, of the tables of this process.

    Args:
        modules: Sharded collections by path.

    Returns:
        ``lr``, and ``step`` for optimizers that count, by ``path/parameter``.
    """
    found: dict[str, dict[str, float]] = {}
    for path, module in _saved_by_strategy(modules):
        for optimizer in fused_optimizers([module], []):
            for key in optimizer.params:
                if key:  # handles for single tables name none
                    entry = {"lr": float(next(iter(optimizer.param_groups))["lr"])}
                    step = getattr(getattr(optimizer, "_emb_module", None), "iter", None)
                    if isinstance(step, Tensor) and step.numel() == 1:
                        entry["step"] = float(step.item())
                    found[f"{path}/{key}"] = entry
    return found


def load_rates(modules: Mapping[str, nn.Module], saved: Mapping[str, Mapping[str, float]]) -> None:
    """Put learning rates and numbers of updates back.

    Args:
        modules: Sharded collections by path.
        saved: As from :func:`rates`, of all processes together.
    """
    for path, module in _saved_by_strategy(modules):
        for optimizer in fused_optimizers([module], []):
            entries = [saved[f"{path}/{key}"] for key in optimizer.params if f"{path}/{key}" in saved]
            if not entries:
                continue
            for group in optimizer.param_groups:
                group["lr"] = entries[0]["lr"]
            optimizer.step()
            if "step" in entries[0] and hasattr(optimizer, "set_optimizer_step"):
                optimizer.set_optimizer_step(int(entries[0]["step"]))
        for parameter in module.parameters():
            for handle in getattr(parameter, "_in_backward_optimizers", ()):
                _follow(handle, module)


def _follow(handle: Any, module: FusedOptimizerModule) -> None:  # noqa: ANN401 - an optimizer of one table
    """Bring the rate of a single table's handle in line with that of the kernel it belongs to."""
    kernel = getattr(handle, "_emb_module", None)
    for _, optimizer in getattr(module.fused_optimizer, "optimizers", ()):
        if kernel is not None and getattr(optimizer, "_emb_module", None) is kernel:
            for group in handle.param_groups:
                group["lr"] = next(iter(optimizer.param_groups))["lr"]


def _saved_by_strategy(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, Any]]:
    for path, module in modules.items():
        if isinstance(module, FusedOptimizerModule) and not hasattr(module, "distributed_state"):
            yield path, module

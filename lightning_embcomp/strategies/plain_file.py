"""Load what an unsharded run has saved: a Lightning checkpoint file, or a state dict."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_embcomp.checkpoints.slices import as_slices
from lightning_embcomp.report.checkpoint import CheckpointError
from lightning_embcomp.strategies.errors import ShardingError
from lightning_embcomp.strategies.fused_state import FUSED, fused_state
from lightning_embcomp.strategies.optimizer_state import TablePlace, load_state, plain_parts
from lightning_embcomp.strategies.weights import scatter_whole

_log = logging.getLogger(__name__)

_REFERENCE_MODEL_STATE = "fused_embedding_optimizer"
"""Where the package's own ClickModel keeps the state of its fused optimizer when it is not sharded."""


def open_plain_file(path: str | os.PathLike[str], *, weights_only: bool) -> dict[str, Any]:
    """Open a file without reading its tensors, which stay on the disk until rows of them are copied.

    Args:
        path: A Lightning checkpoint, or a file with a state dict of the module alone.
        weights_only: Refuse objects of unknown classes.

    Returns:
        A checkpoint with the entry ``state_dict``.

    Raises:
        CheckpointError: If it is damaged, holds refused objects, or something else.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=weights_only, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"it holds Python objects that are not read from files for safety ({str(error).splitlines()[0]}). If you"
            " trust where it comes from, use TorchRecStrategy(weights_only=False)",
            path=path,
        ) from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"it cannot be read: {error}", path=path) from error
    if isinstance(found, Mapping) and "state_dict" in found:
        return dict(found)
    if isinstance(found, Mapping) and found and all(isinstance(value, Tensor) for value in found.values()):
        import lightning.pytorch as pl

        return {"state_dict": dict(found), "pytorch-lightning_version": pl.__version__}
    raise CheckpointError("it is neither a Lightning checkpoint nor a state dict of tensors", path=path)


def load_plain_weights(
    root: nn.Module,
    state: Mapping[str, Any],
    self_saving: Mapping[str, nn.Module],
    saved: Mapping[str, Any],
    strict: bool,
) -> None:
    """Copy full tensors into dense parameters and into the shards of this process.

    Args:
        root: The module.
        state: Its state dict with sharded tables.
        self_saving: Modules with a form of their own, by path; they get the entries below their path.
        saved: State dict of the unsharded module.
        strict: Whether missing and unexpected names are errors.

    Raises:
        ShardingError: If names or shapes differ.
    """
    own: dict[str, dict[str, Any]] = {path: {} for path in self_saving}
    tensors: dict[str, Tensor] = {}
    extra: dict[str, Any] = {}
    for key, value in saved.items():
        path = next((path for path in own if key.startswith(f"{path}.")), None)
        if path is not None:
            own[path][key.removeprefix(f"{path}.")] = value
        elif isinstance(value, Tensor):
            tensors[key] = value
        else:
            extra[key] = value
    missing, unexpected = sorted(state.keys() - tensors.keys()), sorted(tensors.keys() - state.keys())
    if strict and (missing or unexpected):
        raise ShardingError(
            f"the checkpoint does not fit the module: it lacks {missing[:5] or 'nothing'} and has"
            f" {unexpected[:5] or 'nothing'} beside. Build the module as it was saved, or set strict_loading = False"
        )
    for key in state.keys() & tensors.keys():
        target = as_slices(state[key])
        if target.shape != tensors[key].shape:
            raise ShardingError(
                f"{key!r} has shape {tuple(tensors[key].shape)} in the checkpoint and {tuple(target.shape)} in the"
                " module: build the module as it was saved"
            )
        scatter_whole(tensors[key], target.pieces)
    for path, entries in own.items():
        self_saving[path].load_state_dict(entries, strict=strict)
    if extra:
        root.load_state_dict(extra, strict=False)


def load_plain_optimizer(
    optimizers: Sequence[torch.optim.Optimizer],
    checkpoint: Mapping[str, Any],
    order: Sequence[Sequence[Sequence[str]]],
    names: Mapping[int, str],
    places: Mapping[str, TablePlace],
    modules: Mapping[str, nn.Module],
) -> None:
    """Put the optimizer state of an unsharded run back, cut to this process's shards.

    Args:
        optimizers: Optimizers of ``configure_optimizers``.
        checkpoint: The unsharded run's.
        order: Names of all parameters in each group of each optimizer, those of fused tables included.
        names: Names of parameters, by ``id``.
        places: Places of sharded tables, by parameter name.
        modules: Sharded collections by path.

    Raises:
        ShardingError: If the optimizers were others.
    """
    saved = checkpoint.get("optimizer_states", [])
    parts = [part for _, part in plain_parts(optimizers)]
    if len(saved) != len(parts) or len(parts) != len(optimizers):
        raise ShardingError(
            f"the checkpoint has {len(saved)} optimizers, configure_optimizers makes {len(parts)}: build them as in"
            " the run that was saved"
        )
    for optimizer, groups, state in zip(parts, order, saved, strict=True):
        numbers = [number for group in state["param_groups"] for number in group["params"]]
        flat = [name for group in groups for name in group]
        if len(numbers) != len(flat):
            raise ShardingError(
                f"the checkpoint's {type(optimizer).__name__} has {len(numbers)} parameters, configure_optimizers gives"
                f" it {len(flat)}: choose them as in the run that was saved"
            )
        local: dict[str, dict[str, Any]] = {}
        for number, name in zip(numbers, flat, strict=True):
            values = state["state"].get(number)
            if values is not None and name:
                local[name] = {key: _local(value, places.get(name), name) for key, value in values.items()}
        load_state(optimizer, names, local, state["param_groups"])
    _load_fused(modules, checkpoint)


def _local(value: Any, place: TablePlace | None, name: str) -> Any:  # noqa: ANN401 - any state
    if place is None or not isinstance(value, Tensor) or not value.dim():
        return value
    local = value.new_empty(place.local_shape(value.shape))
    scatter_whole(value, place.slices(local, name).pieces)
    return local


def _load_fused(modules: Mapping[str, nn.Module], checkpoint: Mapping[str, Any]) -> None:
    """Fill fused state from where the reference model keeps it; others do not save it at all."""
    saved = checkpoint.get(_REFERENCE_MODEL_STATE, {})
    for name, tensor in fused_state(modules).items():
        # `user.weight.momentum_1` there is `user.momentum1` in TorchRec's sharded optimizer.
        table, _, state = name.removeprefix(FUSED).rpartition("/")[2].rpartition(".")
        full = saved.get(f"{table}.weight.{state.replace('momentum', 'momentum_')}")
        target = as_slices(tensor)
        if full is None or full.numel() != target.shape.numel():
            _log.warning("the checkpoint has no state of the fused optimizer of table %r: it starts anew", table)
            continue
        scatter_whole(full.reshape(target.shape), target.pieces)

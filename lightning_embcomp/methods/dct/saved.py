"""State of all processes in one checkpoint, and its way to another number of processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_embcomp.methods.dct.functional import averaged


class SavedStateError(RuntimeError):
    """A checkpoint does not hold the state that a run needs."""


def gather_states(mine: dict[str, Any]) -> dict[str, Any]:
    """Bring the states of all processes to the first one, which writes checkpoints; all processes call it.

    Args:
        mine: State of this process.

    Returns:
        ``world_size`` and ``ranks``: by rank the states of all processes on the first, the own one on others.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = _on_cpu(mine)
    everyone: list[Any] | None = [None] * world if rank == 0 else None
    dist.gather_object(mine, everyone, dst=0)
    return {"world_size": world, "ranks": {rank: mine} if everyone is None else dict(enumerate(everyone))}


def scatter_states(saved: Mapping[str, Any] | None) -> tuple[dict[str, Any] | None, int]:
    """Find this process's part of a saved state; all processes call it.

    With another number of processes, all start from the mean over the saved ones: gradients are averaged over
    processes, so the mean of the residuals is what is still owed to the model.

    Args:
        saved: What :func:`gather_states` returned, as far as this process has it; None for nothing.

    Returns:
        The state, None if no process has any, and how many processes wrote it.

    Raises:
        SavedStateError: If the number of processes has changed and the state of some of them is missing.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    written = 0 if saved is None else int(saved["world_size"])
    whole = saved is not None and len(saved["ranks"]) == written
    own = saved is not None and written == world and rank in saved["ranks"]
    offers: list[Any] = [None] * world
    dist.all_gather_object(offers, (written, whole, own))
    if all(offer[0] == 0 for offer in offers):
        return None, 0
    if all(offer[2] for offer in offers):
        assert saved is not None
        return saved["ranks"][rank], written
    source = next((i for i, offer in enumerate(offers) if offer[1]), None)
    written = max(offer[0] for offer in offers)
    if source is None:
        raise SavedStateError(
            f"the checkpoint was written by {written} processes and the state of some of them is missing: resume with"
            f" {written} processes, or from the complete checkpoint"
        )
    merged = [_averaged(saved["ranks"]) if rank == source and saved is not None else None]
    dist.broadcast_object_list(merged, src=source)
    return merged[0], written


def _averaged(states: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    everyone = [states[rank] for rank in sorted(states)]
    first = everyone[0]
    parameters = {}
    for name, values in first["parameters"].items():
        parameters[name] = {
            key: averaged([state["parameters"][name][key] for state in everyone]) if torch.is_tensor(value) else value
            for key, value in values.items()
        }
        parameters[name]["threshold"] = None  # those of other shards of the data do not fit
    return {**first, "parameters": parameters}


def _on_cpu(state: Any) -> Any:  # noqa: ANN401 - a nested state
    if isinstance(state, Tensor):
        return state.cpu()
    if isinstance(state, dict):
        return {name: _on_cpu(value) for name, value in state.items()}
    return state

"""Keep the state of rounded tables the same on all processes that hold parts of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_embcomp.engine.group import Group
from lightning_embcomp.methods.mpe.state import SEARCH_TENSORS, RoundingState

_BY_TABLE = ("log_steps", "offset", "magnitude")


def share_sums(states: Sequence[RoundingState], group: Group) -> None:
    """Add up what the backward passes of all processes have found since the last optimizer step, in one all-reduce.

    All processes call it together.

    Args:
        states: State of every collection, also of those that this process holds no part of.
        group: The processes.
    """
    pending = [state.pending() for state in states]
    summed = iter(_sum([tensor for found in pending for tensor in found], group))
    for state, found in zip(states, pending, strict=True):
        state.settle([next(summed) for _ in found])


def synchronise(states: Sequence[RoundingState], group: Group) -> list[bool]:
    """Hand the state of tables to processes that hold no part of them, which did not read it from a checkpoint.

    All processes call it together.

    Args:
        states: State of every collection.
        group: The processes.

    Returns:
        Of which collections this process began or stopped to hold what a search needs.
    """
    changed = []
    for state in states:
        leads = torch.zeros(len(state.dims), dtype=torch.bool, device=state.device)
        leads[sorted(state.leads)] = True
        of_group = leads[state.groups.table]
        state.bits.copy_(_sum([_where(of_group, state.bits)], group)[0])
        state.read_bits()
        changed.append(state.holds_search != state.searching)
        if changed[-1]:
            state.hold_search(state.searching)
        tensors = [getattr(state, name) for name in (*_BY_TABLE, *(SEARCH_TENSORS if state.searching else ()))]
        masks = [leads] * len(_BY_TABLE) + [of_group] * (len(tensors) - len(_BY_TABLE))
        summed = _sum([_where(mask, tensor) for mask, tensor in zip(masks, tensors, strict=True)], group)
        for tensor, found in zip(tensors, summed, strict=True):
            tensor.copy_(found)
        state.refresh()
    return changed


def counts_of_all(counts: Tensor, group: Group) -> Tensor:
    """Occurrences over the data of all processes: as they are where all have the same, else their sum.

    Args:
        counts: Occurrences of each row, as the data module of this process knows them.
        group: The processes.
    """
    # Sums of int64 wrap around, so that they do not depend on the order of the addition.
    digest = (counts.double().view(torch.int64) * (2 * torch.arange(counts.numel()) + 1)).sum()
    digests = group.gather(digest.view(1)).flatten()
    return counts if bool((digests == digests[0]).all()) else group.sum(counts.clone())


def _where(mask: Tensor, tensor: Tensor) -> Tensor:
    """The tensor where this process speaks for it, else 0."""
    return torch.where(mask.view(-1, *[1] * (tensor.dim() - 1)), tensor, torch.zeros_like(tensor))


def _sum(tensors: Sequence[Tensor], group: Group) -> list[Tensor]:
    """Sums of tensors over the processes, float64, in one message."""
    packed = group.sum(torch.cat([tensor.double().flatten() for tensor in tensors]))
    sizes = [tensor.numel() for tensor in tensors]
    return [part.view_as(tensor) for part, tensor in zip(packed.split(sizes), tensors, strict=True)]

"""Put first values into the shards of a collection: those of the whole tables, or of their initialisers."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_embcomp.checkpoints.slices import as_slices
from lightning_embcomp.engine.group import device_types

Piece = tuple[tuple[int, ...], Tensor]
"""Offsets of a part in the whole tensor, and the part."""

_CHUNK_BYTES = 32 << 20


def local_pieces(value: Any) -> list[Piece]:  # noqa: ANN401 - a tensor of one of several libraries
    """Parts of a tensor that this process holds; they share its memory.

    Args:
        value: A plain tensor, ``ShardedTensor``, or ``DTensor``.

    Example:
        >>> [offsets for offsets, _ in local_pieces(torch.zeros(2, 3))]
        [(0, 0)]
    """
    return [(tuple(offsets), tensor) for offsets, tensor in as_slices(value).pieces]


@torch.no_grad()
def scatter_rows(full: Tensor, pieces: Sequence[Piece]) -> None:
    """Copy the whole table of process 0 into the parts of all processes, a range of rows at a time.

    Every process built its own table, with other random numbers unless it was seeded: as for dense parameters under
    DDP, those of process 0 count. All processes call this for the same tables in the same order.

    Args:
        full: The whole table, of the same shape on every process; read on process 0 only.
        pieces: This process's parts.
    """
    if dist.get_world_size() == 1:
        _copy_overlap(full, 0, pieces)
        return
    on_host = "cpu" in device_types()
    place = torch.device("cpu") if on_host else torch.device("cuda", torch.cuda.current_device())
    rows = max(1, _CHUNK_BYTES // max(1, full.element_size() * full.shape[1:].numel()))
    for first in range(0, full.shape[0], rows):
        chunk = full[first : first + rows].detach()
        chunk = chunk.to(place, copy=True).contiguous()
        dist.broadcast(chunk, src=0)
        _copy_overlap(chunk, first, pieces)


def _copy_overlap(chunk: Tensor, first: int, pieces: Sequence[Piece]) -> None:
    """Copy rows ``first`` and following into the parts that hold some of them."""
    for (row, *column), part in pieces:
        begin, end = max(first, row), min(first + chunk.shape[0], row + part.shape[0])
        if begin < end:
            source = chunk[begin - first : end - first]
            if column:
                source = source[:, column[0] : column[0] + part.shape[1]]
            part[begin - row : end - row].copy_(source)


@torch.no_grad()
def scatter_whole(full: Tensor, pieces: Sequence[Piece]) -> None:
    """Copy a whole tensor that every process has into the parts of this one.

    Args:
        full: The tensor.
        pieces: This process's parts.

    Example:
        >>> part = torch.zeros(1, 1)
        >>> scatter_whole(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), [((1, 0), part)])
        >>> part
        tensor([[3.]])
    """
    for offsets, part in pieces:
        place = tuple(slice(first, first + size) for first, size in zip(offsets, part.shape, strict=True))
        part.copy_(full[place])


@torch.no_grad()
def initialise_pieces(init: Callable[[Tensor], Any], pieces: Sequence[Piece], name: str, seed: int) -> None:
    """Draw the first values of parts of a table that exists nowhere in full.

    Each part has random numbers of its own, which depend on ``seed`` and its place alone: with the processes' common
    seed, all row shards of a table would be the same. The process's own generator is left as it is.

    Args:
        init: The table's initialiser, ``init_fn`` of its configuration.
        pieces: This process's parts.
        name: Path and name of the table.
        seed: The same on all processes.

    Example:
        >>> a, b = torch.empty(3, 2), torch.empty(3, 2)
        >>> initialise_pieces(nn.init.uniform_, [((0, 0), a), ((3, 0), b)], "t", seed=0)
        >>> bool((a == b).any())
        False
    """
    devices = [part.device for _, part in pieces if part.device.type == "cuda"]
    for offsets, part in pieces:
        place = zlib.crc32(f"{name}{offsets}".encode())
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed((seed * 0x9E3779B1 + place) % (1 << 63))
            init(part)


def table_initialisers(module: nn.Module) -> dict[str, Callable[[Tensor], Any]]:
    """Initialisers of a collection's tables, by name.

    Args:
        module: The collection, before it is sharded.
    """
    configs = getattr(module, "embedding_bag_configs", None) or getattr(module, "embedding_configs", None)
    return {config.name: config.init_fn for config in (configs() if configs else ())}


def shared_seed() -> int:
    """The seed of process 0's random numbers, on every process; no number is drawn."""
    seed: list[Any] = [torch.initial_seed()]
    dist.broadcast_object_list(seed, src=0)
    return int(seed[0])


def free_table(weight: Tensor) -> None:
    """Give back the memory of a whole table that has been copied into its shards.

    Hooks of in-backward optimizers, and TorchRec's own notes about the shards, keep the tensor itself alive. Its shape
    stays; its values are gone.

    Args:
        weight: The table.
    """
    if weight.is_meta:
        return
    weight.data = weight.data.new_zeros(()).expand(weight.shape)
    for optimizer in getattr(weight, "_in_backward_optimizers", ()):
        optimizer.state.clear()


def table_tensors(state: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Tables in the state dict of a collection: key, table name, tensor.

    Args:
        state: State dict with keys such as ``embedding_bags.user.weight``.

    Example:
        >>> [name for _, name, _ in table_tensors({"embedding_bags.user.weight": torch.zeros(1)})]
        ['user']
    """
    for key, tensor in state.items():
        if key.endswith(".weight"):
            yield key, key.split(".")[-2], tensor

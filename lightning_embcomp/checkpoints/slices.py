"""Parts of a tensor that several ranks hold together, and other sharded tensors seen the same way."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


class Slices:
    """The parts of one global tensor that this rank holds: rectangles at offsets.

    Over all ranks the parts must cover the tensor without overlap. A part that several ranks hold at the same offsets
    counts as replicated, and is written once, by the lowest of them. A rank may hold no part at all.

    Implements the protocol by which :mod:`torch.distributed.checkpoint` asks tensors for their chunks.

    Args:
        global_shape: Shape of the whole tensor.
        pieces: Pairs of offsets, one per dimension, and the local tensor there: of any dtype, one for all pieces.
            Parts without elements are allowed.
        dtype: Dtype of the whole tensor; needed only where every rank holds no part, of a tensor without elements.

    Attributes:
        shape: Shape of the whole tensor.
        dtype: Dtype of the whole tensor; None where this rank holds no part and was not told.
        pieces: Offsets and local tensors; those without elements are left out.

    Raises:
        ValueError: If a part does not lie inside the tensor, or the parts have different dtypes.

    Example:
        >>> held = Slices((5, 2), [((3, 0), torch.zeros(2, 2)), ((0, 0), torch.ones(1, 2))])
        >>> held.shape, held.dtype, [offsets for offsets, _ in held.pieces]
        (torch.Size([5, 2]), torch.float32, [(3, 0), (0, 0)])
    """

    def __init__(
        self,
        global_shape: Sequence[int],
        pieces: Iterable[tuple[Sequence[int], Tensor]],
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.shape = torch.Size(global_shape)
        held = [(tuple(int(offset) for offset in offsets), tensor.detach()) for offsets, tensor in pieces]
        for offsets, tensor in held:
            self._check_place(offsets, tensor)
        dtypes = {tensor.dtype for _, tensor in held} | ({dtype} if dtype is not None else set())
        if len(dtypes) > 1:
            raise ValueError(f"the pieces of a tensor have different dtypes: {sorted(map(str, dtypes))}")
        self.dtype = next(iter(dtypes), None)
        self.pieces = [(offsets, tensor) for offsets, tensor in held if tensor.numel()]

    def _check_place(self, offsets: tuple[int, ...], tensor: Tensor) -> None:
        sizes = tuple(tensor.shape)
        inside = len(offsets) == len(sizes) == len(self.shape) and all(
            0 <= first and first + size <= whole for first, size, whole in zip(offsets, sizes, self.shape, strict=True)
        )
        if not inside:
            raise ValueError(
                f"a piece of shape {sizes} at offsets {offsets} does not lie inside a tensor of shape"
                f" {tuple(self.shape)}"
            )

    def split(self, max_bytes: int) -> Slices:
        """Cut large pieces into ranges of rows.

        Args:
            max_bytes: Largest piece that is wanted; a single row may be larger.

        Returns:
            The same parts in smaller pieces, which are views.

        Example:
            >>> halves = Slices((4, 2), [((0, 0), torch.zeros(4, 2))]).split(max_bytes=16)
            >>> [(offsets, tuple(piece.shape)) for offsets, piece in halves.pieces]
            [((0, 0), (2, 2)), ((2, 0), (2, 2))]
        """
        pieces: list[tuple[tuple[int, ...], Tensor]] = []
        for offsets, tensor in self.pieces:
            if tensor.dim() == 0 or tensor.nbytes <= max_bytes:
                pieces.append((offsets, tensor))
                continue
            rows = max(1, max_bytes * tensor.shape[0] // tensor.nbytes)
            for first in range(0, tensor.shape[0], rows):
                pieces.append(((offsets[0] + first, *offsets[1:]), tensor[first : first + rows]))
        return Slices(self.shape, pieces, dtype=self.dtype)

    def size(self) -> torch.Size:
        """Shape of the whole tensor."""
        return self.shape

    def __repr__(self) -> str:
        places = ", ".join(f"{tuple(tensor.shape)} at {offsets}" for offsets, tensor in self.pieces)
        return f"Slices({tuple(self.shape)}, [{places}], dtype={self.dtype})"

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(offsets), tensor.shape) for offsets, tensor in self.pieces]

    def __create_write_items__(self, fqn: str, _object: object) -> list[WriteItem]:
        if self.dtype is None:
            return []
        chunks = self.__create_chunk_list__()
        if not math.prod(self.shape):
            # Nothing to store, but shape and dtype have to be known to readers.
            chunks = [ChunkStorageMetadata(torch.Size([0] * len(self.shape)), self.shape)]
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk, properties=TensorProperties(dtype=self.dtype), size=self.shape
                ),
            )
            for chunk in chunks
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        for offsets, tensor in self.pieces:
            if index.offset is None or torch.Size(offsets) == index.offset:
                return tensor
        if not math.prod(self.shape):
            return torch.empty(self.shape, dtype=self.dtype)
        raise ValueError(f"no piece of {index.fqn!r} at offsets {index.offset}")


class Slice(Slices):
    """One part of a global tensor.

    Args:
        global_shape: Shape of the whole tensor.
        offsets: Where the part begins, one offset per dimension.
        tensor: The part.

    Raises:
        ValueError: If the part does not lie inside the tensor.

    Example:
        >>> Slice((10, 4), (5, 0), torch.zeros(5, 4, dtype=torch.uint8))
        Slices((10, 4), [(5, 4) at (5, 0)], dtype=torch.uint8)
    """

    def __init__(self, global_shape: Sequence[int], offsets: Sequence[int], tensor: Tensor) -> None:
        super().__init__(global_shape, [(offsets, tensor)])


def as_slices(value: Any) -> Slices:  # noqa: ANN401 - of several libraries
    """See any tensor as parts of a global one.

    Args:
        value: A plain tensor, which is one part and the whole; :class:`Slices`; a ``ShardedTensor``; a ``DTensor``,
            also with TorchRec's ``LocalShardsWrapper`` inside.

    Returns:
        The local parts; they share memory with ``value``.

    Raises:
        TypeError: If ``value`` is none of them.

    Example:
        >>> as_slices(torch.zeros(3))
        Slices((3,), [(3,) at (0,)], dtype=torch.float32)
    """
    if isinstance(value, Slices):
        return value
    if isinstance(value, ShardedTensor):
        metadata = value.metadata()
        shards = [(shard.metadata.shard_offsets, shard.tensor) for shard in value.local_shards()]
        return Slices(metadata.size, shards, dtype=_if_empty(metadata.size, metadata.tensor_properties.dtype))
    if hasattr(value, "__create_chunk_list__") and hasattr(value, "__get_tensor_shard__"):
        return _of_protocol(value)
    if isinstance(value, Tensor):
        return Slices(value.shape, [((0,) * value.dim(), value)], dtype=value.dtype)
    raise TypeError(f"{type(value).__name__} is no tensor: checkpoints take other objects in `common` or `per_rank`")


def _of_protocol(value: Any) -> Slices:  # noqa: ANN401
    mesh = getattr(value, "device_mesh", None)
    if mesh is not None and mesh.get_coordinate() is None:
        return Slices(value.size(), [])  # this rank is not part of the mesh
    pieces = []
    for number, chunk in enumerate(value.__create_chunk_list__()):
        # TorchRec's wrapper describes "no shard" by a chunk of shape (0, 0), whatever the tensor's dimensions.
        if math.prod(chunk.sizes):
            tensor = value.__get_tensor_shard__(MetadataIndex("", chunk.offsets, number))
            pieces.append((tuple(chunk.offsets), tensor))
    return Slices(value.size(), pieces, dtype=_if_empty(value.size(), value.dtype))


def _if_empty(shape: Sequence[int], dtype: torch.dtype) -> torch.dtype | None:
    """The dtype that a sharded tensor claims, only where no part can show it: TorchRec's wrapper says float32."""
    return None if math.prod(shape) else dtype

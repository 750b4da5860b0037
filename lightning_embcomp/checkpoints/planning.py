"""What each rank writes and reads, on top of the planners of ``torch.distributed.checkpoint``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, LoadPlan, Metadata, ReadItem, SavePlan
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlanner
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from lightning_embcomp.checkpoints.errors import CheckpointSaveError
from lightning_embcomp.checkpoints.slices import Slices


class SlicesSavePlanner(DefaultSavePlanner):
    """Save a flat dict of :class:`Slices`, and check that the ranks' parts make whole tensors.

    Of a part that several ranks hold the lowest rank's copy is written.
    """

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False, dedup_save_to_lowest_rank=True)

    def create_local_plan(self) -> SavePlan:
        """Plan this rank's parts, and tell the coordinator of tensors of which it holds none."""
        plan = super().create_local_plan()
        shapes = {key: tuple(value.shape) for key, value in self.state_dict.items()}
        return dataclasses.replace(plan, planner_data=shapes)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Check all ranks' plans and merge them."""
        check_plans(all_plans)
        return super().create_global_plan([dataclasses.replace(plan, planner_data=None) for plan in all_plans])

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """Find the part that an item of the plan names."""
        return self.state_dict[index.fqn].__get_tensor_shard__(index)


def check_plans(plans: Iterable[SavePlan]) -> None:
    """Raise if the parts of the ranks do not make whole tensors.

    Args:
        plans: Plan of each rank in order of rank; their ``planner_data`` holds the shapes of all tensors by key.

    Raises:
        CheckpointSaveError: If ranks disagree on a shape or dtype, or nobody holds some of the elements. (Parts that
            overlap are found by the planner of ``torch.distributed.checkpoint``.)
    """
    declared: dict[str, tuple[int, tuple[int, ...]]] = {}
    dtypes: dict[str, tuple[int, torch.dtype]] = {}
    parts: dict[str, dict[tuple[int, ...], tuple[int, tuple[int, ...]]]] = {}
    for rank, plan in enumerate(plans):
        for key, shape in plan.planner_data.items():
            _agree(key, "shape", declared.setdefault(key, (rank, shape)), (rank, shape))
        for item in plan.items:
            key, data = item.index.fqn, item.tensor_data
            assert data is not None
            _agree(key, "dtype", dtypes.setdefault(key, (rank, data.properties.dtype)), (rank, data.properties.dtype))
            place, found = tuple(data.chunk.offsets), (rank, tuple(data.chunk.sizes))
            first = parts.setdefault(key, {}).setdefault(place, found)
            if first[1] != found[1]:
                raise CheckpointSaveError(
                    f"tensor {key!r}: at offsets {place} rank {first[0]} holds a part of shape {first[1]} and rank"
                    f" {rank} one of shape {found[1]}: parts must not overlap"
                )
    for key, (_, shape) in declared.items():
        if key not in parts and not math.prod(shape):
            raise CheckpointSaveError(
                f"tensor {key!r} of shape {shape}: no rank says its dtype; give Slices(..., dtype=...)"
            )
        held = sum(math.prod(sizes) for _, sizes in parts.get(key, {}).values())
        if held < math.prod(shape):
            raise CheckpointSaveError(
                f"tensor {key!r} of shape {shape}: the ranks together hold {held} of its {math.prod(shape)} elements."
                " Every rank has to pass its parts, in the same call"
            )


def _agree(key: str, what: str, first: tuple[int, Any], other: tuple[int, Any]) -> None:
    if first[1] != other[1]:
        raise CheckpointSaveError(
            f"tensor {key!r}: rank {first[0]} says {what} {first[1]}, rank {other[0]} says {other[1]}"
        )


class SlicesLoadPlanner(LoadPlanner):
    """Read into a flat dict of :class:`Slices`, in place.

    Args:
        targets: What to fill, by key.
        metadata: Of the checkpoint; holds all keys of ``targets`` as tensors.
    """

    def __init__(self, targets: Mapping[str, Slices], metadata: Metadata) -> None:
        self.targets = targets
        self.saved = {key: metadata.state_dict_metadata[key] for key in targets}

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Do nothing: the constructor knows everything."""

    def create_local_plan(self) -> LoadPlan:
        """Find the saved parts that overlap with those to fill.

        Raises:
            ValueError: If the checkpoint does not hold all elements of a part; names the key.
        """
        items: list[ReadItem] = []
        for key, target in self.targets.items():
            saved = self.saved[key]
            assert isinstance(saved, TensorStorageMetadata)
            found = create_read_items_for_chunk_list(key, saved, target.__create_chunk_list__())
            wanted = sum(piece.numel() for _, piece in target.pieces)
            # Saved parts do not overlap, so their common elements with a part to fill can be added up.
            if sum(math.prod(item.lengths) for item in found) != wanted:
                raise ValueError(f"it does not hold all elements of {key!r} that are asked for: {target!r}")
            items += found
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Every rank reads alone."""
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """Every rank reads alone."""
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:  # noqa: ANN401 - a stream
        """Refuse: only tensors are asked for.

        Raises:
            TypeError: Always.
        """
        raise TypeError(f"{read_item.dest_index.fqn!r} is no tensor")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Find where to put what is read."""
        number = read_item.dest_index.index
        assert number is not None  # offsets would not tell apart parts of this rank that overlap
        _, piece = self.targets[read_item.dest_index.fqn].pieces[number]
        for dim, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            piece = piece.narrow(dim, offset, length)
        return piece

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Do nothing: what :meth:`resolve_tensor` gives is a view of the destination."""

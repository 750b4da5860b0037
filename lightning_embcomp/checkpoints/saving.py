"""Write a checkpoint with all ranks."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from lightning_embcomp.checkpoints.directory import METADATA, begin, discard, finish
from lightning_embcomp.checkpoints.errors import CheckpointSaveError
from lightning_embcomp.checkpoints.manifest import COMMON, FileRecord, rank_file, record_of, write_manifest
from lightning_embcomp.checkpoints.objects import save_object
from lightning_embcomp.checkpoints.planning import SlicesSavePlanner
from lightning_embcomp.checkpoints.ranks import Ranks, describe
from lightning_embcomp.checkpoints.slices import as_slices

CHUNK_BYTES = 64 << 20
"""Larger parts are stored as several: a rank copies, and a reader loads, one such chunk at a time."""


def save_checkpoint(
    path: str | os.PathLike[str],
    *,
    tensors: Mapping[str, Any],
    common: Mapping[str, Any],
    per_rank: Mapping[str, Any],
) -> None:
    """Write a checkpoint that any number of ranks can read; all ranks call it together.

    It appears under ``path`` when it is complete and has reached the disk, and takes the place of an earlier one at
    that moment. The directory has to be on a file system that all ranks see. Without a process group the only process
    writes it. See :func:`~lightning_embcomp.checkpoints.ranks.saving_group` for how long ranks wait for each other.

    Args:
        path: Directory to create or replace.
        tensors: What the ranks hold of each tensor, by the tensor's name: plain tensors, which are replicated,
            ``ShardedTensor``, ``DTensor`` or :class:`~lightning_embcomp.checkpoints.slices.Slices`. The ranks may name
            different tensors.
        common: Picklable values that are the same for all ranks; those of rank 0 are written.
        per_rank: Picklable values of this rank.

    Raises:
        CheckpointSaveError: On every rank, if one fails or dies, if the parts of a tensor do not fit together, or if
            there is something else than a checkpoint at ``path``. An earlier checkpoint is then as it was.

    Example:
        >>> import tempfile, torch
        >>> folder = tempfile.mkdtemp() + "/last.ckpt"
        >>> save_checkpoint(folder, tensors={"table": torch.ones(3, 2)}, common={"epoch": 1}, per_rank={})
        >>> from lightning_embcomp.checkpoints import read_common
        >>> read_common(folder)
        {'epoch': 1}
    """
    ranks = Ranks(os.fspath(path))
    partial = ranks.first(lambda: begin(path))
    try:
        ranks.all(lambda: _check_visible(partial, ranks.rank))
        _write_tensors(ranks, partial, tensors)
        found = ranks.all(lambda: _write_objects(partial, ranks.rank, common, per_rank))
        files = {name: record for records in found for name, record in records.items()}
        ranks.first(lambda: _complete(partial, path, ranks.size, files))
    except BaseException:
        if ranks.rank == 0:
            discard(partial)
        raise


def _check_visible(partial: Path, rank: int) -> None:
    if not partial.is_dir():
        raise CheckpointSaveError(
            f"rank {rank} does not see {partial}, which rank 0 created: choose a directory on a file system that all"
            " hosts share"
        )


def _write_tensors(ranks: Ranks, partial: Path, tensors: Mapping[str, Any]) -> None:
    state: dict[str, Any] = {}
    ranks.all(lambda: state.update(_chunked(tensors)))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
            dcp.save(
                state,
                storage_writer=_Writer(partial),
                planner=SlicesSavePlanner(),
                process_group=ranks.group,
                no_dist=ranks.group is None,
            )
    except dcp.CheckpointException as error:
        ranks.fail([_said(cause, rank) for rank, (cause, _) in error.failures.items()], error)
    except RuntimeError as error:  # errors of a rank's own work come as CheckpointException
        ranks.lost(error)


class _Writer(dcp.FileSystemWriter):
    """Describes errors where they happen: the causes of an exception do not travel to other ranks."""

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            raise CheckpointSaveError(describe(error, self.rank or 0)) from error


def _said(error: BaseException, rank: int) -> str:
    return str(error) if isinstance(error, CheckpointSaveError) else f"rank {rank}: {type(error).__name__}: {error}"


def _chunked(tensors: Mapping[str, Any]) -> dict[str, Any]:
    chunked = {}
    for key, value in tensors.items():
        try:
            chunked[key] = as_slices(value).split(CHUNK_BYTES)
        except (TypeError, ValueError) as error:
            raise type(error)(f"tensor {key!r}: {error}") from error
    return chunked


def _write_objects(
    partial: Path, rank: int, common: Mapping[str, Any], per_rank: Mapping[str, Any]
) -> dict[str, FileRecord]:
    records = {rank_file(rank): save_object(per_rank, partial / rank_file(rank))}
    if rank == 0:
        records[COMMON] = save_object(common, partial / COMMON)
    return records


def _complete(partial: Path, path: str | os.PathLike[str], world_size: int, files: Mapping[str, FileRecord]) -> None:
    tensor_files = {found.name: record_of(found, checksum=False) for found in sorted(partial.glob("*.distcp"))}
    metadata = {METADATA: record_of(partial / METADATA)}
    write_manifest(partial, world_size, {**metadata, **files, **tensor_files})
    finish(partial, path)

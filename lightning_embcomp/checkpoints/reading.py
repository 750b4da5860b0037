"""Read a checkpoint: every rank for itself, whatever it needs, in as many calls as it likes."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, LoadPlan, ReadItem

from lightning_embcomp.checkpoints.directory import METADATA, locate
from lightning_embcomp.checkpoints.manifest import COMMON, Manifest, check_content, rank_file, read_manifest
from lightning_embcomp.checkpoints.metadata import read_metadata, tensors_of
from lightning_embcomp.checkpoints.objects import load_object
from lightning_embcomp.checkpoints.planning import SlicesLoadPlanner
from lightning_embcomp.checkpoints.slices import Slices, as_slices
from lightning_embcomp.report.checkpoint import CheckpointError


def read_common(path: str | os.PathLike[str], *, weights_only: bool = True) -> dict[str, Any]:
    """Read the values that are the same for all ranks.

    Args:
        path: The checkpoint.
        weights_only: Refuse what would run code when it is read. Tensors, plain Python, NumPy arrays and paths pass;
            objects of other classes, which a callback may have put there, need False, for files that you trust.

    Returns:
        The values; tensors on the CPU.

    Raises:
        CheckpointError: If the checkpoint is missing, damaged or newer, or holds refused objects.
    """
    folder, manifest = _open(path)
    return load_object(folder / COMMON, manifest.files[COMMON], weights_only=weights_only)


def read_rank(path: str | os.PathLike[str], rank: int, *, weights_only: bool = True) -> dict[str, Any] | None:
    """Read the values of one rank of the run that wrote the checkpoint.

    Args:
        path: The checkpoint.
        rank: The rank.
        weights_only: As in :func:`read_common`.

    Returns:
        The values, tensors on the CPU; None if the run had fewer ranks.

    Raises:
        CheckpointError: If the checkpoint is missing, damaged or newer, or holds refused objects.
    """
    folder, manifest = _open(path)
    name = rank_file(rank)
    if not 0 <= rank < manifest.world_size:
        return None
    return load_object(folder / name, manifest.files[name], weights_only=weights_only)


def world_size_of(path: str | os.PathLike[str]) -> int:
    """How many ranks wrote a checkpoint.

    Args:
        path: The checkpoint.

    Raises:
        CheckpointError: If the checkpoint is missing, damaged or newer.
    """
    return _open(path)[1].world_size


class CheckpointReader:
    """The tensors of a checkpoint.

    Nothing here waits for other ranks: each may ask for other tensors, other parts and at other times.

    Args:
        path: The checkpoint.

    Attributes:
        path: Its directory.

    Raises:
        CheckpointError: If the checkpoint is missing, damaged or newer.

    Example:
        >>> import tempfile, torch
        >>> from lightning_embcomp.checkpoints import Slice, save_checkpoint
        >>> folder = tempfile.mkdtemp() + "/last.ckpt"
        >>> save_checkpoint(folder, tensors={"table": torch.arange(6).view(3, 2)}, common={}, per_rank={})
        >>> reader, last_row = CheckpointReader(folder), torch.empty(1, 2, dtype=torch.int64)
        >>> reader.read_into({"table": Slice((3, 2), (2, 0), last_row)})
        >>> reader.shape("table"), last_row
        (torch.Size([3, 2]), tensor([[4, 5]]))
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path, manifest = _open(path)
        check_content(self.path / METADATA, manifest.files[METADATA])
        self._metadata = read_metadata(self.path / METADATA)
        self._tensors = tensors_of(self._metadata)
        stored = {info.relative_path for info in self._metadata.storage_data.values()}
        if missing := sorted(stored - set(manifest.files)):
            raise CheckpointError(f"the manifest does not list {missing[0]}; copy the directory again", path=self.path)

    def keys(self) -> set[str]:
        """Names of the tensors."""
        return set(self._tensors)

    def shape(self, name: str) -> torch.Size:
        """Shape of a whole tensor.

        Args:
            name: Its name.

        Raises:
            CheckpointError: If there is no such tensor.
        """
        self._check_name(name)
        return self._tensors[name].size

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor.

        Args:
            name: Its name.

        Raises:
            CheckpointError: If there is no such tensor.
        """
        self._check_name(name)
        return self._tensors[name].properties.dtype

    def read_into(self, targets: Mapping[str, Any]) -> None:
        """Fill tensors, or the parts of them that this rank holds, in place.

        Args:
            targets: Tensors by name, each of the saved tensor's whole shape: plain tensors on any device,
                ``ShardedTensor``, ``DTensor`` or :class:`~lightning_embcomp.checkpoints.slices.Slices`. Floating-point
                tensors may have another floating-point dtype.

        Raises:
            CheckpointError: If there is no such tensor, it has another shape or kind of dtype, or a file is damaged.
                Tensors are checked before anything is read.
        """
        wanted = {name: self._target(name, value) for name, value in targets.items()}
        planner = SlicesLoadPlanner(wanted, self._metadata)
        try:
            plan = planner.create_local_plan()
        except ValueError as error:
            raise CheckpointError(str(error), path=self.path) from error
        per_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            per_file.setdefault(self._metadata.storage_data[item.storage_index].relative_path, []).append(item)
        reader = FileSystemReader(self.path)
        reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        for name, items in per_file.items():
            items.sort(key=lambda item: self._metadata.storage_data[item.storage_index].offset)
            try:
                reader.read_data(LoadPlan(items), planner).wait()
            except Exception as error:  # damaged content can raise anything
                raise CheckpointError(
                    f"reading {items[0].dest_index.fqn!r} failed ({type(error).__name__}: {error}): the file may be"
                    " damaged, or the checkpoint was replaced meanwhile; open it again, or use another one",
                    path=self.path / name,
                ) from error

    def _target(self, name: str, value: Any) -> Slices:  # noqa: ANN401
        self._check_name(name)
        saved = self._tensors[name]
        target = as_slices(value)
        if target.shape != saved.size:
            raise CheckpointError(
                f"tensor {name!r} has shape {tuple(saved.size)}, but the model asks for {tuple(target.shape)}: build"
                " the model as it was saved",
                path=self.path,
            )
        dtype = saved.properties.dtype
        if target.dtype not in (None, dtype) and not (_is_float(target.dtype) and _is_float(dtype)):
            raise CheckpointError(
                f"tensor {name!r} is {dtype}, but the model asks for {target.dtype}: build the model as it was saved",
                path=self.path,
            )
        return target

    def _check_name(self, name: str) -> None:
        if name not in self._tensors:
            close = difflib.get_close_matches(name, self._tensors, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {len(self._tensors)} others"
            raise CheckpointError(f"there is no tensor {name!r} in it; {hint}", path=self.path)


def _is_float(dtype: torch.dtype | None) -> bool:
    return dtype is not None and dtype.is_floating_point


def _open(path: str | os.PathLike[str]) -> tuple[Path, Manifest]:
    folder = locate(path)
    return folder, read_manifest(folder)

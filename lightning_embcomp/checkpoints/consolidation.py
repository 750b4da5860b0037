"""From a checkpoint directory to one ordinary checkpoint file, with one process."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lightning_embcomp.checkpoints.directory import sync
from lightning_embcomp.checkpoints.names import COMPRESSED, RESUME_ONLY, STATE_DICT
from lightning_embcomp.checkpoints.reading import CheckpointReader, read_common
from lightning_embcomp.report.checkpoint import CheckpointError

_IN_MEMORY_BYTES = 1 << 20


def consolidate(
    path: str | os.PathLike[str],
    out_file: str | os.PathLike[str],
    *,
    convert: Callable[[CheckpointReader], dict[str, Tensor]] | None = None,
    weights_only: bool = True,
    overwrite: bool = False,
) -> Path:
    """Write the weights of a checkpoint directory as a Lightning checkpoint file with full tensors.

    A plain module loads it by ``load_from_checkpoint``, or by ``trainer.test(ckpt_path=...)``; it holds no optimizer
    state to resume from. Large tensors pass through files that have no name, beside ``out_file``: for a moment the
    disk holds the weights twice, and memory one part of one of them at a time.

    Args:
        path: The checkpoint, of any number of ranks.
        out_file: File to write; it appears when it is complete.
        convert: Makes entries of the state dict from the tables that compressed modules stored in a form of their own
            under names that begin with :data:`~lightning_embcomp.checkpoints.names.COMPRESSED`.
        weights_only: As in :func:`~lightning_embcomp.checkpoints.reading.read_common`.
        overwrite: Replace an earlier file.

    Returns:
        The file.

    Raises:
        CheckpointError: If the checkpoint cannot be read, holds no weights, or compressed tables that need
            ``convert``; or if the file is there already.

    Example:
        >>> import tempfile
        >>> from lightning_embcomp.checkpoints import save_checkpoint
        >>> folder = tempfile.mkdtemp()
        >>> weights = {"state_dict/linear.weight": torch.ones(1, 2)}
        >>> save_checkpoint(folder + "/a.ckpt", tensors=weights, common={"epoch": 1}, per_rank={})
        >>> torch.load(consolidate(folder + "/a.ckpt", folder + "/b.ckpt"))
        {'epoch': 1, 'state_dict': {'linear.weight': tensor([[1., 1.]])}}
    """
    out = Path(out_file)
    if out.is_dir():
        raise CheckpointError("there is a directory of that name; choose a file", path=out)
    if out.exists() and not overwrite:
        raise CheckpointError("the file exists already; choose another, or overwrite it (--overwrite)", path=out)
    reader = CheckpointReader(path)
    names = sorted(name for name in reader.keys() if name.startswith(STATE_DICT))
    if convert is None and any(name.startswith(COMPRESSED) for name in reader.keys()):
        raise CheckpointError("it holds compressed tables, which have to be converted: pass `convert`", path=path)
    if not names and convert is None:
        raise CheckpointError("it holds no weights of a module: no Lightning run wrote it", path=path)
    payload = read_common(path, weights_only=weights_only)
    for key in RESUME_ONLY:
        payload.pop(key, None)
    out.parent.mkdir(parents=True, exist_ok=True)
    # What is in `common` already are entries that are no tensors, such as extra state.
    state = dict(payload.get("state_dict", {}))
    for name in names:
        state[name.removeprefix(STATE_DICT)] = _full_tensor(reader, name, out.parent)
    if convert is not None:
        state |= convert(reader)
    payload["state_dict"] = state
    _write(payload, out)
    return out


def _full_tensor(reader: CheckpointReader, name: str, folder: Path) -> Tensor:
    shape, dtype = reader.shape(name), reader.dtype(name)
    count = math.prod(shape)
    if count * dtype.itemsize < _IN_MEMORY_BYTES:
        tensor = torch.empty(shape, dtype=dtype)
    else:
        tensor = _on_disk(folder, count, dtype).view(shape)
    reader.read_into({name: tensor})
    return tensor


def _on_disk(folder: Path, count: int, dtype: torch.dtype) -> Tensor:
    """Memory that is mapped from a file, which goes away with the tensor."""
    handle, place = tempfile.mkstemp(prefix=".consolidate-", dir=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            if hasattr(os, "posix_fallocate"):
                # Reserved now: writing to mapped memory on a full disk kills the process.
                os.posix_fallocate(file.fileno(), 0, count * dtype.itemsize)
            else:
                file.truncate(count * dtype.itemsize)
        return torch.from_file(place, shared=True, size=count, dtype=dtype)
    finally:
        os.unlink(place)


def _write(payload: dict[str, object], out: Path) -> None:
    handle, name = tempfile.mkstemp(prefix=f".{out.name}.partial-", dir=out.parent)
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(payload, file)
        partial.chmod(0o666 & ~_umask())  # mkstemp makes files that only their owner can read
        sync(partial)
        os.replace(partial, out)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(out.parent)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

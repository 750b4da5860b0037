"""Names and life of a checkpoint directory: it appears whole, is replaced whole, and is never lost in between.

A save writes into ``.NAME.partial-OWNER`` beside the target. To replace a checkpoint, the old one is renamed to
``.NAME.previous``, the new one to ``NAME``, and the old one is deleted. After a crash between the renames there is no
``NAME``: readers then take ``.NAME.previous``, and the next save renames it back.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import socket
import time
from pathlib import Path

from lightning_embcomp.checkpoints.errors import CheckpointSaveError
from lightning_embcomp.report.checkpoint import CheckpointError

MANIFEST, METADATA = "manifest.json", ".metadata"

_LEFTOVER = re.compile(r"^\..+\.(partial|removed)-(?P<host>[0-9a-f]{8})-(?P<pid>[0-9]+)$")
_ABANDONED_SECONDS = 24 * 3600
"""Leftovers whose owner cannot be asked, on another host, count as dead when nothing was added for so long."""

_log = logging.getLogger(__name__)


def locate(path: str | os.PathLike[str]) -> Path:
    """Find the checkpoint to read.

    Args:
        path: Where it was saved, or a symbolic link to it.

    Returns:
        Its directory; the one under the recovery name if a save was interrupted while it replaced the checkpoint.

    Raises:
        CheckpointError: If there is none.
    """
    target = Path(os.path.realpath(path))
    if target.exists():
        return target
    previous = _previous(target)
    if previous.exists():
        _log.warning("%s: a save was interrupted while it replaced this checkpoint; reading %s", path, previous)
        return previous
    hint = "check the path"
    if any(target.parent.glob(f".{target.name}.partial-*")):
        hint = "the first save under this name was interrupted, so resume from another one"
    raise CheckpointError(f"there is no such checkpoint: {hint}", path=path)


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether a distributed checkpoint lies at a path; a single checkpoint file is none.

    Args:
        path: The path.

    Example:
        >>> is_checkpoint("no/such/place")
        False
    """
    target = Path(os.path.realpath(path))
    return _is_ours(target if target.exists() else _previous(target))


def remove_checkpoint(path: str | os.PathLike[str]) -> None:
    """Delete a checkpoint, directory or file, and what it could be recovered from. One process calls it.

    Args:
        path: The checkpoint; nothing happens if there is none.
    """
    target = _absolute(path)
    for place in (_previous(target), target):
        _remove(place)


def begin(path: str | os.PathLike[str]) -> Path:
    """Prepare to write a checkpoint: finish what an interrupted save left, and create a directory to write into.

    Args:
        path: Where the checkpoint shall be.

    Returns:
        The directory to write into, beside ``path``.

    Raises:
        CheckpointSaveError: If there is something else at ``path``.
    """
    target = _absolute(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    previous = _previous(target)
    if os.path.lexists(previous):
        if os.path.lexists(target):
            _remove(previous)
        else:
            os.rename(previous, target)
    if target.is_dir() and not target.is_symlink() and any(target.iterdir()) and not _is_ours(target):
        raise CheckpointSaveError(f"{target}: the directory holds other things than a checkpoint; choose another path")
    _clear_leftovers(target.parent)
    partial = target.with_name(f".{target.name}.partial-{_owner()}")
    partial.mkdir()
    return partial


def finish(partial: Path, path: str | os.PathLike[str]) -> None:
    """Give a complete checkpoint its name, in the place of an earlier one.

    Args:
        partial: From :func:`begin`; every file in it has reached the disk.
        path: Where the checkpoint shall be.
    """
    target = _absolute(path)
    sync(partial)
    if not os.path.lexists(target):
        os.rename(partial, target)
        sync(target.parent)
        return
    previous = _previous(target)
    os.rename(target, previous)
    try:
        os.rename(partial, target)
    except OSError:
        os.rename(previous, target)
        raise
    sync(target.parent)
    try:
        _remove(previous)
    except OSError as error:
        # The new checkpoint is complete; the next save tries again.
        _log.warning("%s: the earlier checkpoint could not be deleted (%s)", previous, error)


def discard(partial: Path) -> None:
    """Delete what a failed save wrote.

    Args:
        partial: From :func:`begin`. What cannot be deleted, because another rank still writes into it, is left for the
            next save.
    """
    shutil.rmtree(partial, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, have reached the disk.

    Args:
        path: The file or directory.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _absolute(path: str | os.PathLike[str]) -> Path:
    if "://" in os.fspath(path):
        raise CheckpointSaveError(
            f"{os.fspath(path)}: checkpoints are renamed into place, which needs a file system; choose a path on one"
        )
    return Path(os.path.abspath(path))


def _previous(target: Path) -> Path:
    return target.with_name(f".{target.name}.previous")


def _is_ours(place: Path) -> bool:
    return (place / MANIFEST).is_file() and (place / METADATA).is_file()


def _remove(place: Path) -> None:
    if not os.path.lexists(place):
        return
    if place.is_symlink() or not place.is_dir():
        place.unlink()
        return
    # Renamed first: what is half deleted must not be found under a name that readers know.
    doomed = place.with_name(f".{place.name.lstrip('.')}.removed-{_owner()}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(place, doomed)
    shutil.rmtree(doomed)


def _clear_leftovers(folder: Path) -> None:
    host, pid = _owner().split("-")
    for place in folder.iterdir():
        found = _LEFTOVER.match(place.name)
        if found is None:
            continue
        if found["host"] == host:
            # One process writes one checkpoint at a time, so its own are leftovers too.
            dead = found["pid"] == pid or not _alive(int(found["pid"]))
        else:
            dead = time.time() - place.stat().st_mtime > _ABANDONED_SECONDS
        if dead:
            _log.info("removing %s, which an interrupted run left", place)
            shutil.rmtree(place, ignore_errors=True)


def _owner() -> str:
    """This process on this host; containers may share a host's name, but not its process numbers."""
    host = socket.gethostname()
    try:
        host += os.readlink("/proc/self/ns/pid")
    except OSError:
        host += "-"  # not Linux: no such containers
    return f"{hashlib.sha256(host.encode()).hexdigest()[:8]}-{os.getpid()}"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

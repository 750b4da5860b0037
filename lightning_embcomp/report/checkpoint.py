"""Open checkpoint files, and say in one line what is wrong with those that cannot be read."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


class CheckpointError(ValueError):
    """A file is not a checkpoint that can be read.

    Args:
        message: What is wrong and what to do, in one line.
        path: The file.

    Example:
        >>> str(CheckpointError("the file is empty", path="last.ckpt"))
        'last.ckpt: the file is empty'
    """

    def __init__(self, message: str, *, path: str | os.PathLike[str]) -> None:
        """Compose the message."""
        super().__init__(f"{os.fspath(path)}: {' '.join(message.split())}")


def open_checkpoint(path: str | os.PathLike[str], *, weights_only: bool = True) -> Mapping[str, Any]:
    """Open a Lightning checkpoint without reading its tensors: they stay in the file until they are used.

    Args:
        path: A file that ``Trainer.save_checkpoint`` or ``ModelCheckpoint`` wrote.
        weights_only: Refuse files that would run code when they are read.

    Returns:
        The checkpoint; its tensors are mapped from the file.

    Raises:
        CheckpointError: If the file is missing, truncated, damaged, or not such a checkpoint.
    """
    _check_file(Path(path))
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=weights_only, mmap=True)
    except pickle.UnpicklingError as error:
        refused = str(error).partition("WeightsUnpickler error: ")[2].splitlines()
        reason = refused[0] if refused else _first_line(error)
        raise CheckpointError(
            f"it is damaged, or holds Python objects that are not read from files for safety ({reason})", path=path
        ) from error
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(
            f"the file is damaged ({type(error).__name__}: {_first_line(error)}); use another checkpoint", path=path
        ) from error
    state = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise CheckpointError(
            "this is no Lightning checkpoint: it has no state_dict. Write one with trainer.save_checkpoint(path)",
            path=path,
        )
    return checkpoint


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise CheckpointError(
            "this is a folder, and one file is needed: bring the checkpoint of a sharded run into one with 'embcomp"
            " consolidate'",
            path=path,
        )
    if not path.exists():
        raise CheckpointError("there is no such file", path=path)
    try:
        with open(path, "rb") as file:
            head = file.read(4)
    except OSError as error:
        raise CheckpointError(f"it cannot be read ({error.strerror})", path=path) from error
    if not head:
        raise CheckpointError("the file is empty", path=path)
    if not head.startswith(b"PK"):
        raise CheckpointError("this is no checkpoint: PyTorch writes zip archives, and this is none", path=path)
    try:
        whole = zipfile.is_zipfile(path)
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"the file is damaged ({error}); use another checkpoint", path=path) from error
    if not whole:
        raise CheckpointError(
            "the file is truncated: the end of the archive is missing. Copy it again, or use an earlier checkpoint",
            path=path,
        )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]

"""The small files of a checkpoint: Python objects by ``torch.save``, read without running code unless asked to."""

from __future__ import annotations

import os
import pathlib
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_embcomp.checkpoints.directory import sync
from lightning_embcomp.checkpoints.errors import CheckpointSaveError
from lightning_embcomp.checkpoints.manifest import FileRecord, check_content, record_of
from lightning_embcomp.report.checkpoint import CheckpointError

_NUMPY_DTYPES = {type(np.dtype(code)) for code in np.typecodes["All"] if code != "O"}
_REBUILD_ARRAY, _REBUILD_SCALAR = np.zeros(0).__reduce__()[0], np.float64(0).__reduce__()[0]
SAFE_GLOBALS: list[Any] = [
    # Random generator states of NumPy, and metrics that a callback keeps as NumPy scalars. Numpy 2 has moved the
    # functions that rebuild them, and reads files of numpy 1.
    *((_REBUILD_ARRAY, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    *((_REBUILD_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *(np.ndarray, np.dtype),
    *sorted(_NUMPY_DTYPES, key=lambda kind: kind.__name__),
    # Directories in hyperparameters.
    *(pathlib.PosixPath, pathlib.PurePosixPath),
]
"""What may be rebuilt besides what ``torch.load(weights_only=True)`` allows; no object arrays among it."""


def save_object(value: Mapping[str, Any], path: Path) -> FileRecord:
    """Write a dict of picklable values.

    Args:
        value: The dict.
        path: The file, which reaches the disk before this returns.

    Returns:
        Its record for the manifest.

    Raises:
        CheckpointSaveError: If a value cannot be pickled; names its key.
    """
    try:
        with open(path, "wb") as file:
            torch.save(dict(value), file)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise CheckpointSaveError(f"{path.name}: {_culprit(value)} cannot be pickled: {error}") from error
    sync(path)
    return record_of(path)


def load_object(path: Path, record: FileRecord, *, weights_only: bool = True) -> dict[str, Any]:
    """Read what :func:`save_object` wrote; tensors on the CPU.

    Args:
        path: The file.
        record: Its record in the manifest.
        weights_only: Refuse what would run code when it is read.

    Returns:
        The dict.

    Raises:
        CheckpointError: If the file is damaged, or holds objects that are refused; names their class.
    """
    check_content(path, record)
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            return torch.load(path, map_location="cpu", weights_only=weights_only)
    except pickle.UnpicklingError as error:
        lines = str(error).partition("WeightsUnpickler error: ")[2].splitlines() or str(error).splitlines() or [""]
        raise CheckpointError(
            f"it holds Python objects that are not read from files for safety ({lines[0]}). If you trust where it"
            " comes from, pass weights_only=False",
            path=path,
        ) from error
    except (ImportError, AttributeError) as error:
        raise CheckpointError(
            f"it holds an object of a class that is not here ({error}): install or import what the run used", path=path
        ) from error


def _culprit(value: Mapping[str, Any]) -> str:
    """The keys down to what cannot be pickled."""
    place, found = "", value
    while isinstance(found, Mapping):
        bad = [key for key, item in found.items() if not _picklable(item)]
        if not bad:
            break
        place, found = f"{place}[{bad[0]!r}]", found[bad[0]]
    return f"the entry {place}" if place else "an entry"


def _picklable(value: Any) -> bool:  # noqa: ANN401
    try:
        with open(os.devnull, "wb") as nowhere:
            torch.save(value, nowhere)
    except (pickle.PicklingError, TypeError, AttributeError):
        return False
    return True

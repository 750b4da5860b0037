"""Known frequencies: from the data module, or from a file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor


class FrequencyError(ValueError):
    """Frequencies are missing, or do not fit a table."""


@runtime_checkable
class CountsIds(Protocol):
    """A data module that knows how often each id occurs in an epoch."""

    def id_counts(self, feature_name: str) -> Tensor:
        """Occurrences per id, ``(R,)``."""


def counts_from_datamodule(datamodule: object, features: Sequence[str], table: str, rows: int) -> Tensor:
    """Occurrences of each row of a table in an epoch.

    Args:
        datamodule: The trainer's data module.
        features: Features that look the table up; their counts add.
        table: Name of the table, for messages.
        rows: Its rows.

    Returns:
        float64 tensor of shape ``(rows,)``.

    Raises:
        FrequencyError: If the data module does not say, or says something that does not fit.
    """
    mend = "give frequencies='FILE.npz', or use form='running', which needs none"
    if not isinstance(datamodule, CountsIds):
        raise FrequencyError(
            f"frequencies of table {table!r}: the trainer's data module"
            f" ({type(datamodule).__name__ if datamodule is not None else 'there is none'}) has no id_counts(feature):"
            f" {mend}"
        )
    if not features:
        raise FrequencyError(
            f"frequencies of table {table!r}: a stand-alone embedding does not say which feature it is for: {mend}"
        )
    total = torch.zeros(rows, dtype=torch.float64)
    for feature in features:
        total += _checked(datamodule.id_counts(feature).double(), rows, f"id_counts({feature!r})", table)
    return total


def counts_from_file(path: str | os.PathLike[str], tables: Mapping[str, Sequence[str]]) -> Mapping[str, Any]:
    """Open a NumPy ``.npz`` file with one array of occurrences per epoch for each table.

    Args:
        path: The file; an array is named like its table, by full path or by the table's own name.
        tables: Names by which each table may be found, by unique name.

    Returns:
        The array of each table, by unique name.

    Raises:
        FrequencyError: If the file cannot be read, or lacks a table.
    """
    if not Path(path).exists():
        raise FrequencyError(f"frequencies: there is no file {str(path)!r}")
    try:
        with np.load(path, allow_pickle=False) as opened:
            arrays = {name: opened[name] for name in opened.files}
    except (ValueError, OSError, EOFError) as error:
        raise FrequencyError(
            f"frequencies: {str(path)!r} is not an .npz file: write one with numpy.savez(path, table=counts)"
        ) from error
    found = {}
    for table, names in tables.items():
        name = next((name for name in names if name in arrays), None)
        if name is None:
            raise FrequencyError(
                f"frequencies: {str(path)!r} has no array for table {table!r}; it has {', '.join(sorted(arrays))}"
            )
        found[table] = arrays[name]
    return found


def checked_counts(values: np.ndarray, rows: int, path: str, table: str) -> Tensor:
    """Bring an array of a file to float64 ``(rows,)``.

    Raises:
        FrequencyError: If it does not fit the table.
    """
    if not np.issubdtype(values.dtype, np.number):
        raise FrequencyError(f"frequencies: the array of table {table!r} in {path!r} holds {values.dtype}, not numbers")
    return _checked(torch.from_numpy(values.astype(np.float64)), rows, repr(path), table)


def _checked(counts: Tensor, rows: int, source: str, table: str) -> Tensor:
    if tuple(counts.shape) != (rows,):
        raise FrequencyError(
            f"frequencies of table {table!r}: {source} has shape {tuple(counts.shape)}, but the table has {rows} rows"
        )
    bad = ~(counts.isfinite() & (counts >= 0))
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise FrequencyError(
            f"frequencies of table {table!r}: {source} holds {float(counts[row])} for row {row}; counts must be finite"
            " and not negative"
        )
    return counts

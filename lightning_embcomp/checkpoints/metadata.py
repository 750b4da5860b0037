"""Read the metadata of ``torch.distributed.checkpoint``, which is a pickle, without running code from the file."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import Metadata, TensorStorageMetadata

from lightning_embcomp.report.checkpoint import CheckpointError

_DCP = "torch.distributed.checkpoint."
_ALLOWED = {
    *(
        (_DCP + "metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    (_DCP + "filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
}


def read_metadata(path: Path) -> Metadata:
    """Read which tensors a checkpoint has, and where their parts lie.

    Args:
        path: The metadata file.

    Returns:
        The metadata.

    Raises:
        CheckpointError: If it is damaged, or names what does not belong there.
    """
    try:
        with open(path, "rb") as file:
            found = _Unpickler(file).load()
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(
            f"the file is damaged ({type(error).__name__}: {error}); copy the whole directory again", path=path
        ) from error
    if not isinstance(found, Metadata) or not isinstance(found.storage_data, dict):
        raise CheckpointError("this is not the metadata of a checkpoint; copy the whole directory again", path=path)
    return found


def tensors_of(found: Metadata) -> dict[str, TensorStorageMetadata]:
    """The tensors of a checkpoint, by name.

    Args:
        found: From :func:`read_metadata`.
    """
    entries = found.state_dict_metadata.items()
    return {key: entry for key, entry in entries if isinstance(entry, TensorStorageMetadata)}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)

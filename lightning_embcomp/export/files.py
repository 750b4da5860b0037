"""Write an export folder whole or not at all, and read it with every check."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_embcomp.export.artefact import Artefact
from lightning_embcomp.export.errors import ExportError
from lightning_embcomp.export.manifest import Manifest, loads

MANIFEST, TABLES, DENSE = "manifest.json", "tables.safetensors", "dense.safetensors"


def write(artefact: Artefact, dirpath: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write an export.

    Everything goes into a folder beside the target, reaches the disk, and only then gets its name; an interrupted
    write leaves nothing that loads.

    Args:
        artefact: The export.
        dirpath: Folder to create.
        overwrite: Replace an earlier export; anything else is never replaced.

    Returns:
        The folder.

    Raises:
        ExportError: If there is something at ``dirpath`` that may not be replaced.
    """
    target = Path(dirpath)
    check_target(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        files = {TABLES: _save(artefact.tensors, partial / TABLES)}
        if artefact.dense:
            files[DENSE] = _save(artefact.dense, partial / DENSE)
        _save_text(artefact.manifest.with_(files=files).dumps(), partial / MANIFEST)
        partial.chmod(0o755)  # mkdtemp makes folders that only their owner can read
        _sync(partial)
        _exchange(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return target


def read(dirpath: str | os.PathLike[str], *, dense: bool = True) -> Artefact:
    """Read an export, checksums included.

    Args:
        dirpath: Its folder.
        dense: Whether to read the rest of the model too, if it was exported.

    Returns:
        The export in memory.

    Raises:
        ExportError: If something is missing, damaged, or of a newer schema; the message names the file.
    """
    folder = Path(dirpath)
    manifest = read_manifest(folder)
    files = [TABLES, *([DENSE] if dense and DENSE in manifest.files else [])]
    found = {name: _load(folder / name, manifest.files.get(name)) for name in files}
    return Artefact(manifest=manifest, tensors=found[TABLES], dense=found.get(DENSE, {}))


def read_manifest(folder: Path) -> Manifest:
    """Read what an export says about itself.

    Args:
        folder: Its folder.

    Raises:
        ExportError: If it is missing, damaged or of a newer schema.
    """
    path = folder / MANIFEST
    if not path.is_file():
        what = "there is no such folder" if not folder.exists() else f"it holds no {MANIFEST}, so it is no export"
        raise ExportError(f"{folder}: {what}. Write one with `embcomp export`")
    try:
        text = path.read_text(encoding="utf-8")
        return loads(text)
    except UnicodeDecodeError as error:
        raise ExportError(f"{path}: the manifest is damaged ({error.reason}): export again") from error
    except ExportError as error:
        raise ExportError(f"{path}: {error}") from error


def folder_bytes(dirpath: str | os.PathLike[str]) -> dict[str, int]:
    """Bytes of every file of an export.

    Args:
        dirpath: Its folder.
    """
    return {path.name: path.stat().st_size for path in sorted(Path(dirpath).iterdir()) if path.is_file()}


def check_target(target: Path, overwrite: bool) -> None:
    """Raise if an export may not be written to a folder.

    Args:
        target: The folder.
        overwrite: Whether an earlier export may be replaced.

    Raises:
        ExportError: If there is something that may not be replaced.
    """
    if not target.exists() and not target.is_symlink():
        return
    if not target.is_dir() or target.is_symlink():
        raise ExportError(f"{target}: there is a file of that name; choose another folder")
    if not any(target.iterdir()):
        return
    if not (target / MANIFEST).is_file():
        raise ExportError(f"{target}: the folder holds other things than an export; choose another one")
    if not overwrite:
        raise ExportError(f"{target}: there is an export already; choose another folder, or overwrite it (--overwrite)")


def _exchange(partial: Path, target: Path) -> None:
    """Give the finished folder its name; of an earlier export nothing is deleted before that."""
    if not target.exists():
        os.rename(partial, target)
    else:
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
        os.rename(target, old)
        try:
            os.rename(partial, target)
        except BaseException:
            os.rename(old, target)
            raise
        shutil.rmtree(old)
    _sync(target.parent)


def _save(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    _sync(path)
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _save_text(text: str, path: Path) -> None:
    path.write_text(text + "\n", encoding="utf-8")
    _sync(path)


def _load(path: Path, wanted: Mapping[str, Any] | None) -> dict[str, Tensor]:
    if not path.is_file():
        raise ExportError(f"{path}: the file is missing: copy the whole folder again, or export again")
    if not isinstance(wanted, Mapping) or "sha256" not in wanted:
        raise ExportError(f"{path.parent / MANIFEST}: the manifest is damaged (no checksum of {path.name})")
    if _sha256(path) != wanted["sha256"]:
        size = path.stat().st_size
        raise ExportError(
            f"{path}: the checksum is wrong ({size} bytes, {wanted.get('bytes')} were written): the file was changed or"
            " damaged after the export; copy it again, or export again"
        )
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ExportError(f"{path}: the file cannot be read ({error}): export again") from error


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

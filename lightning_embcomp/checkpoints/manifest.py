"""What a checkpoint directory says about itself; written last, so that without it there is no checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

from lightning_embcomp.checkpoints.directory import MANIFEST, METADATA, sync
from lightning_embcomp.report.checkpoint import CheckpointError

FORMAT, VERSION = "embcomp-checkpoint", 1
"""Kind of directory, and version of its layout; readers refuse newer ones."""
COMMON = "common.pt"
_PACKAGES = ("lightning-embcomp", "torch", "torchrec", "lightning")


def rank_file(rank: int) -> str:
    """Name of the file with a rank's own state.

    Example:
        >>> rank_file(3)
        'rank_3.pt'
    """
    return f"rank_{rank}.pt"


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """A file of a checkpoint as it was written.

    Args:
        bytes: Size.
        sha256: Checksum in hex; empty for tensor files, which are large and read in parts.
    """

    bytes: int
    sha256: str = ""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint directory says about itself.

    Args:
        world_size: Ranks that wrote it.
        files: All other files by name.
        versions: Versions of the packages that wrote it.
    """

    world_size: int
    files: Mapping[str, FileRecord]
    versions: Mapping[str, str] = field(default_factory=dict)


def write_manifest(folder: Path, world_size: int, files: Mapping[str, FileRecord]) -> None:
    """Write the manifest; all other files are there and complete.

    Args:
        folder: The directory.
        world_size: Ranks that wrote it.
        files: All other files by name.
    """
    record = {
        "format": FORMAT,
        "version": VERSION,
        "world_size": world_size,
        "versions": _versions(),
        "files": {name: asdict(found) for name, found in files.items()},
    }
    path = folder / MANIFEST
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    sync(path)


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest, and that all files are there with their sizes.

    Args:
        folder: The directory.

    Returns:
        The manifest.

    Raises:
        CheckpointError: If something is missing, damaged, or newer; the message names the file.
    """
    if not folder.is_dir():
        raise CheckpointError("this is a file; a distributed checkpoint is a directory", path=folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"the directory has no {MANIFEST}: it is no checkpoint, or was not copied whole; use another one",
            path=folder,
        )
    manifest = _parse(path)
    wanted = {METADATA, COMMON, *map(rank_file, range(manifest.world_size))}
    if missing := sorted(wanted - set(manifest.files)):
        raise CheckpointError(f"the manifest is damaged: it does not list {missing[0]}; {_COPY}", path=path)
    for name, record in manifest.files.items():
        _check_size(folder / name, record)
    return manifest


def record_of(path: Path, *, checksum: bool = True) -> FileRecord:
    """Describe a file that is complete.

    Args:
        path: The file.
        checksum: Whether to read it for its checksum.
    """
    return FileRecord(bytes=path.stat().st_size, sha256=_sha256(path) if checksum else "")


def check_content(path: Path, record: FileRecord) -> None:
    """Raise if a small file is not as it was written.

    Args:
        path: The file.
        record: Its record in the manifest.

    Raises:
        CheckpointError: If the checksum is wrong.
    """
    _check_size(path, record)
    if _sha256(path) != record.sha256:
        raise CheckpointError(f"the checksum is wrong: the file was changed or damaged; {_COPY}", path=path)


_COPY = "copy the whole directory again, or use another checkpoint"


def _check_size(path: Path, record: FileRecord) -> None:
    if not path.is_file():
        raise CheckpointError(f"the file is missing; {_COPY}", path=path)
    size = path.stat().st_size
    if size != record.bytes:
        what = "truncated" if size < record.bytes else "damaged"
        raise CheckpointError(
            f"the file is {what}: it has {size} bytes, {record.bytes} were written; {_COPY}", path=path
        )


def _parse(path: Path) -> Manifest:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"the manifest is damaged ({error}); {_COPY}", path=path) from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise CheckpointError("this is the manifest of something else than a checkpoint; check the path", path=path)
    version = record.get("version")
    if isinstance(version, int) and version > VERSION:
        raise CheckpointError(
            f"the checkpoint has format version {version}; this version of lightning-embcomp reads up to {VERSION}:"
            " update it",
            path=path,
        )
    try:
        files = {str(name): FileRecord(**found) for name, found in record["files"].items()}
        manifest = Manifest(world_size=int(record["world_size"]), files=files, versions=dict(record["versions"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"the manifest is damaged ({error!r}); {_COPY}", path=path) from error
    if manifest.world_size < 1 or any(os.sep in name for name in files):
        raise CheckpointError(f"the manifest is damaged: its values make no sense; {_COPY}", path=path)
    return manifest


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()

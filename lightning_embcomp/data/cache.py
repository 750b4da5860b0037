"""Where encoded data is kept, and how it is known to be still that of the files."""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

FORMAT_VERSION = 1
FOLDER = ".embcomp_cache"
_SAMPLE_BYTES = 1 << 16


def fingerprint(files: Sequence[Path], settings: Mapping[str, object]) -> str:
    """Digest of the data and of everything that decides how it is encoded.

    Files count with name, size, time of change and their first and last 64 KiB, so that no large file is read twice.

    Args:
        files: The data files.
        settings: Settings by name; they must be representable as JSON.

    Returns:
        32 hexadecimal digits.
    """
    digest = hashlib.sha256(json.dumps([FORMAT_VERSION, settings], sort_keys=True).encode())
    for file in files:
        status = file.stat()
        digest.update(f"{file.name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        with open(file, "rb") as stream:
            digest.update(stream.read(_SAMPLE_BYTES))
            stream.seek(max(0, status.st_size - _SAMPLE_BYTES))
            digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:32]


def cache_candidates(files: Sequence[Path], cache_dir: str | os.PathLike[str] | None) -> tuple[Path, ...]:
    """Folders in which encoded data may be, the preferred one first.

    Args:
        files: The data files.
        cache_dir: Folder that was asked for; it is then the only one.

    Returns:
        ``cache_dir``; or a folder beside the first file and one in the user's cache folder (``XDG_CACHE_HOME`` or
        ``~/.cache``), which is for data in a place that cannot be written to.
    """
    if cache_dir is not None:
        return (Path(cache_dir).expanduser(),)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (files[0].resolve().parent / FOLDER, home / "lightning_embcomp" / "data")


def find(candidates: Sequence[Path], key: str) -> Path | None:
    """Folder of complete encoded data with fingerprint ``key``, if there is one."""
    return next((folder / key for folder in candidates if (folder / key / "meta.json").is_file()), None)


def first_writable(candidates: Sequence[Path]) -> Path:
    """The first folder in which files can be created; it exists afterwards.

    Raises:
        PermissionError: If there is none.
    """
    reasons = []
    for folder in candidates:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Permission bits tell too little (read-only mounts, root): only trying does.
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError as error:
            reasons.append(f"{folder} ({error.strerror})")
    raise PermissionError(f"no folder for the encoded data can be written to: {', '.join(reasons)}; set cache_dir")

"""Finding data files and reading them as a stream, compressed or not."""

import bz2
import glob
import gzip
import io
import lzma
import os
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa

from lightning_embcomp.data.errors import DataFileError

PathLike = str | os.PathLike[str]

_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"\x1f\x8b", "gzip"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"BZh", "bz2"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
)


def resolve_paths(path: PathLike | Sequence[PathLike]) -> tuple[Path, ...]:
    """Turn a file, folder, glob or list of these into a list of files.

    Args:
        path: One or more of: a file; a folder, which stands for the visible files in it; a glob such as
            ``day_*.tsv.gz``. Files of a folder or glob come in the order of their names.

    Returns:
        The files, in order.

    Raises:
        FileNotFoundError: If one of them names no file.
    """
    if not isinstance(path, (str, os.PathLike)):
        if not path:
            raise FileNotFoundError("the list of data files is empty")
        return tuple(file for one in path for file in resolve_paths(one))
    text = os.path.expanduser(os.fspath(path))
    if os.path.isfile(text):
        return (Path(text),)
    if os.path.isdir(text):
        files = sorted(entry for entry in Path(text).iterdir() if entry.is_file() and not entry.name.startswith("."))
    else:
        files = sorted(Path(match) for match in glob.glob(text) if os.path.isfile(match))
    if not files:
        raise FileNotFoundError(f"{text}: no such data file, no folder with files and no glob that matches any")
    return tuple(files)


class GuardedStream(io.RawIOBase):
    """The decompressed bytes of one file; a damaged stream ends early and is remembered instead of raised.

    Parsers read ahead, so that an error raised at the damage would hide the rows before it. The caller parses what
    there is and then asks ``damage``.

    Args:
        raw: The file as stored; gzip, xz, bzip2 and Zstandard are known by their first bytes, whatever the name.
        name: Name of the file in errors.
        advanced: Called with the number of further bytes of ``raw`` that have been read.

    Raises:
        DataFileError: If the file is empty.
    """

    def __init__(self, raw: IO[bytes], name: str, advanced: Callable[[int], None] | None = None) -> None:
        """Find out how the bytes are compressed."""
        super().__init__()
        self.name = name
        self.damage: str | None = None
        self.ends_in_newline = True
        self._raw = raw
        self._stream, self._read = _decompress(raw)
        self._advanced = advanced
        self._position = 0
        self._empty = True

    def readable(self) -> bool:
        """Whether the stream can be read: always."""
        return True

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401 - any writable buffer, as in io.RawIOBase
        """Fill a part of ``buffer``; 0 at the end or at the damage."""
        if self.damage is not None:
            return 0
        view = memoryview(buffer).cast("B")
        try:
            # One raw read at most: a reader that fills the buffer would drop what it has when it meets the damage.
            data = self._read(len(view))
        except (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the disk's fault, not the stream's
            self.damage = f"{type(error).__name__}: {error}"
            return 0
        view[: len(data)] = data
        self._report(data)
        return len(data)

    def _report(self, data: bytes) -> None:
        if data:
            self._empty = False
            self.ends_in_newline = data.endswith(b"\n")
        elif self._empty:
            raise DataFileError("the file is empty", file=self.name)
        if self._advanced is not None:
            position = self._raw.tell()
            self._advanced(position - self._position)
            self._position = position

    def close(self) -> None:
        """Close the file."""
        if not self.closed:
            self._stream.close()
            self._raw.close()
        super().close()


def _decompress(raw: IO[bytes]) -> tuple[Any, Callable[[int], bytes]]:
    head = raw.read(8)
    raw.seek(0)
    kind = next((name for magic, name in _MAGIC if head.startswith(magic)), None)
    if kind == "zstd":
        compressed = pa.CompressedInputStream(raw, "zstd")
        return compressed, compressed.read
    stream: Any = raw
    if kind == "gzip":
        stream = gzip.GzipFile(fileobj=raw)
    elif kind == "xz":
        stream = lzma.LZMAFile(raw)
    elif kind == "bz2":
        stream = bz2.BZ2File(raw)
    return stream, cast(Callable[[int], bytes], stream.read1)

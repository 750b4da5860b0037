"""What every reader provides."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from lightning_embcomp.data.bad_rows import BadRows
from lightning_embcomp.data.schema import ClickLogSchema, TextDialect
from lightning_embcomp.data.sources import GuardedStream
from lightning_embcomp.data.text import RawBlock, read_text

Advanced = Callable[[int], None]


class Reader(Protocol):
    """A click log in some format.

    Attributes:
        schema: What its columns are.
        files: All files that are read, side tables included; they make up the fingerprint of the data.
        size: Bytes that ``blocks`` reports as read when it is through.
    """

    @property
    def schema(self) -> ClickLogSchema:
        """What the columns are."""

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that are read."""

    @property
    def size(self) -> int:
        """Bytes to read."""

    def blocks(self, bad_rows: BadRows, advanced: Advanced) -> Iterator[RawBlock]:
        """Read the rows block by block, with all columns of the schema."""


def read_text_files(
    files: tuple[Path, ...], dialect: TextDialect, bad_rows: BadRows, advanced: Advanced
) -> Iterator[RawBlock]:
    """Read text files one after the other, each opened only when its turn comes."""
    for file in files:
        with open(file, "rb") as raw:
            yield from read_text(GuardedStream(raw, str(file), advanced), dialect, bad_rows)


def total_size(files: tuple[Path, ...]) -> int:
    """Bytes of all files as stored."""
    return sum(file.stat().st_size for file in files)

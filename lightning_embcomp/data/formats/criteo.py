"""Criteo display advertising: label, 13 integers, 26 hashed categorical values, tab separated."""

from collections.abc import Iterator
from pathlib import Path

from lightning_embcomp.data.bad_rows import BadRows
from lightning_embcomp.data.formats.base import Advanced, read_text_files, total_size
from lightning_embcomp.data.schema import ClickLogSchema, TextDialect
from lightning_embcomp.data.text import RawBlock

DENSE = tuple(f"I{index}" for index in range(1, 14))
CATEGORICAL = tuple(f"C{index}" for index in range(1, 27))

CRITEO_SCHEMA = ClickLogSchema(
    label="label",
    dense=DENSE,
    categorical=CATEGORICAL,
    dialect=TextDialect(separator="\t", quote=None, has_header=False, columns=("label", *DENSE, *CATEGORICAL)),
)


class CriteoReader:
    """Files in the layout of Criteo's ``train.txt`` and ``day_0`` … ``day_23``, in time order.

    Args:
        files: The files; without header; an empty field is a missing value.
    """

    schema = CRITEO_SCHEMA

    def __init__(self, files: tuple[Path, ...]) -> None:
        """Take note of the files."""
        self.files = files
        self.size = total_size(files)

    def blocks(self, bad_rows: BadRows, advanced: Advanced) -> Iterator[RawBlock]:
        """Read the rows block by block."""
        return read_text_files(self.files, self.schema.dialect, bad_rows, advanced)

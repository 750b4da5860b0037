"""Avazu click-through rate prediction: CSV with a header, all inputs categorical."""

from collections.abc import Iterator
from pathlib import Path

import polars as pl

from lightning_embcomp.data.bad_rows import BadRows
from lightning_embcomp.data.errors import DataFileError
from lightning_embcomp.data.formats.base import Advanced, read_text_files, total_size
from lightning_embcomp.data.schema import ClickLogSchema
from lightning_embcomp.data.text import RawBlock

_INPUTS = (
    *("C1", "banner_pos", "site_id", "site_domain", "site_category", "app_id", "app_domain", "app_category"),
    *("device_id", "device_ip", "device_model", "device_type", "device_conn_type"),
    *("C14", "C15", "C16", "C17", "C18", "C19", "C20", "C21"),
)

AVAZU_SCHEMA = ClickLogSchema(label="click", categorical=("hour_of_day", *_INPUTS), timestamp="hour")


class AvazuReader:
    """Files in the layout of Avazu's ``train.csv``.

    The column ``hour`` (``YYMMDDHH``) is the timestamp; its last two digits are the feature ``hour_of_day``, since
    the date of a test row never occurs in training. The row's ``id`` is not read.

    Args:
        files: The files, each with a header.
    """

    schema = AVAZU_SCHEMA

    def __init__(self, files: tuple[Path, ...]) -> None:
        """Take note of the files."""
        self.files = files
        self.size = total_size(files)

    def blocks(self, bad_rows: BadRows, advanced: Advanced) -> Iterator[RawBlock]:
        """Read the rows block by block."""
        for block in read_text_files(self.files, self.schema.dialect, bad_rows, advanced):
            missing = [name for name in ("click", "hour", *_INPUTS) if name not in block.frame.columns]
            if missing:
                raise DataFileError(
                    f"the header lacks Avazu's columns {missing}; files with other columns are read with "
                    "format='table' and a schema",
                    file=block.file,
                )
            frame = block.frame.with_columns(pl.col("hour").str.tail(2).alias("hour_of_day"))
            yield RawBlock(frame=frame, file=block.file, lines=block.lines)

"""Any CSV or Parquet table with the columns that a schema names, and side tables."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet

from lightning_embcomp.data.bad_rows import BadRows
from lightning_embcomp.data.errors import DataFileError
from lightning_embcomp.data.formats.base import Advanced, read_text_files, total_size
from lightning_embcomp.data.schema import ClickLogSchema, SideTable
from lightning_embcomp.data.sources import resolve_paths
from lightning_embcomp.data.text import RawBlock

BLOCK_ROWS = 1 << 18


class TableReader:
    """CSV (plain or compressed) and Parquet files described by a schema.

    Args:
        files: The files; Parquet is known by its first bytes.
        schema: What the columns are.
    """

    def __init__(self, files: tuple[Path, ...], schema: ClickLogSchema) -> None:
        """Find the side tables."""
        self.schema = schema
        self._logs = files
        self._side_files = tuple(_side_file(table) for table in schema.side)
        self.files = (*files, *self._side_files)
        self.size = total_size(files)

    def blocks(self, bad_rows: BadRows, advanced: Advanced) -> Iterator[RawBlock]:
        """Read the rows block by block, joined with the side tables."""
        sides = [self._side(table, file) for table, file in zip(self.schema.side, self._side_files, strict=True)]
        joined = {name for table in self.schema.side for name in table.columns}
        own = [name for name in self.schema.columns() if name not in joined]
        for block in _read(self._logs, self.schema, own, bad_rows, advanced):
            frame = block.frame.select(own)
            for table, side in zip(self.schema.side, sides, strict=True):
                key = table.on or table.key
                if frame[key].dtype != pl.String:
                    frame = frame.with_columns(pl.col(key).cast(pl.String))
                frame = frame.join(side, left_on=key, right_on=table.key, how="left", maintain_order="left")
            yield RawBlock(frame=frame, file=block.file, lines=block.lines)

    def _side(self, table: SideTable, file: Path) -> pl.DataFrame:
        schema = (
            self.schema
            if table.dialect is None
            else ClickLogSchema(label=self.schema.label, categorical=self.schema.feature_names, dialect=table.dialect)
        )
        wanted = [table.key, *table.columns]
        # A broken side table would damage many rows of the log: its rows are never skipped over.
        blocks = _read((file,), schema, wanted, BadRows("error"), lambda _: None)
        side = pl.concat([block.frame.select(wanted) for block in blocks], how="vertical_relaxed")
        side = side.with_columns(pl.col(table.key).cast(pl.String))
        repeated = side.filter(pl.col(table.key).is_duplicated())[table.key]
        if len(repeated):
            raise DataFileError(
                f"key {table.key!r} is not unique: {repeated[0]!r} occurs more than once; remove the repetitions",
                file=str(file),
            )
        return side


def _side_file(table: SideTable) -> Path:
    files = resolve_paths(table.path)
    if len(files) != 1:
        raise DataFileError(f"a side table is one file, but this names {len(files)}", file=table.path)
    return files[0]


def _read(
    files: tuple[Path, ...], schema: ClickLogSchema, wanted: list[str], bad_rows: BadRows, advanced: Advanced
) -> Iterator[RawBlock]:
    for file in files:
        with open(file, "rb") as raw:
            parquet = raw.read(4) == b"PAR1"
        if parquet:
            blocks = _read_parquet(file, wanted, advanced)
        else:
            blocks = read_text_files((file,), schema.dialect, bad_rows, advanced)
        for block in blocks:
            _require(wanted, block.frame.columns, str(file))
            yield block


def _require(wanted: list[str], found: list[str], file: str) -> None:
    missing = [name for name in wanted if name not in found]
    if missing:
        raise DataFileError(f"columns {missing} of the schema are not in the file, which has {found}", file=file)


def _read_parquet(file: Path, wanted: list[str], advanced: Advanced) -> Iterator[RawBlock]:
    try:
        with pyarrow.parquet.ParquetFile(file) as parquet:
            _require(wanted, parquet.schema_arrow.names, str(file))
            first, per_row = 1, file.stat().st_size / max(parquet.metadata.num_rows, 1)
            for batch in parquet.iter_batches(batch_size=BLOCK_ROWS, columns=wanted, use_threads=False):
                frame = pl.from_arrow(batch)
                assert isinstance(frame, pl.DataFrame)
                lines = np.arange(first, first + frame.height, dtype=np.int64)
                first += frame.height
                advanced(int(per_row * frame.height))
                yield RawBlock(frame=frame, file=str(file), lines=lines)
    except pa.ArrowInvalid as error:
        raise DataFileError(f"not a readable Parquet file: {error}", file=str(file)) from error

"""Delimited text, block by block, with the line number of every row."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from lightning_embcomp.data.bad_rows import BadRows
from lightning_embcomp.data.errors import DataFileError, MalformedRowError, TruncatedFileError
from lightning_embcomp.data.schema import TextDialect
from lightning_embcomp.data.sources import GuardedStream

BLOCK_BYTES = 32 << 20

LINES = TextDialect(separator="\x01", quote=None, has_header=False, columns=("line",))
"""Dialect of files that no CSV parser reads: every row is one text, ``line``."""


@dataclass(frozen=True, kw_only=True)
class RawBlock:
    """Some consecutive rows of one file as they stand there.

    Args:
        frame: The rows; text columns from text files, any type from Parquet. Missing values are null.
        file: Name of the file.
        lines: Line number of every row, from 1, int64.
    """

    frame: pl.DataFrame
    file: str
    lines: np.ndarray


class _LineCounter:
    """Line numbers of parsed rows, beside which the parser has left out rows of the wrong width.

    Args:
        first_line: Line of the first row.
        quoted: Whether fields can contain line breaks.
    """

    def __init__(self, first_line: int, quoted: bool) -> None:
        self.invalid: list[tuple[int, int, str]] = []  # row number in the parser's count, columns found, text
        self._invalid_lines: list[int] = []
        self._invalid_breaks = 0
        self._reported = 0
        self._first_line = first_line
        self._quoted = quoted
        self._rows = 0
        self._breaks = 0

    def on_invalid(self, row: Any) -> str:  # noqa: ANN401 - pyarrow.csv.InvalidRow has no public type
        """Note a row of the wrong width; pyarrow's ``invalid_row_handler``."""
        self.invalid.append((row.number, row.actual_columns, row.text))
        return "skip"

    def lines(self, batch: pa.RecordBatch) -> np.ndarray:
        """Line numbers of the next rows, int64."""
        number = np.arange(1, batch.num_rows + 1, dtype=np.int64) + self._rows  # among the rows of the right width
        breaks = np.zeros(batch.num_rows + 1, dtype=np.int64)  # in the rows before each, then in all
        if self._quoted:
            for column in batch.columns:
                breaks[1:] += pc.fill_null(pc.count_substring(column, "\n"), 0).to_numpy(zero_copy_only=False)
            breaks = np.cumsum(breaks)
        lines = number + self._breaks + breaks[:-1]
        if self.invalid:
            invalid = np.array([row[0] for row in self.invalid], dtype=np.int64)
            before = np.searchsorted(invalid - np.arange(1, len(invalid) + 1), number - 1, side="right")
            lines += np.cumsum([0] + [1 + self._breaks_in(row[2]) for row in self.invalid])[before]
        self._locate_invalid(breaks)
        self._rows += batch.num_rows
        self._breaks += int(breaks[-1])
        return lines + (self._first_line - 1)

    def _breaks_in(self, text: str) -> int:
        return text.count("\n") if self._quoted else 0

    def _locate_invalid(self, breaks: np.ndarray) -> None:
        """Work out the lines of rows of the wrong width that stand before or among the next rows."""
        for index in range(len(self._invalid_lines), len(self.invalid)):
            number, _, text = self.invalid[index]
            within = number - 1 - index - self._rows  # next rows before it
            if within >= len(breaks):
                return
            line = number + self._breaks + int(breaks[within]) + self._invalid_breaks + self._first_line - 1
            self._invalid_lines.append(line)
            self._invalid_breaks += self._breaks_in(text)

    def drop_if_last_is_invalid(self) -> bool:
        """Forget the last row of all if it was of the wrong width; whether it was."""
        is_last = bool(self.invalid) and self.invalid[-1][0] == len(self.invalid) + self._rows
        if is_last:
            self.invalid.pop()
            del self._invalid_lines[len(self.invalid) :]
        return is_last

    def report(self, file: str, expected: int, bad_rows: BadRows, *, until: int | None = None) -> None:
        """Hand rows of the wrong width before line ``until`` to ``bad_rows``, each once."""
        self._locate_invalid(np.zeros(1, dtype=np.int64))
        while self._reported < len(self._invalid_lines):
            line = self._invalid_lines[self._reported]
            if until is not None and line >= until:
                return
            _, found, text = self.invalid[self._reported]
            self._reported += 1
            shown = text if len(text) <= 80 else text[:77] + "..."
            message = f"{found} columns where {expected} are expected: {shown!r}"
            bad_rows.found(MalformedRowError(message, file=file, line=line))


def read_text(stream: GuardedStream, dialect: TextDialect, bad_rows: BadRows) -> Iterator[RawBlock]:
    """Read delimited text without ever holding more than a few blocks of it.

    Args:
        stream: The decompressed file.
        dialect: How it is written.
        bad_rows: Takes rows with the wrong number of columns.

    Yields:
        Blocks of about 32 MiB of text, every column as text. Empty lines at the end of the file are no rows.

    Raises:
        DataFileError: If the file is empty, does not fit the encoding or has a quote that is never closed.
        TruncatedFileError: After the last complete row, if the compressed stream is damaged.
        MalformedRowError: At a row with the wrong number of columns, if ``bad_rows`` says so.
    """
    counter = _LineCounter(first_line=2 if dialect.has_header else 1, quoted=dialect.quote is not None)
    rows = 0
    try:
        with io.BufferedReader(stream, 1 << 20) as source:
            names = _header(source, dialect, stream.name) if dialect.has_header else dialect.columns
            held: RawBlock | None = None  # one block back: what ends the file is treated apart
            for batch in _batches(source, names, dialect, counter):
                block = RawBlock(frame=_frame(batch), file=stream.name, lines=counter.lines(batch))
                if held is not None:
                    rows += held.frame.height
                    counter.report(stream.name, len(names), bad_rows, until=int(held.lines[-1]))
                    yield held
                held = block
            damage, complete = stream.damage, stream.ends_in_newline
    except UnicodeDecodeError as error:
        raise DataFileError(f"not {dialect.encoding} text ({error}); set the encoding", file=stream.name) from error
    if damage is not None and not complete:
        held = _without_last_record(held, counter)
    held = _without_blank_end(held)
    counter.report(stream.name, len(names), bad_rows)
    if held is not None:
        rows += held.frame.height
        if held.frame.height:
            yield held
    if damage is not None:
        raise TruncatedFileError(damage, file=stream.name, rows=rows)


def _header(source: "io.BufferedReader[GuardedStream]", dialect: TextDialect, file: str) -> tuple[str, ...]:
    line = source.readline().removeprefix(b"\xef\xbb\xbf").decode(dialect.encoding)
    if not line.strip():
        raise DataFileError("the first line is empty where column names are expected", file=file)
    table = pyarrow.csv.read_csv(io.BytesIO(line.encode()), parse_options=_parse_options(dialect))
    repeated = sorted({name for name in table.column_names if table.column_names.count(name) > 1})
    if repeated:
        raise DataFileError(f"the header names columns more than once: {repeated}", file=file)
    return tuple(table.column_names)


def _parse_options(dialect: TextDialect, counter: _LineCounter | None = None) -> pyarrow.csv.ParseOptions:
    return pyarrow.csv.ParseOptions(
        delimiter=dialect.separator,
        quote_char=dialect.quote or False,
        double_quote=dialect.escape is None,
        escape_char="\\" if dialect.escape else False,
        newlines_in_values=dialect.quote is not None,
        ignore_empty_lines=False,
        invalid_row_handler=counter.on_invalid if counter else None,
    )


def _batches(
    source: "io.BufferedReader[GuardedStream]", names: tuple[str, ...], dialect: TextDialect, counter: _LineCounter
) -> Iterator[pa.RecordBatch]:
    if not source.peek(1):
        return
    file = source.raw.name
    try:
        reader = pyarrow.csv.open_csv(
            source,
            # One thread: only then does the parser number the rows of the wrong width.
            read_options=pyarrow.csv.ReadOptions(
                use_threads=False, block_size=BLOCK_BYTES, column_names=list(names), encoding=dialect.encoding
            ),
            parse_options=_parse_options(dialect, counter),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types={name: pa.string() for name in names},
                null_values=list(dialect.null_values),
                strings_can_be_null=True,
                quoted_strings_can_be_null=True,
            ),
        )
        for batch in reader:
            if batch.num_rows:
                yield batch
    except pa.ArrowInvalid as error:
        if "UTF8" in str(error):
            raise DataFileError(f"not {dialect.encoding} text ({error}); set the encoding", file=file) from error
        if "straddling" in str(error):
            raise DataFileError(
                f"a quoted field does not end within {BLOCK_BYTES} bytes; check quote {dialect.quote!r} and escape",
                file=file,
            ) from error
        raise DataFileError(str(error), file=file) from error


def _frame(batch: pa.RecordBatch) -> pl.DataFrame:
    frame = pl.from_arrow(batch)
    assert isinstance(frame, pl.DataFrame)
    return frame


def _without_last_record(block: RawBlock | None, counter: _LineCounter) -> RawBlock | None:
    """Leave out the record that a damaged stream broke off in the middle."""
    if counter.drop_if_last_is_invalid():
        return block
    return block and RawBlock(frame=block.frame.head(-1), file=block.file, lines=block.lines[:-1])


def _without_blank_end(block: RawBlock | None) -> RawBlock | None:
    if block is None:
        return None
    filled = block.frame.select(pl.any_horizontal(pl.all().is_not_null())).to_series().arg_true()
    rows = int(filled[-1]) + 1 if len(filled) else 0
    return RawBlock(frame=block.frame.head(rows), file=block.file, lines=block.lines[:rows])

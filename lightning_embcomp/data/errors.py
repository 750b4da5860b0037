"""Errors that name the place in the data at fault."""


class DataFileError(ValueError):
    """A data file cannot be read as asked.

    Args:
        message: What is wrong and what to change.
        file: Path of the file at fault.

    Example:
        >>> str(DataFileError("the file is empty", file="day_0.tsv"))
        'day_0.tsv: the file is empty'
    """

    def __init__(self, message: str, *, file: str) -> None:
        """Compose the message."""
        super().__init__(f"{file}: {message}")
        self.file = file


class TruncatedFileError(DataFileError):
    """A compressed file ends early or its stream is damaged.

    Args:
        reason: What the decompressor reported.
        file: Path of the file at fault.
        rows: Complete rows that could be read before the damage.
    """

    def __init__(self, reason: str, *, file: str, rows: int) -> None:
        """Compose the message."""
        super().__init__(
            f"the compressed stream is truncated or damaged after {rows} complete rows ({reason}); fetch it again, "
            f"or read those rows alone with max_rows={rows}",
            file=file,
        )
        self.rows = rows


class MalformedRowError(DataFileError):
    """A row does not have the form that the format or schema asks for.

    Args:
        message: What is wrong with the row.
        file: Path of the file at fault.
        line: Line number in the (decompressed) file, from 1; for Parquet the row number, from 1.
        column: Name of the column at fault; ``None`` if the row as a whole is.

    Example:
        >>> str(MalformedRowError("'x' is not a number", file="a.tsv", line=7, column="I3"))
        "a.tsv: line 7, column 'I3': 'x' is not a number"
    """

    def __init__(self, message: str, *, file: str, line: int, column: str | None = None) -> None:
        """Compose the message."""
        place = f"line {line}" if column is None else f"line {line}, column {column!r}"
        super().__init__(f"{place}: {message}", file=file)
        self.line = line
        self.column = column

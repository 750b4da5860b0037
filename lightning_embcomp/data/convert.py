"""From rows as they stand in a file to checked numbers and texts."""

from collections.abc import Callable

import numpy as np
import polars as pl

from lightning_embcomp.data.bad_rows import BadRows
from lightning_embcomp.data.errors import MalformedRowError
from lightning_embcomp.data.schema import ClickLogSchema
from lightning_embcomp.data.text import RawBlock

LABEL = "label"
TIMESTAMP = "timestamp"


def dense_column(index: int) -> str:
    """Name of the ``index``-th dense column in a checked block."""
    return f"dense_{index}"


def feature_column(index: int) -> str:
    """Name of the ``index``-th categorical feature in a checked block."""
    return f"feature_{index}"


class _Checks:
    """Collects which rows of a block fail a check, and says so for the first of them."""

    def __init__(self, block: RawBlock) -> None:
        self._block = block
        self._bad = np.zeros(block.frame.height, dtype=bool)
        self._first: tuple[int, str, str] | None = None

    def require(self, good: pl.Series, column: str, message: Callable[[object], str]) -> None:
        """Mark rows where ``good`` is false or null; ``message`` describes the value of ``column``."""
        bad = ~good.fill_null(False).to_numpy()
        if not bad.any():
            return
        self._bad |= bad
        row = int(bad.argmax())
        if self._first is None or row < self._first[0]:
            self._first = (row, column, message(self._block.frame[column][row]))

    def good_rows(self, bad_rows: BadRows) -> np.ndarray | None:
        """Rows that passed, as a mask; ``None`` if all did."""
        if self._first is None:
            return None
        row, column, message = self._first
        error = MalformedRowError(message, file=self._block.file, line=int(self._block.lines[row]), column=column)
        bad_rows.found(error, int(self._bad.sum()))
        return ~self._bad


def check_block(block: RawBlock, schema: ClickLogSchema, bad_rows: BadRows) -> pl.DataFrame:
    """Check and convert the rows of a block.

    Args:
        block: The rows with at least the columns that ``schema`` names.
        schema: What the columns are.
        bad_rows: Takes rows with a label, number or timestamp that is none.

    Returns:
        Columns ``label`` (uint8), ``timestamp`` (float64, only if the schema has one), ``dense_0`` … (float32, already
        transformed, 0 where missing) and ``feature_0`` … in the order of ``schema.feature_names`` (text, or list of
        text if multi-valued; null where missing).

    Raises:
        MalformedRowError: At the first malformed row, if ``bad_rows`` says so.
    """
    checks = _Checks(block)
    columns = [_label(block.frame[schema.label], schema, checks)]
    if schema.timestamp is not None:
        columns.append(_timestamp(block.frame[schema.timestamp], checks))
    for index, name in enumerate(schema.dense):
        number = _transform(_numbers(block.frame[name], checks), schema.dense_transform)
        columns.append(number.alias(dense_column(index)))
    for index, name in enumerate(schema.categorical):
        columns.append(_text(block.frame[name]).alias(feature_column(index)))
    for index, (name, separator) in enumerate(schema.multi_valued.items(), start=len(schema.categorical)):
        columns.append(_texts(block.frame[name], separator).alias(feature_column(index)))
    frame = pl.DataFrame(columns)
    good = checks.good_rows(bad_rows)
    return frame if good is None else frame.filter(good)


def _label(values: pl.Series, schema: ClickLogSchema, checks: _Checks) -> pl.Series:
    number = values.cast(pl.Float64, strict=False)
    if schema.positive_from is not None:
        checks.require(number.is_finite(), schema.label, lambda value: f"label {value!r} is not a number")
        return (number >= schema.positive_from).cast(pl.UInt8).alias(LABEL)
    checks.require(
        number.is_in([0.0, 1.0]),
        schema.label,
        lambda value: "the label is missing" if value is None else f"label {value!r} is neither 0 nor 1",
    )
    return number.cast(pl.UInt8, strict=False).alias(LABEL)


def _timestamp(values: pl.Series, checks: _Checks) -> pl.Series:
    if values.dtype.is_temporal():
        number = values.cast(pl.Datetime("us")).dt.timestamp("us").cast(pl.Float64) / 1e6
    else:
        number = values.cast(pl.Float64, strict=False)
        if values.dtype == pl.String and number.null_count() > values.null_count():
            moment = values.str.to_datetime(strict=False).dt.timestamp("us").cast(pl.Float64) / 1e6
            number = number.fill_null(moment) if len(moment) == len(number) else number
    checks.require(number.is_finite(), values.name, lambda value: f"timestamp {value!r} is no number and no ISO 8601")
    return number.alias(TIMESTAMP)


def _numbers(values: pl.Series, checks: _Checks) -> pl.Series:
    number = values.cast(pl.Float64, strict=False)
    checks.require(
        number.is_finite() | values.is_null(),
        values.name,
        lambda value: f"{value!r} is not a finite number; if it means 'missing', add it to null_values",
    )
    return number.fill_null(0.0)


def _transform(number: pl.Series, transform: str) -> pl.Series:
    if transform == "log":
        number = number.sign() * number.abs().log1p()
    return number.cast(pl.Float32)


def _text(values: pl.Series) -> pl.Series:
    return values if values.dtype == pl.String else values.cast(pl.String)


def _texts(values: pl.Series, separator: str) -> pl.Series:
    if isinstance(values.dtype, pl.List):
        return values.cast(pl.List(pl.String))
    parts = pl.DataFrame({"values": _text(values)}).select(pl.col("values").str.split(separator))
    return parts.select(pl.col("values").list.eval(pl.element().filter(pl.element() != ""))).to_series()

"""What the columns of a click log are, and how its rows are divided."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class CategoricalFeature:
    """One categorical input of a model: a key of the batch's ``KeyedJaggedTensor``.

    Args:
        name: Key of the feature.
        num_embeddings: Rows that an embedding table for this feature needs, id 0 (out of vocabulary or missing)
            included.
        multi_valued: Whether an example may hold any number of ids instead of exactly one.

    Example:
        >>> CategoricalFeature("site_id", num_embeddings=722).multi_valued
        False
    """

    name: str
    num_embeddings: int
    multi_valued: bool = False

    def __post_init__(self) -> None:
        """Check the values."""
        if self.num_embeddings < 1:
            raise ValueError(f"feature {self.name!r}: num_embeddings must be at least 1, got {self.num_embeddings}")


@dataclass(frozen=True, kw_only=True)
class Split:
    """How rows are divided into training, validation and test rows.

    Args:
        kind: ``chronological``: the last rows by timestamp (by position, where there is none) are the test rows, the
            rows before them the validation rows. ``random``: rows are drawn without replacement.
        validation: Fraction of all rows kept for validation, 0 to below 1.
        test: Fraction of all rows kept for the test, 0 to below 1.
        seed: Seed of the random split; refused for a chronological one.

    Example:
        >>> Split(validation=0.6, test=0.5)
        Traceback (most recent call last):
        ValueError: validation + test must leave rows for training, got 0.6 + 0.5
    """

    kind: Literal["chronological", "random"] = "chronological"
    validation: float = 0.1
    test: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values."""
        if self.kind not in ("chronological", "random"):
            raise ValueError(f"split kind must be 'chronological' or 'random', got {self.kind!r}")
        if not (0 <= self.validation < 1 and 0 <= self.test < 1):
            raise ValueError(f"validation and test must be in [0, 1), got {self.validation} and {self.test}")
        if self.validation + self.test >= 1:
            raise ValueError(f"validation + test must leave rows for training, got {self.validation:g} + {self.test:g}")
        if self.seed < 0:
            raise ValueError(f"split seed must be 0 or more, got {self.seed}")
        if self.seed and self.kind == "chronological":
            raise ValueError("the seed has no effect on a chronological split; leave it out or set kind='random'")


@dataclass(frozen=True, kw_only=True)
class TextDialect:
    r"""How the text of a CSV file is written. Parquet files ignore it.

    Args:
        separator: One character between fields.
        quote: Character around quoted fields; ``None`` if none is special. A doubled quote inside stands for itself.
        escape: ``backslash`` if ``\"`` inside a field stands for ``"``; ``None`` if backslashes are plain text.
        encoding: Python's name of the encoding, such as ``utf-8`` or ``latin-1``.
        has_header: Whether the first line of every file holds the column names.
        columns: Column names of files without a header, in order.
        null_values: Texts that mean "missing".
    """

    separator: str = ","
    quote: str | None = '"'
    escape: Literal["backslash"] | None = None
    encoding: str = "utf-8"
    has_header: bool = True
    columns: tuple[str, ...] = ()
    null_values: tuple[str, ...] = ("",)

    def __post_init__(self) -> None:
        """Check the values."""
        if len(self.separator) != 1:
            raise ValueError(f"separator must be one character, got {self.separator!r}")
        if self.quote is not None and len(self.quote) != 1:
            raise ValueError(f"quote must be one character or None, got {self.quote!r}")
        if self.escape not in (None, "backslash"):
            raise ValueError(f"escape must be 'backslash' or None, got {self.escape!r}")
        if self.has_header == bool(self.columns):
            raise ValueError("give `columns` exactly when has_header is false")
        object.__setattr__(self, "columns", tuple(self.columns))
        object.__setattr__(self, "null_values", tuple(self.null_values))


@dataclass(frozen=True, kw_only=True)
class SideTable:
    """A table joined to every row by a key, such as the attributes of users or items. It is held in memory.

    Rows whose key is missing from the side table keep their place; the joined columns are then missing.

    Args:
        path: File of the side table, CSV (plain or compressed) or Parquet.
        key: Column of the side table with unique values.
        columns: Columns to take from the side table.
        on: Column of the click log that holds the key; ``None`` if it is called ``key`` there as well.
        dialect: How the file is written; ``None``: like the click log itself.
    """

    path: str
    key: str
    columns: tuple[str, ...]
    on: str | None = None
    dialect: TextDialect | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        object.__setattr__(self, "columns", tuple(self.columns))
        if not self.columns:
            raise ValueError(f"side table {self.path}: `columns` is empty, so joining it has no effect")
        if self.key in self.columns:
            raise ValueError(f"side table {self.path}: the key {self.key!r} is joined on and cannot be in `columns`")


@dataclass(frozen=True, kw_only=True)
class ClickLogSchema:
    """Which columns of a click log are read, and as what. Columns that are not named here are not read.

    Args:
        label: Column of the label. Its values must be 0 or 1 unless ``positive_from`` is given.
        positive_from: Rows whose label value is at least this are positive, the others negative.
        dense: Numeric columns. A missing number becomes 0.
        dense_transform: ``log``: ``sign(x) * log(1 + |x|)``, which is the usual ``log(1 + x)`` of click logs for the
            counts above 0, keeps the few negative ones in order and needs no statistics of the data; ``none``: as is.
        categorical: Columns with one value per row. A missing value becomes id 0.
        multi_valued: Columns with any number of values per row, each with the separator between its values. List
            columns of Parquet files need none: their separator is ignored. A missing value becomes an empty bag.
        timestamp: Numeric or ISO 8601 column that orders the rows of a chronological split; ``None``: rows are in
            order already.
        dialect: How CSV files are written.
        side: Tables to join.

    Example:
        >>> schema = ClickLogSchema(label="rating", positive_from=4, categorical=("user", "item"))
        >>> schema.feature_names
        ('user', 'item')
    """

    label: str
    positive_from: float | None = None
    dense: tuple[str, ...] = ()
    dense_transform: Literal["log", "none"] = "log"
    categorical: tuple[str, ...] = ()
    multi_valued: dict[str, str] = field(default_factory=dict)
    timestamp: str | None = None
    dialect: TextDialect = TextDialect()
    side: tuple[SideTable, ...] = ()

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("dense", "categorical", "side"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.dense_transform not in ("log", "none"):
            raise ValueError(f"dense_transform must be 'log' or 'none', got {self.dense_transform!r}")
        inputs = [*self.dense, *self.feature_names]
        if not self.feature_names:
            raise ValueError("the schema names no categorical column; give `categorical` or `multi_valued`")
        repeated = sorted({name for name in inputs if inputs.count(name) > 1})
        if repeated:
            raise ValueError(f"columns are named more than once in the schema: {repeated}")
        if self.label in inputs:
            raise ValueError(f"the label column {self.label!r} is also an input; that would leak the label")
        dotted = [name for name in self.feature_names if "." in name]
        if dotted:
            raise ValueError(f"embedding modules cannot have names with a dot; rename the columns {dotted}")
        for name, separator in self.multi_valued.items():
            if not separator:
                raise ValueError(f"multi-valued column {name!r} needs a separator")

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of the categorical features: the single-valued ones, then the multi-valued ones."""
        return (*self.categorical, *self.multi_valued)

    def columns(self) -> Iterator[str]:
        """All columns that are read, each once, with those that side tables supply or are joined on."""
        timestamp = () if self.timestamp is None else (self.timestamp,)
        keys = tuple(table.on or table.key for table in self.side)
        yield from dict.fromkeys((self.label, *timestamp, *self.dense, *self.feature_names, *keys))

"""libFM text: a label and ``index:value`` pairs, separated by spaces."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import polars as pl

from lightning_embcomp.data.bad_rows import BadRows
from lightning_embcomp.data.errors import DataFileError, MalformedRowError
from lightning_embcomp.data.formats.base import Advanced, read_text_files, total_size
from lightning_embcomp.data.schema import ClickLogSchema
from lightning_embcomp.data.sources import GuardedStream
from lightning_embcomp.data.text import LINES, RawBlock, read_text

BAG = "features"


class LibfmReader:
    """Files of indicator features in libFM's format; labels are 1 or, for negatives, -1 or 0.

    libFM's format does not say which features belong to one field. As long as all rows hold the same number of
    features, as the usual conversions of tables do, position tells: the features are ``field_0``, ``field_1`` and so
    on. With rows of different lengths, all are values of one multi-valued feature called ``features``.

    Args:
        files: The files.
        bag: Whether to read every row as one bag of features.
    """

    def __init__(self, files: tuple[Path, ...], *, bag: bool) -> None:
        """Find out how many fields there are, unless rows are bags."""
        self.files = files
        self.size = total_size(files)
        self._bag = bag
        if bag:
            self.schema = ClickLogSchema(label="label", multi_valued={BAG: " "})
        else:
            fields = tuple(f"field_{index}" for index in range(_fields_of_first_row(files[0])))
            self.schema = ClickLogSchema(label="label", categorical=fields)

    def blocks(self, bad_rows: BadRows, advanced: Advanced) -> Iterator[RawBlock]:
        """Read the rows block by block."""
        for block in read_text_files(self.files, LINES, bad_rows, advanced):
            yield self._split(block, bad_rows)

    def _split(self, block: RawBlock, bad_rows: BadRows) -> RawBlock:
        line = pl.col("line").fill_null("").str.strip_chars()
        pairs = line.str.replace(r"^\S+\s*", "").str.extract_all(r"\S+")
        frame = block.frame.select(
            line.str.extract(r"^(\S+)").replace({"-1": "0"}).alias("label"),
            pairs.list.eval(pl.element().str.extract(r"^(\d+):1(?:\.0*)?$")).alias("index"),
            pairs.alias("pairs"),
        )
        good = frame.select(self._good()).to_series().fill_null(False)
        if not good.all():
            row = int((~good).arg_true()[0])
            message = self._complaint(frame["pairs"][row].to_list(), frame["index"][row].to_list())
            error = MalformedRowError(message, file=block.file, line=int(block.lines[row]))
            bad_rows.found(error, int((~good).sum()))
            frame, block = (
                frame.filter(good),
                RawBlock(frame=block.frame, file=block.file, lines=block.lines[good.to_numpy()]),
            )
        if self._bag:
            frame = frame.select("label", pl.col("index").alias(BAG))
        else:
            frame = frame.select(
                "label", *(pl.col("index").list.get(at).alias(name) for at, name in enumerate(self.schema.categorical))
            )
        return RawBlock(frame=frame, file=block.file, lines=block.lines)

    def _good(self) -> pl.Expr:
        well_formed = pl.col("index").list.eval(pl.element().is_null()).list.any().not_()
        return well_formed if self._bag else well_formed & (pl.col("index").list.len() == len(self.schema.categorical))

    def _complaint(self, pairs: list[str], index: list[str | None]) -> str:
        for pair, number in zip(pairs, index, strict=True):
            if number is None:
                return f"{pair!r} is not of the form index:1; only indicator features are read"
        return (
            f"{len(pairs)} features where the first row of the data has {len(self.schema.categorical)}; read rows of "
            f"different lengths as one bag: schema=ClickLogSchema(label='label', multi_valued={{'{BAG}': ' '}})"
        )


def _fields_of_first_row(file: Path) -> int:
    with open(file, "rb") as raw:
        blocks = read_text(GuardedStream(raw, str(file)), LINES, BadRows("error"))
        for block in islice(blocks, 1):
            count = len((block.frame["line"][0] or "").split()) - 1
            if count >= 1:
                return count
    raise DataFileError(
        "the first line holds no features; a line is a label followed by index:value pairs", file=str(file)
    )

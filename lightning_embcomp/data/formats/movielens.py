"""MovieLens 1M: ratings joined with the attributes of users and movies."""

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import polars as pl

from lightning_embcomp.data.bad_rows import BadRows
from lightning_embcomp.data.errors import DataFileError, MalformedRowError
from lightning_embcomp.data.formats.base import Advanced
from lightning_embcomp.data.schema import ClickLogSchema, TextDialect
from lightning_embcomp.data.sources import GuardedStream
from lightning_embcomp.data.text import LINES, RawBlock, read_text

MOVIELENS_SCHEMA = ClickLogSchema(
    label="rating",
    positive_from=4,
    categorical=("user", "item", "gender", "age", "occupation", "zip"),
    multi_valued={"genres": "|"},
    timestamp="timestamp",
)

_RATINGS = ("user", "item", "rating", "timestamp")
_USERS = ("user", "gender", "age", "occupation", "zip")
_MOVIES = ("item", "title", "genres")
_DIALECT = TextDialect(
    separator=LINES.separator, quote=None, has_header=False, columns=LINES.columns, encoding="latin-1"
)


class MovieLensReader:
    """``ratings.dat``, ``users.dat`` and ``movies.dat`` (fields separated by ``::``), in a folder or the official zip.

    A rating of 4 or 5 is positive. The title of a movie is not read.

    Args:
        path: The folder, ``ml-1m.zip``, or ``ratings.dat`` with the other two files beside it.
    """

    schema = MOVIELENS_SCHEMA

    def __init__(self, path: Path) -> None:
        """Find the three files."""
        if path.name == "ratings.dat":
            path = path.parent
        self._path = path
        self._zipped = path.is_file()
        if self._zipped and not zipfile.is_zipfile(path):
            raise DataFileError(
                "expected a folder with ratings.dat, users.dat and movies.dat or a zip of them; ratings in other "
                "layouts are read with format='table' and a schema",
                file=str(path),
            )
        members = ("ratings.dat", "users.dat", "movies.dat")
        self.files = (path,) if self._zipped else tuple(path / name for name in members)
        for file in self.files:
            if not file.is_file():
                raise FileNotFoundError(f"{file}: MovieLens data needs ratings.dat, users.dat and movies.dat")
        with self._open("ratings.dat") as (_, _, size):
            self.size = size

    def blocks(self, bad_rows: BadRows, advanced: Advanced) -> Iterator[RawBlock]:
        """Read the ratings block by block, with the attributes of user and movie."""
        users = self._side("users.dat", _USERS)
        movies = self._side("movies.dat", _MOVIES)
        with self._open("ratings.dat") as (raw, name, _):
            for block in read_text(GuardedStream(raw, name, advanced), _DIALECT, bad_rows):
                block = _split(block, _RATINGS, bad_rows)
                frame = block.frame.join(users, on="user", how="left", maintain_order="left")
                frame = frame.join(movies, on="item", how="left", maintain_order="left")
                yield RawBlock(frame=frame, file=block.file, lines=block.lines)

    def _side(self, member: str, columns: tuple[str, ...]) -> pl.DataFrame:
        with self._open(member) as (raw, name, _):
            # A broken side file would damage many ratings: it is never skipped over.
            strict = BadRows("error")
            blocks = read_text(GuardedStream(raw, name), _DIALECT, strict)
            return pl.concat([_split(block, columns, strict).frame for block in blocks]).unique(
                columns[0], keep="first", maintain_order=True
            )

    @contextmanager
    def _open(self, member: str) -> Iterator[tuple[IO[bytes], str, int]]:
        if not self._zipped:
            file = self._path / member
            with open(file, "rb") as raw:
                yield raw, str(file), file.stat().st_size
            return
        with zipfile.ZipFile(self._path) as archive:
            found = [info for info in archive.infolist() if Path(info.filename).name == member]
            if not found:
                raise DataFileError(f"the zip holds no {member}", file=str(self._path))
            with archive.open(found[0]) as raw:
                yield raw, f"{self._path}/{found[0].filename}", found[0].file_size


def _split(block: RawBlock, columns: tuple[str, ...], bad_rows: BadRows) -> RawBlock:
    parts = block.frame.select(pl.col("line").fill_null("").str.split("::").alias("parts"))
    good = parts.select(pl.col("parts").list.len() == len(columns)).to_series()
    lines = block.lines
    if not good.all():
        row = int((~good).arg_true()[0])
        message = f"{len(parts['parts'][row])} fields where {len(columns)} are expected ({'::'.join(columns)})"
        error = MalformedRowError(message, file=block.file, line=int(lines[row]))
        bad_rows.found(error, int((~good).sum()))
        parts, lines = parts.filter(good), lines[good.to_numpy()]
    fields = (pl.col("parts").list.get(at).alias(name) for at, name in enumerate(columns))
    frame = parts.select(*fields).with_columns(pl.all().replace("", None))
    return RawBlock(frame=frame, file=block.file, lines=lines)

"""Rows and files that cannot be read: what is named, and what is skipped."""

import logging
import random
from pathlib import Path

import pytest

from lightning_embcomp.data import (
    ClickLogSchema,
    DataFileError,
    MalformedRowError,
    TextDialect,
    TruncatedFileError,
)
from lightning_embcomp.data import text as text_module

from .files import COMPRESS, NO_SPLIT, criteo_line, ready, write

GOOD = criteo_line(1, 1, "a")


@pytest.mark.parametrize(
    ("line", "column", "message"),
    [
        ("1\t2\n", None, "2 columns where 40 are expected: '1.t2'"),
        (GOOD.rstrip("\n") + "\tx\n", None, "41 columns where 40"),
        (criteo_line(1, "x"), "I1", "'x' is not a finite number"),
        (criteo_line(1, "inf"), "I1", "'inf' is not a finite number"),
        (criteo_line("x"), "label", "label 'x' is neither 0 nor 1"),
        (criteo_line(2), "label", "label '2' is neither 0 nor 1"),
        (criteo_line(""), "label", "the label is missing"),
    ],
)
def test_place_of_a_malformed_row(tmp_path: Path, line: str, column: str | None, message: str) -> None:
    file = write(tmp_path / "day.txt", GOOD * 4 + line + GOOD * 3)
    with pytest.raises(MalformedRowError, match=message) as caught:
        ready(file, split=NO_SPLIT)
    assert (caught.value.file, caught.value.line, caught.value.column) == (str(file), 5, column)
    assert str(caught.value).startswith(f"{file}: line 5")


def test_lines_are_counted_past_skipped_rows_and_over_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(text_module, "BLOCK_BYTES", 300)
    generator = random.Random(0)
    bad = sorted(generator.sample(range(1, 201), 30))
    lines = [GOOD] * 200
    for number in bad:
        lines[number - 1] = generator.choice(["1\t2\n", criteo_line(1, "x"), "\n", criteo_line(3)])
    lines[199] = GOOD
    expected = [number for number in bad if number != 200]
    data = None
    with caplog.at_level(logging.WARNING):
        data = ready(write(tmp_path / "day.txt", "".join(lines)), split=NO_SPLIT, on_bad_rows="skip")
    assert data.log.meta.skipped == len(expected)
    assert data.log.meta.rows[0] == 200 - len(expected)
    assert f"{len(expected)} malformed rows were skipped" in caplog.text

    # Mend one bad line after the other: the error always names the next one.
    for position, number in enumerate(expected[:4]):
        with pytest.raises(MalformedRowError) as caught:
            ready(write(tmp_path / f"{position}.txt", "".join(lines)), split=NO_SPLIT)
        assert caught.value.line == number
        lines[number - 1] = GOOD


def test_lines_are_counted_past_quoted_line_breaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "BLOCK_BYTES", 64)
    text = "y,c,n\n" + '1,"two\nlines",0\n' * 10 + '1,"bad\nrow"\n' + "1,x,0\n" * 10 + "1,x,oops\n"
    file = write(tmp_path / "log.csv", text)
    schema = ClickLogSchema(label="y", dense=("n",), categorical=("c",))
    with pytest.raises(MalformedRowError, match="2 columns") as caught:
        ready(file, format="table", schema=schema, split=NO_SPLIT)
    assert caught.value.line == 22
    file = write(tmp_path / "log.csv", text.replace('"bad\nrow"', '"bad\nrow",0'))
    with pytest.raises(MalformedRowError, match="oops") as caught:
        ready(file, format="table", schema=schema, split=NO_SPLIT)
    assert caught.value.line == 34


@pytest.mark.parametrize("suffix", ["gz", "xz", "zst"])
def test_truncated_stream(tmp_path: Path, suffix: str) -> None:
    generator = random.Random(0)
    lines = [
        criteo_line(index % 2, generator.getrandbits(30), f"{generator.getrandbits(64):x}") for index in range(5000)
    ]
    whole = COMPRESS[suffix]("".join(lines).encode())
    file = tmp_path / f"day.{suffix}"
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TruncatedFileError, match=r"truncated or damaged after \d+ complete rows") as caught:
        ready(file, split=NO_SPLIT)
    rows = caught.value.rows
    assert caught.value.file == str(file)
    assert rows < 5000
    if rows:
        data = ready(file, split=NO_SPLIT, max_rows=rows)
        assert data.log.meta.rows[0] == rows
        assert data.log.meta.positives[0] == rows // 2


def test_damaged_stream(tmp_path: Path) -> None:
    data = bytearray(COMPRESS["gz"]((GOOD * 50).encode()))
    data[-6] ^= 0xFF  # in the checksum: all rows can be read
    file = tmp_path / "day.gz"
    file.write_bytes(bytes(data))
    with pytest.raises(TruncatedFileError, match="CRC") as caught:
        ready(file, split=NO_SPLIT)
    assert caught.value.rows == 50


@pytest.mark.parametrize("suffix", COMPRESS)
def test_empty_file(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"day.{suffix}"
    file.write_bytes(COMPRESS[suffix](b""))
    with pytest.raises(DataFileError, match="the file is empty"):
        ready(file)


def test_nothing_but_a_header(tmp_path: Path) -> None:
    schema = ClickLogSchema(label="y", categorical=("c",))
    with pytest.raises(DataFileError, match="no readable rows"):
        ready(write(tmp_path / "log.csv", "y,c\n"), format="table", schema=schema)


def test_wrong_encoding(tmp_path: Path) -> None:
    file = tmp_path / "log.csv"
    file.write_bytes("y,c\n1,Zürich\n".encode("latin-1"))
    schema = ClickLogSchema(label="y", categorical=("c",))
    with pytest.raises(DataFileError, match="not utf-8 text .*set the encoding"):
        ready(file, format="table", schema=schema)


def test_quote_that_is_never_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "BLOCK_BYTES", 200)
    file = write(tmp_path / "log.csv", 'y,c\n1,"a\n' + "1,b\n" * 200)
    schema = ClickLogSchema(label="y", categorical=("c",), dialect=TextDialect())
    with pytest.raises(DataFileError, match="check quote"):
        ready(file, format="table", schema=schema)


def test_parquet_that_is_none(tmp_path: Path) -> None:
    file = write(tmp_path / "log.parquet", "PAR1 and no more")
    with pytest.raises(DataFileError, match="not a readable Parquet file"):
        ready(file, format="table", schema=ClickLogSchema(label="y", categorical=("c",)))


def test_nothing_is_left_behind_by_a_failed_build(tmp_path: Path) -> None:
    with pytest.raises(MalformedRowError):
        ready(write(tmp_path / "day.txt", GOOD + "x\n"), cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []

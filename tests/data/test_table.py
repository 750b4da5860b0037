"""Tables described by a schema, and side tables."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from lightning_embcomp.data import (
    ClickLogSchema,
    DataFileError,
    MalformedRowError,
    SideTable,
    Split,
    TextDialect,
)

from .files import NO_SPLIT, ready, write

SEMICOLON = TextDialect(separator=";", escape="backslash", encoding="latin-1", null_values=("", "NULL"))


def decoded(data: object, feature: str, ids: object) -> list[str | None]:
    names = [None, *data.log.values(feature).to_list()]  # type: ignore[attr-defined]
    return [names[number] for number in ids.tolist()]  # type: ignore[attr-defined]


def test_quotes_escapes_and_latin_1(tmp_path: Path) -> None:
    file = tmp_path / "log.csv"
    file.write_bytes(
        '"user";"title";"rating";"age"\r\n'
        '"1";"The \\"X\\"; or\\\\Y";"7";"20"\r\n'
        '"2";"Zürich\n(two lines)";"0";NULL\r\n'
        '"1";"";"6";"3.5"\r\n'.encode("latin-1")
    )
    schema = ClickLogSchema(
        label="rating",
        positive_from=7,
        dense=("age",),
        dense_transform="none",
        categorical=("user", "title"),
        dialect=SEMICOLON,
    )
    data = ready(file, format="table", schema=schema, split=NO_SPLIT, shuffle=False)
    dense, sparse, label = next(iter(data.train_dataloader()))
    assert decoded(data, "title", sparse["title"].values()) == ['The "X"; or\\Y', "Zürich\n(two lines)", None]
    assert decoded(data, "user", sparse["user"].values()) == ["1", "2", "1"]
    assert label.tolist() == [1, 0, 0]
    np.testing.assert_array_equal(dense[:, 0], np.array([20, 0, 3.5], dtype=np.float32))


def test_side_tables(tmp_path: Path) -> None:
    log = write(tmp_path / "log.csv", "click,user,page\n1,u1,p1\n0,u2,p1\n1,u3,p2\n")
    users = write(tmp_path / "users.csv", "id;city\nu1;Rome\nu3;Oslo\n")
    pages = tmp_path / "pages.parquet"
    pl.DataFrame({"page": ["p1", "p2"], "tags": [["x", "y"], []], "size": [3, 8]}).write_parquet(pages)
    schema = ClickLogSchema(
        label="click",
        categorical=("user", "city"),
        multi_valued={"tags": "|"},
        dense=("size",),
        dense_transform="none",
        side=(
            SideTable(path=str(users), key="id", on="user", columns=("city",), dialect=TextDialect(separator=";")),
            SideTable(path=str(pages), key="page", columns=("tags", "size")),
        ),
    )
    data = ready(log, format="table", schema=schema, split=NO_SPLIT, shuffle=False)
    dense, sparse, _ = next(iter(data.train_dataloader()))
    assert decoded(data, "city", sparse["city"].values()) == ["Rome", None, "Oslo"]
    assert sparse["tags"].lengths().tolist() == [2, 2, 0]
    assert dense[:, 0].tolist() == [3, 3, 8]


def test_side_table_with_a_repeated_key(tmp_path: Path) -> None:
    log = write(tmp_path / "log.csv", "click,user\n1,u1\n")
    users = write(tmp_path / "users.csv", "user,city\nu1,Rome\nu1,Oslo\n")
    side = SideTable(path=str(users), key="user", columns=("city",))
    schema = ClickLogSchema(label="click", categorical=("user", "city"), side=(side,))
    with pytest.raises(DataFileError, match=r"users\.csv: key 'user' is not unique: 'u1'"):
        ready(log, format="table", schema=schema)


def test_parquet(tmp_path: Path) -> None:
    file = tmp_path / "log.parquet"
    pl.DataFrame(
        {"y": [1, 0, 1], "user": [7, 9, 7], "tags": [["a"], None, ["b", "a"]], "x": [0.5, None, 2.0], "unused": "?"}
    ).write_parquet(file)
    schema = ClickLogSchema(
        label="y", dense=("x",), dense_transform="none", categorical=("user",), multi_valued={"tags": "|"}
    )
    data = ready(file, format="table", schema=schema, split=NO_SPLIT, shuffle=False)
    dense, sparse, label = next(iter(data.train_dataloader()))
    assert dense[:, 0].tolist() == [0.5, 0, 2] and label.tolist() == [1, 0, 1]
    assert decoded(data, "user", sparse["user"].values()) == ["7", "9", "7"]
    assert sparse["tags"].lengths().tolist() == [1, 0, 2]
    assert decoded(data, "tags", sparse["tags"].values()) == ["a", "b", "a"]


def test_dates_and_numbers_order_rows(tmp_path: Path) -> None:
    schema = ClickLogSchema(label="y", categorical=("c",), timestamp="when")
    for index, times in enumerate((["2024-03-01", "2024-01-31", "2024-02-01 10:00:00"], ["30", "1.5", "4e0"])):
        rows = "".join(f"{number % 2},{number},{time}\n" for number, time in enumerate(times))
        file = write(tmp_path / f"{index}.csv", "y,c,when\n" + rows)
        data = ready(file, format="table", schema=schema, split=NO_SPLIT, shuffle=False)
        _, sparse, _ = next(iter(data.train_dataloader()))
        assert decoded(data, "c", sparse["c"].values()) == ["1", "2", "0"]


def test_timestamp_that_is_none(tmp_path: Path) -> None:
    schema = ClickLogSchema(label="y", categorical=("c",), timestamp="when")
    file = write(tmp_path / "log.csv", "y,c,when\n0,a,2024-01-31\n0,a,soon\n")
    with pytest.raises(MalformedRowError, match="line 3, column 'when': timestamp 'soon'"):
        ready(file, format="table", schema=schema, split=NO_SPLIT)


def test_column_that_is_not_there(tmp_path: Path) -> None:
    file = write(tmp_path / "log.csv", "y,c\n0,a\n")
    with pytest.raises(DataFileError, match=r"\['d'\] of the schema are not in the file, which has \['y', 'c'\]"):
        ready(file, format="table", schema=ClickLogSchema(label="y", categorical=("c", "d")))


def test_file_without_header(tmp_path: Path) -> None:
    file = write(tmp_path / "log.csv", "0,a\n1,b\n")
    dialect = TextDialect(has_header=False, columns=("y", "c"))
    schema = ClickLogSchema(label="y", categorical=("c",), dialect=dialect)
    assert ready(file, format="table", schema=schema, split=NO_SPLIT).log.meta.positives == (1, 0, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"categorical": ()}, "names no categorical column"),
        ({"categorical": ("a", "a")}, r"more than once.*\['a'\]"),
        ({"categorical": ("y",)}, "leak the label"),
        ({"categorical": ("a.b",)}, "dot"),
        ({"categorical": ("a",), "multi_valued": {"b": ""}}, "'b' needs a separator"),
    ],
)
def test_schema_is_checked(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClickLogSchema(label="y", **settings)  # type: ignore[arg-type]


def test_dialect_and_split_are_checked() -> None:
    with pytest.raises(ValueError, match="exactly when has_header is false"):
        TextDialect(has_header=False)
    with pytest.raises(ValueError, match="one character"):
        TextDialect(separator="::")
    with pytest.raises(ValueError, match="no effect on a chronological split"):
        Split(seed=1)

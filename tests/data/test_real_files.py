"""Real files, where they are at hand: the first rows of each."""

from pathlib import Path

import pytest

from lightning_embcomp.data import ClickLogSchema, SideTable, TextDialect

from .files import ready

BX = TextDialect(separator=";", escape="backslash", encoding="latin-1", null_values=("", "NULL"))


def present(*files: Path) -> None:
    for file in files:
        if not file.exists():
            pytest.skip(f"{file} is not there")


def test_criteo(real_data: Path, tmp_path: Path) -> None:
    file = real_data / "criteo_kaggle_80k" / "train_first80k.hashed.txt.xz"
    present(file)
    data = ready(file, cache_dir=tmp_path, max_rows=5000)
    assert data.log.meta.rows == (4000, 500, 500) and data.num_dense == 13 and len(data.features) == 26
    assert 0.15 < data.base_rate < 0.3
    for feature in data.features:
        counts = data.id_counts(feature.name)
        assert len(counts) == feature.num_embeddings and int(counts.sum()) == 4000
        assert bool((counts[1:-1] >= counts[2:]).all())


def test_avazu(real_data: Path, tmp_path: Path) -> None:
    file = real_data / "avazu_samples" / "train.first10k.csv.xz"
    present(file)
    data = ready(file, format="avazu", cache_dir=tmp_path)
    assert sum(data.log.meta.rows) == 9999 and data.num_dense == 0
    assert sum(data.log.meta.positives) / 9999 == pytest.approx(0.171, abs=0.005)


def test_movielens(real_data: Path, tmp_path: Path) -> None:
    file = real_data / "movielens_1m" / "ml-1m.zip"
    present(file)
    data = ready(file, format="movielens", cache_dir=tmp_path, max_rows=20_000)
    assert sum(data.log.meta.rows) == 20_000
    assert set(data.log.values("gender")) == {"F", "M"} and len(data.log.values("genres")) == 18
    _, sparse, _ = next(iter(data.train_dataloader()))
    assert 1 <= int(sparse["genres"].lengths().min())


def test_libfm(real_data: Path, tmp_path: Path) -> None:
    file = real_data / "frappe" / "frappe.test.libfm.xz"
    present(file)
    data = ready(file, format="libfm", cache_dir=tmp_path)
    assert sum(data.log.meta.rows) == 28_860 and len(data.features) == 10
    assert sum(data.log.meta.positives) / 28_860 == pytest.approx(1 / 3, abs=0.01)


def test_book_crossing(real_data: Path, tmp_path: Path) -> None:
    folder = real_data / "book_crossing"
    ratings, users = folder / "BX-Book-Ratings.csv.xz", folder / "BX-Users.csv.xz"
    present(ratings, users)
    schema = ClickLogSchema(
        label="Book-Rating",
        positive_from=1,
        dense=("Age",),
        categorical=("User-ID", "ISBN", "Location"),
        dialect=BX,
        side=(SideTable(path=str(users), key="User-ID", columns=("Location", "Age")),),
    )
    data = ready(ratings, format="table", schema=schema, cache_dir=tmp_path, max_rows=20_000)
    assert sum(data.log.meta.rows) == 20_000
    assert data.log.values("Location")[0].count(",") == 2
    assert int(data.id_counts("Location")[0]) == 0  # every user is in the side file


def test_flights(real_data: Path, tmp_path: Path) -> None:
    file = real_data / "us_flights_2024_01" / "flights.csv.xz"
    present(file)
    schema = ClickLogSchema(
        label="ArrDel15",
        dense=("Distance", "CRSElapsedTime"),
        categorical=("Tail_Number", "Origin", "Dest", "OriginCityName"),
        timestamp="FlightDate",
    )
    data = ready(file, format="table", schema=schema, cache_dir=tmp_path, max_rows=20_000, on_bad_rows="skip")
    assert sum(data.log.meta.rows) == 20_000 and data.log.meta.skipped > 0  # cancelled flights have no label
    assert any("," in city for city in data.log.values("OriginCityName"))

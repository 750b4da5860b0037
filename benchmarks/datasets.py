"""The real click logs of the quality benchmarks, each with its split and batch size.

Files are read from the folder named by ``EMBCOMP_DATA``, by default ``../shared/data`` beside the repository.
"""

from __future__ import annotations

import os
from pathlib import Path

from lightning_embcomp.data import ClickLogDataModule, ClickLogSchema, SideTable, Split, TextDialect

REPOSITORY = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("EMBCOMP_DATA", REPOSITORY.parent / "shared" / "data"))
CACHE = Path(os.environ.get("EMBCOMP_CACHE", Path.home() / ".cache" / "embcomp-benchmarks"))


def criteo_80k(seed: int) -> ClickLogDataModule:
    """Criteo display advertising, first 80 000 rows: 52 000 / 8 000 / 20 000 in time order."""
    return ClickLogDataModule(
        path=str(DATA / "criteo_kaggle_80k" / "train_first80k.hashed.txt.xz"),
        format="criteo",
        batch_size=256,
        split=Split(kind="chronological", validation=0.1, test=0.25),
        cache_dir=str(CACHE),
        seed=seed,
    )


def book_crossing(seed: int) -> ClickLogDataModule:
    """Book-Crossing, explicit against implicit ratings: 80 / 10 / 10 at random."""
    folder = DATA / "book_crossing"
    schema = ClickLogSchema(
        label="Book-Rating",
        positive_from=1,
        categorical=("User-ID", "ISBN", "Location", "Book-Author", "Publisher"),
        dialect=TextDialect(separator=";", quote='"', escape="backslash", encoding="latin-1"),
        side=(
            SideTable(path=str(folder / "BX-Users.csv.xz"), key="User-ID", columns=("Location",)),
            SideTable(path=str(folder / "BX-Books.noimg.csv.xz"), key="ISBN", columns=("Book-Author", "Publisher")),
        ),
    )
    return ClickLogDataModule(
        path=str(folder / "BX-Book-Ratings.csv.xz"),
        format="table",
        schema=schema,
        batch_size=2048,
        split=Split(kind="random", validation=0.1, test=0.1),
        cache_dir=str(CACHE),
        seed=seed,
    )


def movielens_1m(seed: int) -> ClickLogDataModule:
    """MovieLens-1M, ratings of 4 and 5 against the rest: 80 / 10 / 10 at random."""
    return ClickLogDataModule(
        path=str(DATA / "movielens_1m" / "ml-1m.zip"),
        format="movielens",
        batch_size=2048,
        split=Split(kind="random", validation=0.1, test=0.1),
        cache_dir=str(CACHE),
        seed=seed,
    )


def us_flights(seed: int) -> ClickLogDataModule:
    """US flights of January 2024, arrival at least 15 minutes late: 80 / 10 / 10 at random.

    Only what is known before departure is an input. Cancelled and diverted flights have no label and are left out.
    """
    schema = ClickLogSchema(
        label="ArrDel15",
        dense=("Distance", "CRSElapsedTime"),
        categorical=(
            "Marketing_Airline_Network",
            "Operating_Airline",
            "Flight_Number_Operating_Airline",
            "Tail_Number",
            "Origin",
            "Dest",
            "FlightDate",
            "DayOfWeek",
            "CRSDepTime",
            "DepTimeBlk",
            "ArrTimeBlk",
        ),
    )
    return ClickLogDataModule(
        path=str(DATA / "us_flights_2024_01" / "flights.csv.xz"),
        format="table",
        schema=schema,
        batch_size=2048,
        split=Split(kind="random", validation=0.1, test=0.1),
        on_bad_rows="skip",
        cache_dir=str(CACHE),
        seed=seed,
    )


DATASETS = {
    "criteo_80k": criteo_80k,
    "book_crossing": book_crossing,
    "movielens_1m": movielens_1m,
    "us_flights": us_flights,
}

"""Readers of the known formats, on tiny files."""

import zipfile
from pathlib import Path

import numpy as np
import pytest

from lightning_embcomp.data import ClickLogSchema, DataFileError, MalformedRowError

from .files import COMPRESS, NO_SPLIT, criteo_line, ready, write

CRITEO = criteo_line(1, 3, "a") + criteo_line(0, "", "b") + criteo_line(0, -1, "b") + criteo_line(1, 0, "")


@pytest.mark.parametrize("suffix", COMPRESS)
def test_criteo(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"train.{suffix}"
    file.write_bytes(COMPRESS[suffix](CRITEO.encode()))
    data = ready(file, split=NO_SPLIT, shuffle=False)
    (dense, sparse, label) = next(iter(data.train_dataloader()))
    assert data.num_dense == 13 and [feature.name for feature in data.features][::25] == ["C1", "C26"]
    np.testing.assert_allclose(dense[:, 0], [np.log(4), 0, -np.log(2), 0], rtol=1e-6)
    assert not dense[:, 1:].any()
    assert sparse["C1"].values().tolist() == [2, 1, 1, 0]
    assert not sparse["C2"].values().any()
    assert label.tolist() == [1, 0, 0, 1] and data.base_rate == 0.5
    assert data.id_counts("C1").tolist() == [1, 2, 1]
    assert data.log.values("C1").to_list() == ["b", "a"]


def test_compression_is_known_by_content_not_by_name(tmp_path: Path) -> None:
    file = tmp_path / "train.txt"
    file.write_bytes(COMPRESS["xz"](CRITEO.encode()))
    assert ready(file, split=NO_SPLIT).log.meta.rows == (4, 0, 0)


def test_several_files_in_order(tmp_path: Path) -> None:
    first = write(tmp_path / "day_0", criteo_line(1, 1) + criteo_line(1, 2))
    second = write(tmp_path / "day_1", criteo_line(0, 3))
    for path in ([first, second], tmp_path / "day_*", tmp_path):
        data = ready(path, split=NO_SPLIT, shuffle=False, cache_dir=tmp_path / "cache")
        dense, _, _ = next(iter(data.train_dataloader()))
        np.testing.assert_allclose(np.expm1(dense[:, 0].numpy()), [1, 2, 3], rtol=1e-6)
    assert ready([second, first], split=NO_SPLIT).log.meta.rows == (3, 0, 0)


def test_missing_final_newline_crlf_and_blank_end(tmp_path: Path) -> None:
    lines = [criteo_line(1, 1, "a").rstrip("\n"), criteo_line(0, 2, "b").rstrip("\n")]
    for index, text in enumerate(("\n".join(lines), "\r\n".join(lines) + "\r\n", "\n".join(lines) + "\n\n\n")):
        assert ready(write(tmp_path / f"{index}.txt", text), split=NO_SPLIT).log.meta.rows == (2, 0, 0)


AVAZU_HEADER = (
    "id,click,hour,C1,banner_pos,site_id,site_domain,site_category,app_id,app_domain,app_category,device_id,"
    "device_ip,device_model,device_type,device_conn_type,C14,C15,C16,C17,C18,C19,C20,C21\n"
)


def avazu_line(click: int, hour: str, site: str) -> str:
    return ",".join(["7", str(click), hour, "1005", "0", site, *["x"] * 18]) + "\n"


def test_avazu(tmp_path: Path) -> None:
    text = AVAZU_HEADER + "".join(
        [avazu_line(1, "14102101", "late"), avazu_line(0, "14102023", "b"), avazu_line(1, "14102100", "a")]
    )
    data = ready(write(tmp_path / "train.csv", text), format="avazu", split=NO_SPLIT, shuffle=False)
    dense, sparse, label = next(iter(data.train_dataloader()))
    assert dense.shape == (3, 0) and data.num_dense == 0
    assert "id" not in sparse.keys() and "hour" not in sparse.keys() and len(sparse.keys()) == 22  # noqa: SIM118
    assert label.tolist() == [0, 1, 1]  # by hour
    names = data.log.values("site_id").to_list()
    assert [names[number - 1] for number in sparse["site_id"].values()] == ["b", "a", "late"]
    assert sorted(data.log.values("hour_of_day").to_list()) == ["00", "01", "23"]


def test_avazu_with_other_columns(tmp_path: Path) -> None:
    file = write(tmp_path / "train.csv", "click,hour\n1,14102100\n")
    with pytest.raises(DataFileError, match="lacks Avazu's columns .*'C1'.*format='table'"):
        ready(file, format="avazu")


MOVIELENS = {
    "ratings.dat": "1::10::5::30\n2::11::3::10\n1::11::4::20\n3::10::1::40\n",
    "users.dat": "1::F::1::10::48067\n2::M::56::16::70072\n",
    "movies.dat": "10::Amélie (2001)::Comedy|Romance\n11::Jumanji (1995)::Comedy\n",
}


@pytest.mark.parametrize("zipped", [False, True])
def test_movielens(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "ml-1m"
    path.mkdir()
    for name, text in MOVIELENS.items():
        (path / name).write_bytes(text.encode("latin-1"))
    if zipped:
        with zipfile.ZipFile(tmp_path / "ml-1m.zip", "w") as archive:
            for name in MOVIELENS:
                archive.write(path / name, f"ml-1m/{name}")
        path = tmp_path / "ml-1m.zip"
    data = ready(path, format="movielens", split=NO_SPLIT, shuffle=False)
    _, sparse, label = next(iter(data.train_dataloader()))
    assert label.tolist() == [0, 1, 1, 0]  # in time order; positive from 4 on
    assert data.features[-1].multi_valued
    assert sparse["genres"].lengths().tolist() == [1, 1, 2, 2]
    assert data.log.values("genres").to_list() == ["Comedy", "Romance"]
    assert sparse["genres"].values().tolist() == [1, 1, 1, 2, 1, 2]
    assert data.log.values("gender").to_list() == ["F", "M"]
    assert sparse["gender"].values().tolist() == [2, 1, 1, 0]  # user 3 has no attributes


def test_movielens_needs_all_files(tmp_path: Path) -> None:
    write(tmp_path / "ratings.dat", MOVIELENS["ratings.dat"])
    with pytest.raises(FileNotFoundError, match=r"users\.dat"):
        ready(tmp_path, format="movielens")


def test_movielens_malformed_line(tmp_path: Path) -> None:
    for name, text in MOVIELENS.items():
        (tmp_path / name).write_bytes(text.encode("latin-1"))
    write(tmp_path / "ratings.dat", "1::10::5::30\n1::10::5\n")
    with pytest.raises(MalformedRowError, match="line 2: 3 fields where 4 are expected"):
        ready(tmp_path, format="movielens", split=NO_SPLIT)


def test_libfm_by_position(tmp_path: Path) -> None:
    file = write(tmp_path / "train.libfm", "1 3:1 7:1\n-1 4:1 7:1.0\n0 3:1 8:1 \n")
    data = ready(file, format="libfm", split=NO_SPLIT, shuffle=False)
    _, sparse, label = next(iter(data.train_dataloader()))
    assert sparse.keys() == ["field_0", "field_1"]
    assert sparse["field_0"].values().tolist() == [1, 2, 1]
    assert data.log.values("field_1").to_list() == ["7", "8"]
    assert label.tolist() == [1, 0, 0]


def test_libfm_of_different_lengths(tmp_path: Path) -> None:
    file = write(tmp_path / "train.libfm", "1 3:1 7:1\n-1 7:1\n")
    with pytest.raises(MalformedRowError, match="line 2: 1 features where the first row.*multi_valued"):
        ready(file, format="libfm", split=NO_SPLIT)
    bag = ClickLogSchema(label="label", multi_valued={"features": " "})
    data = ready(file, format="libfm", schema=bag, split=NO_SPLIT, shuffle=False)
    _, sparse, _ = next(iter(data.train_dataloader()))
    assert sparse["features"].lengths().tolist() == [2, 1]
    assert sparse["features"].values().tolist() == [2, 1, 1]


def test_libfm_with_weights_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "train.libfm", "1 3:1 7:1\n-1 3:1 7:0.5\n")
    with pytest.raises(MalformedRowError, match="line 2: '7:0.5' is not of the form index:1"):
        ready(file, format="libfm", split=NO_SPLIT)


def test_fixed_schema_is_not_overridden(tmp_path: Path) -> None:
    schema = ClickLogSchema(label="click", categorical=("site",))
    with pytest.raises(ValueError, match="'criteo' has a fixed schema"):
        ready(write(tmp_path / "a.txt", CRITEO), schema=schema)
    with pytest.raises(ValueError, match="needs a schema"):
        ready(tmp_path / "a.txt", format="table")
    with pytest.raises(FileNotFoundError, match=r"b\.txt: no such data file"):
        ready(tmp_path / "b.txt")

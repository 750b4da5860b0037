"""When the encoded form is used again, and where it is kept."""

import os
from pathlib import Path

import pytest

from lightning_embcomp.data import ClickLogDataModule, Split
from lightning_embcomp.data import datamodule as datamodule_module

from .files import NO_SPLIT, criteo_line, ready, write


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that have been built."""
    done = []
    build = datamodule_module.build

    def counted(*args: object) -> Path:
        done.append(build(*args))  # type: ignore[arg-type]
        return done[-1]

    monkeypatch.setattr(datamodule_module, "build", counted)
    return done


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return write(tmp_path / "data" / "day.txt", "".join(criteo_line(index % 2, index) for index in range(20)))


def test_built_once_beside_the_data(file: Path, builds: list[Path]) -> None:
    for _ in range(2):
        assert ready(file).log.meta.rows == (16, 2, 2)
    assert len(builds) == 1
    assert builds[0].parent == file.parent / ".embcomp_cache"


def test_loading_settings_do_not_build(file: Path, builds: list[Path]) -> None:
    ready(file)
    ready(file, batch_size=3, seed=4, shuffle=False)
    assert len(builds) == 1


@pytest.mark.parametrize(
    "settings",
    [{"min_count": 2}, {"split": Split(kind="random")}, {"split": Split(test=0.2)}, {"max_rows": 15}],
)
def test_other_settings_build_anew(file: Path, builds: list[Path], settings: dict[str, object]) -> None:
    ready(file)
    ready(file, **settings)
    ready(file, **settings)
    assert len(builds) == 2


def test_changed_file_builds_anew(file: Path, builds: list[Path]) -> None:
    ready(file)
    before = file.stat()
    write(file, file.read_text().replace("\t7\t", "\t8\t", 1))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # same size, same time: told by the content
    ready(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    ready(file)
    assert len(builds) == 3


def test_read_only_data_folder(file: Path, builds: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    mkdir = Path.mkdir

    def refuse(self: Path, *args: object, **kwargs: object) -> None:
        if file.parent in self.parents:
            raise PermissionError(30, "Read-only file system")
        mkdir(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "mkdir", refuse)
    ready(file)
    ready(file)
    assert [folder.parent for folder in builds] == [tmp_path / "home" / "lightning_embcomp" / "data"]
    assert [entry.name for entry in file.parent.iterdir()] == ["day.txt"]


def test_cache_dir(file: Path, builds: list[Path], tmp_path: Path) -> None:
    ready(file, cache_dir=tmp_path / "elsewhere")
    assert builds[0].parent == tmp_path / "elsewhere"
    write(tmp_path / "a_file", "")
    with pytest.raises(PermissionError, match="a_file.*set cache_dir"):
        ready(file, cache_dir=tmp_path / "a_file" / "cache")


def test_unfinished_build_is_not_used(file: Path, builds: list[Path]) -> None:
    ready(file)
    (builds[0] / "meta.json").rename(builds[0] / "meta.json.part")
    data = ClickLogDataModule(file)
    with pytest.raises(FileNotFoundError, match="call prepare_data"):
        data.setup("fit")


def test_build_that_another_process_finished_first(file: Path, builds: list[Path]) -> None:
    ready(file)
    data = ClickLogDataModule(file, split=Split())
    reader = data._reader()
    again = datamodule_module.build(reader, data._settings, builds[0].parent)
    assert again == builds[0] and [entry.name for entry in again.parent.iterdir()] == [again.name]


def test_use_before_setup(file: Path) -> None:
    data = ClickLogDataModule(file, split=NO_SPLIT)
    with pytest.raises(RuntimeError, match="prepare_data"):
        _ = data.features

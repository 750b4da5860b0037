"""Every way in which a directory can be damaged gives an error that says which file, and what to do."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_embcomp.checkpoints import CheckpointError, CheckpointReader, read_common, read_rank, save_checkpoint
from lightning_embcomp.checkpoints.metadata import read_metadata


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 5)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


def edit(**changes: object) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def forget(name: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        record = json.loads(path.read_text())
        del record["files"][name]
        path.write_text(json.dumps(record))

    return change


def export(path: Path) -> None:
    path.write_text('{"schema": 1}')


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("manifest.json", Path.unlink, "has no manifest.json"),
        ("manifest.json", truncate, "manifest.json: the manifest is damaged"),
        ("manifest.json", edit(version=2), "format version 2; .* up to 1: update"),
        ("manifest.json", edit(files={}), r"manifest.json: the manifest is damaged: it does not list \.metadata"),
        ("manifest.json", edit(files=None), "manifest.json: the manifest is damaged"),
        ("manifest.json", edit(files={"a": {"size": 1}}), "manifest.json: the manifest is damaged"),
        ("manifest.json", edit(world_size=0), "manifest.json: the manifest is damaged"),
        ("manifest.json", edit(world_size=2), r"does not list rank_1\.pt"),
        ("manifest.json", forget("__0_0.distcp"), "does not list __0_0.distcp"),
        ("manifest.json", export, "something else than a checkpoint"),
        ("common.pt", Path.unlink, "common.pt: the file is missing; copy"),
        ("common.pt", truncate, "common.pt: the file is truncated"),
        ("common.pt", flip, "common.pt: the checksum is wrong"),
        ("rank_0.pt", Path.unlink, "rank_0.pt: the file is missing"),
        ("rank_0.pt", flip, "rank_0.pt: the checksum is wrong"),
        (".metadata", Path.unlink, r"\.metadata: the file is missing"),
        (".metadata", flip, r"\.metadata: the checksum is wrong"),
        ("__0_0.distcp", Path.unlink, "__0_0.distcp: the file is missing"),
        ("__0_0.distcp", truncate, "__0_0.distcp: the file is truncated: it has .* copy the whole directory"),
    ],
)
def test_damage(name: str, damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    path = tmp_path / "c"
    save_checkpoint(path, tensors={"t": torch.ones(100)}, common={"epoch": 1}, per_rank={"rng": 2})
    damage(path / name)
    with pytest.raises(CheckpointError, match=message):
        read_common(path)
        read_rank(path, 0)
        CheckpointReader(path)


def test_damage_while_it_is_read(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", tensors={"t": torch.ones(100)}, common={}, per_rank={})
    reader = CheckpointReader(tmp_path / "c")
    shutil.rmtree(tmp_path / "c")
    with pytest.raises(CheckpointError, match="__0_0.distcp: reading 't' failed .* replaced meanwhile"):
        reader.read_into({"t": torch.zeros(100)})


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such checkpoint: check the path"):
        read_common(tmp_path / "c")
    (tmp_path / "c").write_text("a plain checkpoint")
    with pytest.raises(CheckpointError, match="this is a file"):
        read_common(tmp_path / "c")


class Command:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("made_by_a_pickle",)


def test_metadata_that_runs_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Command()))
    with pytest.raises(CheckpointError, match="it names posix.mkdir"):
        read_metadata(tmp_path / ".metadata")
    (tmp_path / ".metadata").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointError, match="not the metadata of a checkpoint"):
        read_metadata(tmp_path / ".metadata")
    assert os.listdir(tmp_path) == [".metadata"]

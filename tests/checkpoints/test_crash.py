"""A save that stops anywhere leaves the old checkpoint or the new one, and the next save cleans up."""

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_embcomp.checkpoints import (
    CheckpointError,
    CheckpointReader,
    CheckpointSaveError,
    directory,
    is_checkpoint,
    read_common,
    remove_checkpoint,
    save_checkpoint,
)


class Crash(BaseException):
    """The process is gone: from here on it changes nothing on the disk."""


def save(path: Path, epoch: int) -> None:
    tensors = {"t": torch.full((4,), float(epoch))}
    save_checkpoint(path, tensors=tensors, common={"epoch": epoch}, per_rank={})


def epoch_of(path: Path) -> int:
    """The epoch that all files agree on."""
    found = torch.zeros(4)
    CheckpointReader(path).read_into({"t": found})
    epoch = read_common(path)["epoch"]
    assert torch.equal(found, torch.full((4,), float(epoch)))
    return epoch


def crash_at(monkeypatch: pytest.MonkeyPatch, step: int) -> list[str]:
    """Let the process die before the given change of the disk; returns what was done."""
    done: list[str] = []

    def patch(place: Any, name: str) -> None:
        original = getattr(place, name)

        def change(*args: Any, **kwargs: Any) -> Any:
            # Python's own file handling opens with flags; what only reads changes nothing.
            if name == "open" and not args[1] & (os.O_WRONLY | os.O_RDWR):
                return original(*args, **kwargs)
            if len(done) >= step:
                raise Crash
            done.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(place, name, change)

    for name in ("rename", "mkdir", "fsync", "unlink", "rmdir", "open"):
        patch(os, name)
    patch(torch, "save")
    patch(Path, "write_text")
    return done


def test_a_crash_anywhere(tmp_path: Path) -> None:
    outcomes = []
    for step in range(100):
        path = tmp_path / str(step) / "last.ckpt"
        save(path, 1)
        with pytest.MonkeyPatch.context() as monkeypatch:
            done = crash_at(monkeypatch, step)
            try:
                save(path, 2)
                finished = True
            except Crash:
                finished = False
        assert is_checkpoint(path)
        found = epoch_of(path)
        outcomes.append((found, path.exists(), len(os.listdir(path.parent))))
        save(path, 3)
        assert epoch_of(path) == 3 and os.listdir(path.parent) == ["last.ckpt"], done
        if finished:
            break
    assert finished and outcomes[-1] == (2, True, 1)
    # All that can be: the old one beside what was written so far; between the renames; and what was not deleted yet.
    assert {(1, True, 1), (1, True, 2), (1, False, 2), (2, True, 2)} <= set(outcomes)
    assert [found for found, _, _ in outcomes] == sorted(found for found, _, _ in outcomes)


def test_a_crash_while_removing(tmp_path: Path) -> None:
    """What is half deleted is no checkpoint any more, and in nobody's way."""
    found = set()
    for step in range(100):
        path = tmp_path / str(step) / "last.ckpt"
        save(path, 1)
        with pytest.MonkeyPatch.context() as monkeypatch:
            crash_at(monkeypatch, step)
            try:
                remove_checkpoint(path)
                finished = True
            except Crash:
                finished = False
        whole = is_checkpoint(path)
        assert not whole or epoch_of(path) == 1
        found.add((whole, finished))
        save(path, 2)
        assert epoch_of(path) == 2 and os.listdir(path.parent) == ["last.ckpt"]
        if finished:
            break
    assert found == {(True, False), (False, False), (False, True)}


def test_first_save_interrupted(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(Crash):
        crash_at(monkeypatch, 5)
        save(path, 1)
    assert os.listdir(tmp_path) and not is_checkpoint(path)
    with pytest.raises(CheckpointError, match="the first save under this name was interrupted"):
        read_common(path)


def test_recovery_is_said_and_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "last.ckpt"
    save(path, 1)
    path.rename(tmp_path / ".last.ckpt.previous")
    (tmp_path / "link.ckpt").symlink_to("last.ckpt")
    with caplog.at_level(logging.WARNING):
        assert epoch_of(path) == 1
        assert epoch_of(tmp_path / "link.ckpt") == 1
    assert "interrupted while it replaced this checkpoint" in caplog.text
    remove_checkpoint(path)
    assert not is_checkpoint(path) and os.listdir(tmp_path) == ["link.ckpt"]


def leftover(folder: Path, name: str) -> Path:
    """What a save that died halfway leaves; with a manifest, so that only its name tells."""
    place = folder / name
    save(folder / "made.ckpt", 1)
    shutil.move(folder / "made.ckpt", place)
    return place


def test_leftovers_of_dead_runs(tmp_path: Path) -> None:
    host = directory._owner().split("-")[0]
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    dead = [
        leftover(tmp_path, f".epoch=1.ckpt.partial-{host}-{ended.pid}"),
        leftover(tmp_path, f".last.ckpt.removed-{host}-{ended.pid}"),
        leftover(tmp_path, f".last.ckpt.partial-00000000-{os.getpid()}"),
    ]
    os.utime(dead[2], (0, 0))
    kept = [
        leftover(tmp_path, f".epoch=2.ckpt.partial-{host}-{os.getppid()}"),
        leftover(tmp_path, ".epoch=2.ckpt.partial-00000000-1"),
        leftover(tmp_path, ".mine.partial-work"),
    ]
    assert not is_checkpoint(tmp_path / "last.ckpt")
    save(tmp_path / "last.ckpt", 2)
    assert sorted(os.listdir(tmp_path)) == sorted(["last.ckpt", *(place.name for place in kept)])


def test_what_may_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "file.ckpt").write_text("a plain checkpoint")
    (tmp_path / "empty").mkdir()
    save(tmp_path / "a.ckpt", 1)
    (tmp_path / "link.ckpt").symlink_to("a.ckpt")
    for name in ("file.ckpt", "empty", "link.ckpt"):
        save(tmp_path / name, 2)
        assert epoch_of(tmp_path / name) == 2
    assert epoch_of(tmp_path / "a.ckpt") == 1 and not (tmp_path / "link.ckpt").is_symlink()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "manifest.json").write_text('{"schema": 1}')
    with pytest.raises(CheckpointSaveError, match="notes: the directory holds other things than a checkpoint"):
        save(tmp_path / "notes", 3)
    with pytest.raises(CheckpointSaveError, match="choose a path on one"):
        save_checkpoint("s3://bucket/last.ckpt", tensors={}, common={}, per_rank={})
    assert len(os.listdir(tmp_path)) == 5


def test_the_new_one_cannot_be_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, rename = tmp_path / "last.ckpt", os.rename
    save(path, 1)

    def refuse(source: Any, target: Any) -> None:
        if Path(source).name.startswith(".last.ckpt.partial-"):
            raise OSError("not now")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(CheckpointSaveError, match="rank 0 on .*: OSError: not now.*is as it was"):
        save(path, 2)
    assert epoch_of(path) == 1 and os.listdir(tmp_path) == ["last.ckpt"]

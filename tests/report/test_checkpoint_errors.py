"""Files that are no checkpoint, or not a whole one: one line, exit status 2, no traceback."""

from __future__ import annotations

import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_embcomp import cli
from lightning_embcomp.engine.layout import LogicalTable
from lightning_embcomp.engine.plan import FixedPlan
from lightning_embcomp.engine.routed import RoutedEmbeddings
from lightning_embcomp.report import CheckpointError, read_report


class Foreign:
    """An object that is not read from files."""


def state() -> dict[str, Any]:
    engine = RoutedEmbeddings([LogicalTable(name="t", rows=100, dim=8, chunks=2)])
    engine.move(FixedPlan([1]))
    return {f"bags.engine.{key}": value for key, value in engine.state_dict().items()}


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.ckpt"
    torch.save({"state_dict": state(), "optimizer_states": []}, path)
    assert read_report(path).total.weights == 100 * 4 * 4
    return path


def write_text(path: Path) -> None:
    path.write_text("label,user\n1,a\n")


def write_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "a")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "there is no such file"),
        (lambda path: path.mkdir(), "this is a folder"),
        (lambda path: path.touch(), "the file is empty"),
        (write_text, "this is no checkpoint"),
        (write_zip, "the file is damaged"),
        (lambda path: torch.save({"state_dict": Foreign()}, path), "Python objects that are not read from files"),
        (lambda path: torch.save(torch.ones(3), path), "it has no state_dict"),
        (lambda path: torch.save({"state_dict": {3: torch.ones(1)}}, path), "it has no state_dict"),
        (lambda path: torch.save({"state_dict": {"top.weight": torch.ones(3, 3)}}, path), "no embedding table"),
    ],
)
def test_other_files_are_refused(
    tmp_path: Path, write: Callable[[Path], Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "file.ckpt"
    write(path)
    with pytest.raises(SystemExit) as stop:
        cli.main(["report", str(path)])
    said = capsys.readouterr()
    assert stop.value.code == 2
    assert message in said.err and "file.ckpt" in said.err
    assert said.out == "" and said.err.count("\n") == 1


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, 0.999])
def test_truncated_files_are_refused(good: Path, kept: float) -> None:
    data = good.read_bytes()
    good.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(CheckpointError, match="truncated"):
        read_report(good)


def test_damaged_files_never_fail_otherwise(good: Path) -> None:
    data = good.read_bytes()
    rng, refused = random.Random(0), 0
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(4):
            damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        good.write_bytes(damaged)
        try:
            read_report(good)
        except CheckpointError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 10


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rows.1.weight", torch.zeros(99, 4), r"rows\.1\.weight has shape \(99, 4\), but the codes say \(100, 4\)"),
        ("rows.2.weight", None, r"rows\.2\.weight is missing"),
        ("rows.1.momentum1", torch.zeros(7), "optimizer state of another shape"),
        ("codes", torch.zeros(2, 2), "codes has shape"),
        ("codes", torch.full((2, 2), -1), "codes above 2"),
        ("codes", "text", "codes is no tensor"),
        ("utility", torch.zeros(3, 1), "utility has shape"),
        ("shape", torch.tensor([9, 100, 8, 2, 0]), "was saved in format 9; .* update lightning-embcomp"),
        ("shape", torch.tensor([1, 100, 8, 3, 0]), "cannot be cut into 3 chunks"),
        ("shape", torch.tensor([1, 100, 8, 2, 7]), "unknown layout 7"),
        ("shape", torch.tensor([1, 100]), "not five numbers"),
    ],
)
def test_tables_that_do_not_fit_together_are_named(tmp_path: Path, key: str, value: object, message: str) -> None:
    content = state()
    content[f"bags.engine.tables.t.{key}"] = value
    if value is None:
        del content[f"bags.engine.tables.t.{key}"]
    torch.save({"state_dict": content}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=message):
        read_report(tmp_path / "a.ckpt")

"""One process: what is written is read, whole and in parts, and what cannot be is refused."""

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from lightning_embcomp.checkpoints import (
    CheckpointError,
    CheckpointReader,
    CheckpointSaveError,
    Slice,
    Slices,
    as_slices,
    is_checkpoint,
    read_common,
    read_rank,
    remove_checkpoint,
    save_checkpoint,
    saving,
    saving_group,
    world_size_of,
)
from tests.checkpoints.tables import filled, plain_slices, whole_slices


class Custom:
    """Of a class that is not read from files for safety."""


def save(path: Path, tensors: dict[str, Any] | None = None, **common: Any) -> Path:
    save_checkpoint(path, tensors=tensors or {}, common=common, per_rank={"rank": 0})
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64, torch.bool])
def test_parts_of_parts(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written in small chunks from two column ranges, read at all kinds of places."""
    monkeypatch.setattr(saving, "CHUNK_BYTES", 16)
    full = filled("t", (13, 5), dtype)
    wide = torch.cat([full, full], dim=1)  # parts that are views of larger storages
    save(tmp_path / "c", {"t": Slices((13, 5), [((0, 0), wide[:, :2]), ((0, 2), wide[:, 2:5])])})
    reader = CheckpointReader(tmp_path / "c")
    assert reader.keys() == {"t"} and reader.shape("t") == (13, 5) and reader.dtype("t") == dtype
    for rows, columns in [((0, 13), (0, 5)), ((4, 5), (1, 4)), ((12, 13), (4, 5)), ((0, 7), (0, 1)), ((3, 3), (0, 5))]:
        part = torch.zeros(rows[1] - rows[0], columns[1] - columns[0], dtype=dtype)
        reader.read_into({"t": Slice((13, 5), (rows[0], columns[0]), part)})
        assert torch.equal(part, full[slice(*rows), slice(*columns)])
    overlapping = [torch.zeros(2, 5, dtype=dtype), torch.zeros(3, 5, dtype=dtype)]
    reader.read_into({"t": Slices((13, 5), [((1, 0), overlapping[0]), ((1, 0), overlapping[1])])})
    assert torch.equal(overlapping[0], full[1:3]) and torch.equal(overlapping[1], full[1:4])
    transposed = torch.zeros(5, 13, dtype=dtype)
    reader.read_into({"t": transposed.t()})
    assert torch.equal(transposed, full.t())


def test_slices_of_all_kinds(tmp_path: Path) -> None:
    save(tmp_path / "c", plain_slices(0, 1))
    reader = CheckpointReader(tmp_path / "c")
    for key, full in whole_slices().items():
        found = torch.empty_like(full)
        reader.read_into({key: found})
        assert torch.equal(found, full), key


def test_a_plain_reader_of_torch_reads_it(tmp_path: Path) -> None:
    save(tmp_path / "c", {"t": filled("t", (4, 2))})
    found = {"t": torch.zeros(4, 2)}
    with pytest.warns(UserWarning, match="single process"):
        dcp.load(found, checkpoint_id=tmp_path / "c")
    assert torch.equal(found["t"], filled("t", (4, 2)))


def test_parameters_of_another_float_dtype(tmp_path: Path) -> None:
    save(tmp_path / "c", {"t": torch.nn.Parameter(filled("t", (4, 2)))})
    parameter = torch.nn.Parameter(torch.zeros(4, 2, dtype=torch.bfloat16))
    CheckpointReader(tmp_path / "c").read_into({"t": parameter})
    assert parameter.requires_grad and torch.equal(parameter.detach(), filled("t", (4, 2), torch.bfloat16))


def test_objects(tmp_path: Path) -> None:
    """What Lightning and common callbacks put into a checkpoint, safely."""
    states = {"numpy": np.random.get_state(), "python": random.getstate(), "torch": torch.get_rng_state()}
    common = {"epoch": 3, "score": np.float32(0.25), "folder": Path("a/b"), "mask": np.array([True, False])}
    save_checkpoint(tmp_path / "c", tensors={}, common=common, per_rank=states)
    found = read_common(tmp_path / "c")
    assert {**found, "mask": found["mask"].tolist()} == {**common, "mask": [True, False]}
    again = read_rank(tmp_path / "c", 0)
    assert again is not None and read_rank(tmp_path / "c", 1) is None and read_rank(tmp_path / "c", -1) is None
    assert again["python"] == states["python"] and torch.equal(again["torch"], states["torch"])
    assert np.array_equal(again["numpy"][1], states["numpy"][1])
    assert world_size_of(tmp_path / "c") == 1
    assert saving_group() is None


def test_other_objects_only_on_demand(tmp_path: Path) -> None:
    save(tmp_path / "c", callback=Custom())
    with pytest.raises(CheckpointError, match=r"common\.pt: .*Custom.*weights_only=False"):
        read_common(tmp_path / "c")
    assert isinstance(read_common(tmp_path / "c", weights_only=False)["callback"], Custom)


def test_object_that_cannot_be_written(tmp_path: Path) -> None:
    save(tmp_path / "c", epoch=1)
    with pytest.raises(CheckpointSaveError, match=r"common\.pt: the entry \['callbacks'\]\['mine'\] cannot be pickled"):
        save(tmp_path / "c", callbacks={"good": 1, "mine": lambda: None})
    assert read_common(tmp_path / "c") == {"epoch": 1}
    assert os.listdir(tmp_path) == ["c"]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"t": 3}, "tensor 't': int is no tensor"),
        ({"t": Slice((4, 2), (0, 0), torch.zeros(3, 2))}, "hold 6 of its 8 elements"),
        ({"t": Slices((4,), [((0,), torch.zeros(3)), ((2,), torch.zeros(2))])}, "overlapping"),
        ({"t": Slices((0, 2), [])}, r"tensor 't' of shape \(0, 2\): no rank says its dtype"),
    ],
)
def test_tensors_that_do_not_fit_together(tensors: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointSaveError, match=message):
        save(tmp_path / "c", tensors)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"u": torch.zeros(4, 2)}, "there is no tensor 'u' in it; it has 1 others"),
        ({"tabl": torch.zeros(4, 2)}, "did you mean 'table'"),
        ({"table": torch.zeros(5, 2)}, r"shape \(4, 2\), but the model asks for \(5, 2\)"),
        ({"table": torch.zeros(4, 2, dtype=torch.uint8)}, "is torch.float32, but the model asks for torch.uint8"),
    ],
)
def test_tensors_that_are_not_there(target: dict[str, Any], message: str, tmp_path: Path) -> None:
    reader = CheckpointReader(save(tmp_path / "c", {"table": torch.ones(4, 2)}))
    good = torch.zeros(4, 2)
    with pytest.raises(CheckpointError, match=message):
        reader.read_into({"table": good, **target})
    assert not good.any()


@pytest.mark.parametrize("place", [((3, 0), (2, 2)), ((0, -1), (1, 1)), ((0,), (2,)), ((0, 1), (4, 2))])
def test_pieces_outside(place: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="does not lie inside"):
        Slice((4, 2), place[0], torch.zeros(place[1]))


def test_pieces_of_two_dtypes() -> None:
    with pytest.raises(ValueError, match="different dtypes"):
        Slices((4,), [((0,), torch.zeros(2)), ((2,), torch.zeros(2).half())])


def test_what_is_no_tensor() -> None:
    with pytest.raises(TypeError, match="list is no tensor"):
        as_slices([1.0])


def test_remove(tmp_path: Path) -> None:
    path = save(tmp_path / "c")
    assert is_checkpoint(path)
    (tmp_path / "file").write_text("a plain checkpoint")
    assert not is_checkpoint(tmp_path / "file") and not is_checkpoint(tmp_path)
    for name in ("c", "file", "never"):
        remove_checkpoint(tmp_path / name)
    assert not os.listdir(tmp_path)

"""Sizes and contents of the parts."""

from pathlib import Path

import numpy as np
import pytest

from lightning_embcomp.data import ClickLogDataModule, Split
from lightning_embcomp.data.splits import assign_parts, part_sizes

from .files import criteo_line, ready, write


def numbers(data: ClickLogDataModule, part: str) -> list[int]:
    """I1 of all rows of a part, which tells the rows of these files apart."""
    loader = getattr(data, f"{part}_dataloader")()
    return [round(float(number)) for dense, _, _ in loader for number in np.expm1(dense[:, 0].numpy())]


@pytest.mark.parametrize("kind", ["chronological", "random"])
def test_parts_are_disjoint_and_complete(tmp_path: Path, kind: str) -> None:
    file = write(tmp_path / "day.txt", "".join(criteo_line(1, index) for index in range(50)))
    split = Split(kind=kind, validation=0.1, test=0.24)  # type: ignore[arg-type]
    data = ready(file, split=split, batch_size=7, shuffle=False)
    train, validation, test = (numbers(data, part) for part in ("train", "val", "test"))
    assert (len(train), len(validation), len(test)) == (33, 5, 12)
    assert sorted(train + validation + test) == list(range(50))
    assert numbers(data, "predict") == test
    if kind == "chronological":
        assert train + validation + test == list(range(50))
    else:
        assert test != list(range(38, 50)) and train == sorted(train)


def test_random_split_depends_on_its_seed_alone() -> None:
    first = assign_parts(1000, Split(kind="random", seed=1))
    assert np.array_equal(first, assign_parts(1000, Split(kind="random", seed=1)))
    assert not np.array_equal(first, assign_parts(1000, Split(kind="random", seed=2)))


def test_chronological_split_with_equal_and_unsorted_times() -> None:
    times = np.array([5.0, 1.0, 5.0, 2.0, 0.0])
    assert assign_parts(5, Split(validation=0.2, test=0.2), times).tolist() == [1, 0, 2, 0, 0]


def test_too_few_rows() -> None:
    with pytest.raises(ValueError, match="3 rows are too few"):
        part_sizes(3, Split())


def test_no_validation_rows(tmp_path: Path) -> None:
    file = write(tmp_path / "day.txt", criteo_line(1, 1) * 4)
    data = ready(file, split=Split(validation=0, test=0.25))
    assert data.val_dataloader() == [] and len(data.test_dataloader()) == 1

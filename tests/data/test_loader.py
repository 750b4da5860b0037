"""Order of rows, distribution over processes, and resuming."""

from collections.abc import Iterable

import numpy as np
import pytest
import torch

from lightning_embcomp.data import BatchLoader, CategoricalFeature
from lightning_embcomp.data.batches import Bags, Batch, Columns, concat_columns, to_batch
from lightning_embcomp.data.order import RowOrder

FEATURES = (CategoricalFeature("row", num_embeddings=10_000), CategoricalFeature("bag", 10_000, multi_valued=True))


class Rows:
    """Rows that hold their own number: as an id, and that often (modulo 3) in a bag."""

    block_rows = 4
    window_rows = 12

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows

    def read(self, rows: np.ndarray) -> Columns:
        lengths = rows % 3
        bags = Bags(values=np.repeat(rows, lengths), offsets=np.concatenate([[0], np.cumsum(lengths)]))
        return Columns(
            dense=rows[:, None].astype(np.float32), ids=rows[:, None], bags=(bags,), label=(rows % 2).astype(np.uint8)
        )


def rows_of(batches: Iterable[Batch]) -> list[list[int]]:
    return [sparse["row"].values().tolist() for _, sparse, _ in batches]


def make(num_rows: int = 23, batch_size: int = 5, **settings: object) -> BatchLoader:
    return BatchLoader(Rows(num_rows), FEATURES, batch_size, **settings)  # type: ignore[arg-type]


def test_batch_form() -> None:
    dense, sparse, label = next(iter(make()))
    assert (dense.dtype, label.dtype, sparse.values().dtype) == (torch.float32, torch.float32, torch.int64)
    assert dense.tolist() == [[0], [1], [2], [3], [4]] and label.tolist() == [0, 1, 0, 1, 0]
    assert sparse.keys() == ["row", "bag"] and sparse.stride() == 5
    assert sparse["bag"].lengths().tolist() == [0, 1, 2, 0, 1]
    assert sparse["bag"].values().tolist() == [1, 2, 2, 4]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_every_row_once(shuffle: bool, num_workers: int) -> None:
    loader = make(shuffle=shuffle, num_workers=num_workers)
    batches = rows_of(loader)
    assert [len(batch) for batch in batches] == [5, 5, 5, 5, 3] and len(loader) == 5
    flat = sum(batches, [])
    assert sorted(flat) == list(range(23))
    assert (flat == list(range(23))) is not shuffle
    assert batches == rows_of(make(shuffle=shuffle))


def test_order_depends_on_seed_and_epoch_alone() -> None:
    loader = make(shuffle=True, seed=3)
    epochs = []
    for epoch in (0, 1, 0):
        loader.sampler.set_epoch(epoch)
        epochs.append(rows_of(loader))
    assert epochs[0] == epochs[2] != epochs[1]
    assert rows_of(make(shuffle=True, seed=4)) != epochs[0]


def test_epoch_set_after_iter_counts() -> None:
    loader = make(shuffle=True)
    iterator = iter(loader)
    loader.sampler.set_epoch(2)
    again = make(shuffle=True)
    again.sampler.set_epoch(2)
    assert rows_of(iterator) == rows_of(again)


@pytest.mark.parametrize("num_rows", [1, 3, 4, 11, 12, 13, 100])
def test_windows_mix_neighbouring_blocks_only(num_rows: int) -> None:
    order = RowOrder(num_rows, seed=0, epoch=0, shuffle=True, block_rows=4, window_rows=12)
    whole = order.rows(0, num_rows)
    assert sorted(whole.tolist()) == list(range(num_rows))
    pieces = [order.rows(begin, min(begin + 7, num_rows)) for begin in range(0, num_rows, 7)]
    assert np.concatenate(pieces).tolist() == whole.tolist()
    if num_rows == 100:
        assert all(len(set((whole[begin : begin + 12] // 4).tolist())) == 3 for begin in range(0, 96, 12))


@pytest.mark.parametrize("num_rows", [22, 23, 24, 30, 31])
@pytest.mark.parametrize("shuffle", [False, True])
def test_processes_share_the_rows(num_rows: int, shuffle: bool) -> None:
    loaders = [make(num_rows, shuffle=shuffle, rank=rank, world_size=3) for rank in range(3)]
    steps = [rows_of(loader) for loader in loaders]
    assert len({len(step) for step in steps}) == 1 and len(steps[0]) == len(loaders[0])
    assert all(batch for step in steps for batch in step)
    assert sorted(sum((sum(step, []) for step in steps), [])) == list(range(num_rows))


def test_drop_last() -> None:
    loader = make(drop_last=True)
    assert [len(batch) for batch in rows_of(loader)] == [5, 5, 5, 5] and len(loader) == 4
    with pytest.raises(ValueError, match="drop_last leaves nothing"):
        make(4, drop_last=True)


def test_state_goes_on_within_the_epoch() -> None:
    loader = make(shuffle=True)
    loader.sampler.set_epoch(1)
    whole = rows_of(loader)
    iterator = iter(loader)
    for _ in range(2):
        next(iterator)
    state = loader.state_dict()
    resumed = make(shuffle=True)
    resumed.load_state_dict(state)
    assert rows_of(resumed) == whole[2:]
    assert rows_of(resumed) == whole  # once only
    resumed.load_state_dict(state)
    resumed.sampler.set_epoch(2)
    assert len(rows_of(resumed)) == 5  # the state is about another epoch


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="batch_size"):
        make(batch_size=0)
    with pytest.raises(ValueError, match="2 rows cannot be divided among 3"):
        make(2, rank=0, world_size=3)


def test_concat_columns_is_like_reading_together() -> None:
    rows = Rows(50)
    parts = [rows.read(np.array(numbers)) for numbers in ([4, 7], [8], [2, 2, 5])]
    together, expected = concat_columns(parts), rows.read(np.array([4, 7, 8, 2, 2, 5]))
    for one, other in zip(to_batch(together, FEATURES), to_batch(expected, FEATURES), strict=True):
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, other)
        else:
            assert torch.equal(one.values(), other.values()) and torch.equal(one.lengths(), other.lengths())

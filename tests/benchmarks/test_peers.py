"""The peers of the Pareto plots, against values worked out by hand."""

import numpy as np
import pytest
import torch
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from benchmarks.peers.folded import Fold, FoldedBags, Unreachable, hashed, quotient_remainder
from benchmarks.peers.half import HalfBags
from benchmarks.peers.magnitude import pruned, pruned_to, sparse_bytes
from benchmarks.peers.pep import START, ThresholdedBags
from benchmarks.peers.rounding import rounded
from benchmarks.peers.tables import fused_states, fused_tables, replaced

FEATURES = [
    {"name": "user", "num_embeddings": 10, "multi_valued": False},
    {"name": "tags", "num_embeddings": 4, "multi_valued": True},
]
BATCH = KeyedJaggedTensor(["user", "tags"], torch.tensor([7, 2, 1, 3, 0]), lengths=torch.tensor([1, 1, 2, 1]))


def numbered(module: nn.Module) -> list[torch.Tensor]:
    """Fill every table with its own numbers: table t, row r holds 10 t + r + 1."""
    tables = fused_tables(module)
    for t, table in enumerate(tables):
        table.copy_((10 * t + torch.arange(len(table)) + 1.0).unsqueeze(1).expand_as(table))
    return tables


def test_multi_valued_features_keep_whole_tables() -> None:
    assert quotient_remainder([100, 100], 120, whole=[0]) == [Fold(slots=100), Fold(slots=10, quotients=10)]


def test_hashed_ids_share_rows_by_their_remainder() -> None:
    bags = FoldedBags(FEATURES, [Fold(slots=5), Fold(slots=4)], dim=4, lr=0.1)
    numbered(bags)
    found = bags(BATCH).to_dict()
    # user 7 and 2 both read row 2; tags 1 + 3 read 12 + 14, tag 0 reads 11.
    assert found["user"][:, 0].tolist() == [3.0, 3.0]
    assert found["tags"][:, 0].tolist() == [26.0, 11.0]


def test_quotients_are_factors() -> None:
    bags = FoldedBags(FEATURES, [Fold(slots=5, quotients=2), Fold(slots=4)], dim=4, lr=0.1)
    assert [len(table) for table in fused_tables(bags)] == [5, 4, 2]
    numbered(bags)
    # user 7 is remainder 2 of quotient 1: 3 * 22; user 2 is remainder 2 of quotient 0: 3 * 21.
    assert bags(BATCH).to_dict()["user"][:, 0].tolist() == [66.0, 63.0]
    bags(BATCH).values().sum().backward()
    assert [state.count_nonzero().item() for state in fused_states(bags)] == [1, 3, 2]


def test_quotients_of_several_ids_per_row_are_refused() -> None:
    with pytest.raises(ValueError, match="'tags' is multi-valued"):
        FoldedBags(FEATURES, [Fold(slots=10), Fold(slots=2, quotients=2)], dim=4, lr=0.1)


@pytest.mark.parametrize("total", [40, 300, 1500])
def test_folds_keep_to_their_rows_and_ids_apart(total: int) -> None:
    rows = [3, 50, 400, 1000]
    assert total - len(rows) < sum(fold.rows for fold in hashed(rows, total)) <= total or total > sum(rows)
    if total < 100:
        with pytest.raises(Unreachable, match="need more than 40 rows"):
            quotient_remainder(rows, total)
        return
    folds = quotient_remainder(rows, total)
    assert sum(fold.rows for fold in folds) <= total
    for size, fold in zip(rows, folds, strict=True):
        pairs = {(i % fold.slots, i // fold.slots) for i in range(size)}
        assert len(pairs) == size  # no two ids share both rows
        assert fold.slots * max(1, fold.quotients) >= size


def test_half_tables_match_a_plain_lookup() -> None:
    bags = HalfBags(FEATURES, dim=4, lr=0.1)
    user, tags = fused_tables(bags)
    assert user.dtype == torch.float16
    found = bags(BATCH).to_dict()
    torch.testing.assert_close(found["user"], user[[7, 2]].float())
    torch.testing.assert_close(found["tags"], torch.stack([tags[1].float() + tags[3].float(), tags[0].float()]))
    before = user.clone()
    bags(BATCH).values().sum().backward()
    changed = (user != before).any(1).nonzero().flatten().tolist()
    assert changed == [2, 7]


@pytest.mark.parametrize(("bits", "row_bytes"), [(8, 20), (4, 12), (2, 8)])
def test_rounding_is_that_of_rows_with_a_half_scale(bits: int, row_bytes: int) -> None:
    table = torch.from_numpy(np.random.default_rng(0).normal(size=(6, 16)).astype(np.float32))
    values, size = rounded(table, bits)
    assert size == 6 * row_bytes
    for row, found in zip(table.numpy(), values.numpy(), strict=True):
        bias = np.float16(row.min())
        scale = np.float16((row.max() - np.float32(bias)) / (2**bits - 1))
        codes = np.clip(np.rint((row - np.float32(bias)) / np.float32(scale)), 0, 2**bits - 1)
        np.testing.assert_allclose(found, codes * np.float32(scale) + np.float32(bias), atol=1e-6)


def test_magnitude_pruning_drops_the_smallest_of_all_tables() -> None:
    tables = [torch.tensor([[0.1, -3.0], [0.2, 0.3]]), torch.tensor([[-0.15, 2.0]])]
    found = pruned(tables, 0.5)
    assert [values.tolist() for values in found] == [[[0.0, -3.0], [0.0, pytest.approx(0.3)]], [[0.0, 2.0]]]
    assert tables[0][0, 0] == pytest.approx(0.1)


def test_sparse_bytes_by_hand() -> None:
    mask = torch.zeros(128, 16, dtype=torch.bool)
    mask[3, :2] = mask[70, 5] = True
    # Bit maps: 3 values of 4 bytes, 2 rows with 2 bytes, 2 blocks of 16 bytes; pointers alone would be 516 bytes.
    assert sparse_bytes([mask]) == 12 + 4 + 32
    # All values of 4 rows: 4 * 16 values of 5 bytes and 5 pointers, or 256 + 8 + 16 bytes with maps.
    assert sparse_bytes([torch.ones(4, 16, dtype=torch.bool)]) == 280


def test_pruning_to_a_size_comes_close_and_says_when_it_cannot() -> None:
    table = torch.from_numpy(np.random.default_rng(0).normal(size=(640, 16)).astype(np.float32))
    values, size = pruned_to([table], 640 * 64 // 5)
    assert 0.98 * 640 * 64 / 5 < size <= 640 * 64 // 5
    assert sparse_bytes([values[0] != 0]) == size
    with pytest.raises(Unreachable, match="without any value"):
        pruned_to([table], 100)


def test_tables_are_put_back() -> None:
    bags = FoldedBags(FEATURES, [Fold(slots=10), Fold(slots=4)], dim=4, lr=0.1)
    tables = numbered(bags)
    with replaced(tables, [table * 0 for table in tables]):
        assert bags(BATCH).values().abs().sum() == 0
    assert bags(BATCH).to_dict()["user"][:, 0].tolist() == [8.0, 3.0]


def test_thresholds_shrink_settle_and_start_anew() -> None:
    bags = ThresholdedBags(FEATURES, dim=4, gain=15.0)
    first = bags.values.detach().clone()
    with torch.no_grad():
        bags.values.fill_(0.7)
        bags.moved[:10] = 1.0  # sigmoid(0) = 0.5 in the table of users
        bags.moved[2] = 3.0  # sigmoid(30) = 1 for user 2
    found = bags(BATCH).to_dict()
    torch.testing.assert_close(found["user"], torch.tensor([[0.2], [0.0]]).expand(2, 4))
    torch.testing.assert_close(found["tags"], torch.tensor([[1.4], [0.7]]).expand(2, 4), atol=1e-5, rtol=0)
    bags(BATCH).values().sum().backward()
    assert bags.moved.grad is not None
    assert bags.moved.grad[0, 0] == 0  # its threshold is at zero: nothing pushes
    assert bags.moved.grad[12, 0].item() == pytest.approx(1e-5 * START)  # tag 2 is not looked up
    assert [mask.all(1).sum().item() for mask in bags.kept] == [9, 4]
    bags.settle()
    kept = torch.ones(14, 1)
    kept[2] = 0
    torch.testing.assert_close(bags.values.detach(), first * kept)

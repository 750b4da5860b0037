"""The synthetic log: its distribution, its truth and its determinism."""

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from lightning_embcomp.data import SyntheticClickLog, SyntheticClickLogDataModule
from lightning_embcomp.data.synthetic import BLOCK_ROWS

SMALL = SyntheticClickLog(num_rows=20_000, num_embeddings=(20, 500), num_dense=2, seed=5)


def everything(data: SyntheticClickLogDataModule, part: str = "train") -> tuple[torch.Tensor, ...]:
    """Dense inputs, ids by feature, and labels of all rows of a part (single-valued features)."""
    batches = list(getattr(data, f"{part}_dataloader")())
    dense = torch.cat([batch[0] for batch in batches])
    ids = torch.cat([batch[1].values().reshape(len(data.features), -1) for batch in batches], dim=1)
    return dense, ids, torch.cat([batch[2] for batch in batches])


def test_defaults() -> None:
    data = SyntheticClickLogDataModule()
    data.prepare_data()
    data.setup("fit")
    assert len(data.features) == 8 and data.num_dense == 4
    assert [feature.num_embeddings for feature in data.features][::7] == [50, 50_000]
    assert len(data.train_dataloader()) == -(-160_000 // 2048)


def test_best_auc_is_that_of_the_planted_probabilities() -> None:
    label, probability = SMALL.part("test").truth()
    assert len(label) == 2000
    assert SMALL.best_auc() == pytest.approx(roc_auc_score(label, probability), abs=1e-6)
    assert 0.7 < SMALL.best_auc() < 0.95
    _, _, seen = everything(SyntheticClickLogDataModule(SMALL), "test")
    assert seen.tolist() == label.tolist()


def test_truth_is_calibrated() -> None:
    label, probability = SMALL.part("train").truth()
    assert probability.mean() == pytest.approx(0.2, abs=0.02)
    order = np.argsort(probability)
    for group in np.array_split(order, 5):
        spread = np.sqrt((probability[group] * (1 - probability[group])).sum())
        assert abs(label[group].sum() - probability[group].sum()) < 4 * spread


def test_no_signal_leaves_nothing_to_rank() -> None:
    log = SyntheticClickLog(num_rows=20_000, num_embeddings=(20,), signal=0.0, base_rate=0.3)
    _, probability = log.part("test").truth()
    np.testing.assert_allclose(probability, 0.3, atol=1e-6)
    assert log.best_auc() == pytest.approx(0.5)


def test_ids_follow_zipf() -> None:
    data = SyntheticClickLogDataModule(SMALL)
    _, ids, _ = everything(data)
    for index, feature in enumerate(data.features):
        counts = torch.bincount(ids[index], minlength=feature.num_embeddings)
        weights = np.arange(1, feature.num_embeddings) ** -SMALL.exponent
        expected = 16_000 * weights / weights.sum()
        assert counts[0] == 0
        np.testing.assert_allclose(data.id_counts(feature.name)[1:], expected, atol=0.5 + 1e-9)
        assert np.all(np.abs(counts[1:].numpy() - expected) < 5 * np.sqrt(expected) + 3)


def test_deterministic_by_seed_and_independent_of_batching() -> None:
    first = everything(SyntheticClickLogDataModule(SMALL, batch_size=64))
    again = everything(SyntheticClickLogDataModule(SyntheticClickLog(**vars_of(SMALL)), batch_size=9000))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    other = everything(SyntheticClickLogDataModule(SyntheticClickLog(**{**vars_of(SMALL), "seed": 6})))
    assert not torch.equal(first[1], other[1])


def vars_of(log: SyntheticClickLog) -> dict[str, Any]:
    return {name: getattr(log, name) for name in log.__dataclass_fields__}


def test_longer_log_begins_with_the_shorter_one() -> None:
    longer = SyntheticClickLog(**{**vars_of(SMALL), "num_rows": 50_000})
    first, second = (everything(SyntheticClickLogDataModule(log)) for log in (SMALL, longer))
    assert all(torch.equal(one, other[..., :16_000]) for one, other in zip(first[1:], second[1:], strict=True))


def test_shuffled_rows_are_the_same_rows() -> None:
    plain = everything(SyntheticClickLogDataModule(SMALL))
    shuffled = everything(SyntheticClickLogDataModule(SMALL, shuffle=True))
    assert not torch.equal(plain[0], shuffled[0])
    keys = [torch.from_numpy(np.lexsort(rows[0].T.numpy())) for rows in (plain, shuffled)]
    assert torch.equal(plain[0][keys[0]], shuffled[0][keys[1]])
    assert torch.equal(plain[1][:, keys[0]], shuffled[1][:, keys[1]])
    assert torch.equal(plain[2][keys[0]], shuffled[2][keys[1]])


def test_drift_moves_popularity() -> None:
    log = SyntheticClickLog(num_rows=10 * BLOCK_ROWS, num_embeddings=(300,), drift=0.5, validation=0, test=0.1)
    data = SyntheticClickLogDataModule(log)
    _, ids, _ = everything(data)
    before = torch.bincount(ids[0, : 5 * BLOCK_ROWS], minlength=300)
    after = torch.bincount(ids[0, 5 * BLOCK_ROWS :], minlength=300)
    assert before.argmax() != after.argmax()
    assert np.corrcoef(before[1:], after[1:])[0, 1] < 0.5
    counts = data.id_counts("feature_0")
    assert bool((counts[1:-1] >= counts[2:]).all())
    assert np.all(np.abs((before + after - counts).numpy()) < 5 * np.sqrt(counts.numpy()) + 3)
    steady = torch.bincount(everything(SyntheticClickLogDataModule(SMALL))[1][0, :8000], minlength=20)
    later = torch.bincount(everything(SyntheticClickLogDataModule(SMALL))[1][0, 8000:], minlength=20)
    assert np.corrcoef(steady, later)[0, 1] > 0.99


def test_multi_hot() -> None:
    log = SyntheticClickLog(num_rows=20_000, num_embeddings=(20, 500), pooling_factor=5)
    data = SyntheticClickLogDataModule(log, batch_size=4000)
    assert all(feature.multi_valued for feature in data.features)
    lengths = torch.cat([batch[1].lengths() for batch in data.train_dataloader()])
    assert (int(lengths.min()), int(lengths.max())) == (1, 9)
    assert float(lengths.float().mean()) == pytest.approx(5, abs=0.1)
    assert int(data.id_counts("feature_0").sum()) == pytest.approx(5 * 16_000, rel=0.01)
    label, probability = log.part("test").truth()
    assert log.best_auc() == pytest.approx(roc_auc_score(label, probability), abs=1e-6) and log.best_auc() > 0.65


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_embeddings": (1,)}, "2 rows or more"),
        ({"drift": 1.5}, "drift"),
        ({"base_rate": 0.0}, "base_rate"),
        ({"pooling_factor": 0}, "pooling_factor"),
        ({"num_rows": 3}, "too few"),
    ],
)
def test_settings_are_checked(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SyntheticClickLog(**settings)  # type: ignore[arg-type]


def test_no_test_rows_no_best_auc() -> None:
    with pytest.raises(ValueError, match="no best AUC"):
        SyntheticClickLog(num_rows=100, test=0).best_auc()

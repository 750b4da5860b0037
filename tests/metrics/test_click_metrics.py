"""Click metrics against scikit-learn, SciPy and numbers worked by hand."""

import math
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from scipy.stats import entropy
from sklearn.metrics import log_loss as sklearn_log_loss
from torch.utils.data import DataLoader
from torchmetrics import Metric
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from lightning_embcomp.metrics import Calibration, LogLoss, NormalizedEntropy, calibration, log_loss, normalized_entropy
from lightning_embcomp.models import ClickModel


@pytest.fixture
def predictions() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    preds = torch.rand(1000, generator=generator)
    return preds, (torch.rand(1000, generator=generator) < 0.3 * preds).long()


def test_log_loss_is_scikit_learns(predictions: tuple[torch.Tensor, torch.Tensor]) -> None:
    preds, target = predictions
    assert log_loss(preds, target).item() == pytest.approx(sklearn_log_loss(target, preds.double().numpy()), rel=1e-12)


def test_normalized_entropy_is_log_loss_over_label_entropy(predictions: tuple[torch.Tensor, torch.Tensor]) -> None:
    preds, target = predictions
    rate = target.double().mean().item()
    expected = sklearn_log_loss(target, preds.double().numpy()) / entropy([rate, 1 - rate])
    assert normalized_entropy(preds, target).item() == pytest.approx(expected, rel=1e-12)


def test_normalized_entropy_worked_by_hand() -> None:
    # CTR 1/4: entropy 0.562335; losses 0.105361, 2 x 0.223144, 0.356675: mean 0.227081.
    result = normalized_entropy(torch.tensor([0.9, 0.2, 0.2, 0.3]), torch.tensor([1, 0, 0, 0]))
    assert result.item() == pytest.approx(0.403817, abs=1e-6)


def test_normalized_entropy_of_the_base_rate_is_one() -> None:
    target = torch.tensor([1.0, 0, 0, 0, 0])
    assert normalized_entropy(torch.full((5,), 0.2, dtype=torch.float64), target).item() == pytest.approx(
        1.0, rel=1e-12
    )


def test_calibration_worked_by_hand() -> None:
    assert calibration(torch.tensor([0.9, 0.2, 0.2, 0.3]), torch.tensor([1, 0, 0, 0])).item() == pytest.approx(1.6)
    assert calibration(torch.tensor([0.5, 0.25]), torch.tensor([1.0, 1.0])).item() == 0.375


@pytest.mark.parametrize(
    ("metric", "function"),
    [(LogLoss, log_loss), (NormalizedEntropy, normalized_entropy), (Calibration, calibration)],
)
def test_batches_give_the_result_of_the_whole(metric: type[Metric], function, predictions) -> None:  # noqa: ANN001
    preds, target = predictions
    accumulated = metric()
    for start, stop in ((0, 10), (10, 700), (700, 700), (700, 1000)):
        accumulated.update(preds[start:stop], target[start:stop])
    assert accumulated.compute().item() == pytest.approx(function(preds, target).item(), rel=1e-12)
    accumulated.reset()
    accumulated.update(preds[:500], target[:500])
    assert accumulated.compute().item() == pytest.approx(function(preds[:500], target[:500]).item(), rel=1e-12)


def test_a_model_that_was_validated_can_be_fitted() -> None:
    """A validation ends with a reset in inference mode, and inference tensors cannot be changed outside of it."""
    torch.manual_seed(0)
    sparse = KeyedJaggedTensor(["user"], torch.arange(8), lengths=torch.ones(8, dtype=torch.int64))
    loader: DataLoader[Any] = DataLoader([(torch.rand(8, 1), sparse, torch.arange(8) % 2.0)] * 2, batch_size=None)  # type: ignore[arg-type]
    model = ClickModel(features=[{"name": "user", "num_embeddings": 8}], num_dense=1, embedding_dim=4, over_layers=(4,))
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    names = {"val_auc", "val_logloss", "val_ne", "val_calibration"}
    [before] = trainer.validate(model, loader, verbose=False)
    trainer.fit(model, loader, loader)
    last = {name: float(trainer.callback_metrics[name]) for name in names}
    [after] = trainer.validate(model, loader, verbose=False)
    assert {name: after[name] for name in names} == pytest.approx(last, rel=1e-6)
    assert before["val_logloss"] != after["val_logloss"]


def test_sums_keep_what_float32_would_drop() -> None:
    metric = Calibration()
    metric.update(torch.ones(1), torch.ones(1))
    metric.expected += 2.0**25
    for _ in range(100):
        metric.update(torch.tensor([0.5]), torch.tensor([0]))
    assert metric.compute().item() == 2.0**25 + 1 + 50


@pytest.mark.parametrize("preds", [torch.empty(0), torch.tensor([0.3, 0.4])])
def test_no_click_is_nan_for_entropy_and_calibration(preds: torch.Tensor) -> None:
    target = torch.zeros_like(preds)
    assert math.isnan(normalized_entropy(preds, target).item())
    assert math.isnan(calibration(preds, target).item())


def test_one_class_of_clicks() -> None:
    preds, target = torch.tensor([0.5, 0.25]), torch.ones(2)
    assert math.isnan(normalized_entropy(preds, target).item())
    assert calibration(preds, target).item() == 0.375
    assert log_loss(preds, target).item() == pytest.approx(1.5 * math.log(2))


def test_empty_log_loss_is_nan() -> None:
    assert math.isnan(log_loss(torch.empty(0), torch.empty(0)).item())


def test_certain_and_wrong_is_finite() -> None:
    assert log_loss(torch.tensor([0.0]), torch.tensor([1])).item() == pytest.approx(52 * math.log(2))


@pytest.mark.parametrize(
    ("preds", "target", "message"),
    [
        ([0.5, 1.5], [1, 0], r"1\.5.*sigmoid"),
        ([0.5, math.nan], [1, 0], "nan"),
        ([0.5, -0.1], [1, 0], r"-0\.1"),
        ([0.5, 0.5], [1, 2], r"0 or 1, got 2\.0"),
        ([0.5, 0.5], [1], r"same shape, got \(2,\) and \(1,\)"),
    ],
)
@pytest.mark.parametrize("function", [log_loss, normalized_entropy, calibration])
def test_bad_values_are_named(function, preds: list[float], target: list[int], message: str) -> None:  # noqa: ANN001
    with pytest.raises(ValueError, match=message):
        function(torch.tensor(preds), torch.tensor(target))

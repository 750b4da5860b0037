"""The NE guard: what it compares, which tables fall back, when it refuses."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score
from torch import Tensor, nn

from lightning_embcomp.export import ExportError, ExportOptions, NEGuardError, export_module, load_model, read
from lightning_embcomp.export.evaluation import evaluate
from lightning_embcomp.models import ClickModel
from lightning_embcomp.tables import find_hosts

from .pipeline import ROWS, Clicks, built_model, click_model, compressed, precision_of


def sensitive_model() -> ClickModel:
    """Predictions hang on table ``t_user`` most."""
    model = built_model()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "t_user" in name:
                weight.mul_(4)
    return model


@cache
def batches() -> list[Any]:
    """Labels that the sensitive model knows: whatever moves its logits costs."""
    model = sensitive_model()
    with torch.no_grad():
        found = [(dense, sparse, model(dense, sparse)) for dense, sparse, _ in Clicks().batches[:6]]
    middle = torch.cat([logits for _, _, logits in found]).median()
    return [(dense, sparse, (logits > middle).float()) for dense, sparse, logits in found]


def entropy(model: nn.Module) -> tuple[float, float]:
    """NE and AUC by scikit-learn."""
    with torch.no_grad():
        scores = torch.cat([model(dense, sparse) for dense, sparse, _ in batches()]).double().sigmoid().numpy()
    labels = torch.cat([label for _, _, label in batches()]).double().numpy()
    base = log_loss(labels, np.full(len(labels), labels.mean()))
    return log_loss(labels, scores) / base, roc_auc_score(labels, scores)


def test_measurements_are_those_of_the_models(tmp_path: Path) -> None:
    source = sensitive_model()
    options = ExportOptions(bits=4, max_ne_loss=10.0)
    report = export_module(source, tmp_path / "out", options, batches=batches())
    exported = load_model(tmp_path / "out", click_model())
    guard = report.guard
    assert guard is not None and guard.rows == 384 and guard.fallbacks == {}
    assert (guard.ne_before, guard.auc_before) == pytest.approx(entropy(source), abs=1e-7)
    assert (guard.ne_after, guard.auc_after) == pytest.approx(entropy(exported), abs=1e-6)
    with torch.no_grad():
        worst = max(float((exported(d, s) - source(d, s)).abs().max()) for d, s, _ in batches())
    assert guard.max_logit_difference == pytest.approx(worst, abs=1e-5) and worst > 1e-3
    metrics = read(tmp_path / "out").manifest.metrics
    assert metrics["val_ne_after"] == guard.ne_after and metrics["val_ne_before"] == guard.ne_before


def test_the_worst_table_falls_back_first(tmp_path: Path) -> None:
    source = sensitive_model()
    report = export_module(source, tmp_path / "out", ExportOptions(bits=2, max_ne_loss=0.0003), batches=batches())
    guard = report.guard
    assert guard is not None
    assert guard.ne_loss <= 0.0003
    costs = {}
    for name in ROWS:
        alone = ExportOptions(bits=32, tables={f"t_{name}": 2}, max_ne_loss=10.0)
        single = export_module(source, tmp_path / name, alone, batches=batches()).guard
        assert single is not None
        costs[f"model.sparse_arch.embedding_bag_collection.t_{name}"] = single.ne_after
    worst = max(costs, key=lambda name: costs[name])
    assert worst in guard.fallbacks and guard.fallbacks[worst][0] == 2 < guard.fallbacks[worst][1]
    assert len(guard.fallbacks) < 3  # tables that cost nothing keep their bits
    manifest = read(tmp_path / "out").manifest
    assert {name: tuple(bits) for name, bits in manifest.fallbacks.items()} == dict(guard.fallbacks)
    [host] = manifest.hosts
    for table in host.tables:
        used = guard.fallbacks.get(f"{host.path}.{table.name}", (2, 2))[1]
        assert [manifest.classes[c].format.bits for c in table.classes] == [used]


def test_strict_refuses_and_writes_nothing(tmp_path: Path) -> None:
    source = sensitive_model()
    before = {key: value.clone() for key, value in source.state_dict().items()}
    options = ExportOptions(bits=2, max_ne_loss=0.0005, strict=True)
    with pytest.raises(NEGuardError, match=r"validation NE rises from .* allowed are 0\.050 %"):
        export_module(source, tmp_path / "out", options, batches=batches())
    assert list(tmp_path.iterdir()) == []
    after = source.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_tables_rounded_in_training_cost_nothing(tmp_path: Path) -> None:
    source = compressed(built_model(), round_with=partial(precision_of, widths=(4, 2, 0)))
    options = ExportOptions(max_ne_loss=1e-6, strict=True)
    report = export_module(source, tmp_path / "out", options, batches=batches())
    assert report.guard is not None and report.guard.max_logit_difference < 2e-6


def test_lookups_happen_where_the_rows_are(tmp_path: Path) -> None:
    """TorchRec's collections name the device they began on, also when they were moved or allocated since."""
    source = sensitive_model()
    for host in find_hosts(source):
        host.module._device = torch.device("meta")  # type: ignore[assignment]
        assert host.module.device.type == "meta"
    report = export_module(source, tmp_path / "out", ExportOptions(max_ne_loss=10.0), batches=batches())
    assert report.guard is not None and report.guard.ne_after == pytest.approx(entropy(source)[0], rel=1e-2)


def test_modes_are_restored() -> None:
    model = built_model()
    model.train()
    model.model.over_arch.eval()  # type: ignore[union-attr, operator]
    modes = [module.training for module in model.modules()]
    evaluate(model, batches())
    assert modes == [module.training for module in model.modules()] and True in modes and False in modes


class Ranker(nn.Module):
    """Batches of its own shape."""

    def __init__(self, hook: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.items = nn.EmbeddingBag(50, 8, mode="sum")
        self.users = nn.Embedding(30, 8)
        if hook:
            self.validation_predictions = self._predictions

    def forward(self, user: Tensor, items: Tensor) -> Tensor:
        return (self.users(user) * self.items(items)).sum(1)

    def _predictions(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self(batch["user"], batch["items"]), batch["clicked"]


def ranked() -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    return [
        {"user": torch.randint(0, 30, (40,)), "items": torch.randint(0, 50, (40, 3)), "clicked": torch.arange(40) % 2}
        for _ in range(2)
    ]


def test_models_of_other_batches_name_their_predictions(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="Ranker: a validation batch is a dict.*validation_predictions"):
        export_module(Ranker(hook=False), tmp_path / "out", batches=ranked())
    options = ExportOptions(bits=2, max_ne_loss=0.001)
    report = export_module(Ranker(hook=True), tmp_path / "out", options, batches=ranked())
    assert report.guard is not None and report.guard.ne_loss <= 0.001 and report.guard.fallbacks
    given = export_module(
        Ranker(hook=False),
        tmp_path / "given",
        options,
        batches=ranked(),
        predictions=lambda model, batch: (model(batch["user"], batch["items"]), batch["clicked"].float()),
    )
    assert given.guard == report.guard


def bad_batches(kind: str) -> list[Any]:
    dense, sparse, label = batches()[0]
    return {
        "none": [],
        "one class": [(dense, sparse, torch.zeros_like(label))],
        "labels": [(dense, sparse, label + 0.5)],
        "shape": [(dense, sparse, label[:3])],
        "nan": [(dense * float("nan"), sparse, label)],
    }[kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("none", "there are no validation batches"),
        ("one class", "all 64 validation labels are 0"),
        ("labels", "labels are not 0 or 1"),
        ("shape", r"its output is \(64,\) for labels of shape \(3,\)"),
        ("nan", "predicts NaN or infinity"),
    ],
)
def test_data_that_cannot_be_judged(tmp_path: Path, kind: str, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        export_module(built_model(), tmp_path / "out", batches=bad_batches(kind))
    assert list(tmp_path.iterdir()) == []


def test_tables_alone_have_no_predictions(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="needs the model around the tables"):
        export_module(nn.EmbeddingBag(5, 4, mode="sum"), tmp_path / "out", batches=ranked())

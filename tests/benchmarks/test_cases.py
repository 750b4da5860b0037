"""Every case of the Pareto plots trains, and is as small as it says."""

import pytest
import torch

from benchmarks.pareto import BestForms
from benchmarks.peers.cases import ADAGRAD, ADAM, COUNTED, METHODS, Task, make
from benchmarks.peers.fronts import LABELS, family_of
from benchmarks.quality import quiet_trainer
from lightning_embcomp.data import SyntheticClickLog, SyntheticClickLogDataModule
from lightning_embcomp.models.features import feature_records

LOG = SyntheticClickLog(num_rows=1_200, num_embeddings=(30, 4_000), num_dense=2, validation=0.2, test=0.2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
def test_cases_train_and_are_as_small_as_asked_for(method: str) -> None:
    torch.manual_seed(0)  # how closely six steps meet a size depends on the draw
    data = SyntheticClickLogDataModule(LOG, batch_size=120)
    rates = {ADAGRAD: 0.1, COUNTED: 64.0, ADAM: 0.03}
    task = Task(features=feature_records(data.features), num_dense=2, steps=6, rates=rates, search=1)
    level = METHODS[method][0]
    case = make(method, level, task)
    best = BestForms(case, patience=1)
    quiet_trainer([*case.callbacks, best], epochs=1 + case.extra_epochs, check=1.0).fit(case.model, data)
    assert best.forms.keys() | best.unreachable.keys() == case.forms.keys()
    assert set(best.scores) == set(best.forms)
    if method in ("pruning", "hashing", "rows", "qr"):
        assert task.training / best.peak >= 0.97 * level
    for name, form in best.forms.items():
        assert family_of(method, name) in LABELS
        ratio = task.weights / form["serving_bytes"]
        wanted = {"8 bits": 3.2, "4 bits": 5.3, "2 bits": 8.0}.get(name, level)
        if method in ("plain", "restart"):
            wanted = float(name.split()[1]) if name.startswith("sparse") else wanted
            assert ratio == pytest.approx(wanted, rel=0.03)
        elif method in ("precision", "together", "pep"):
            assert ratio >= 0.9 * level

"""Compressed tables that are sharded over GPUs, rehearsed without any."""

from pathlib import Path

import lightning.pytorch as pl
import pytest

from lightning_embcomp import DimensionPruning, MixedPrecisionSearch
from lightning_embcomp.errors import SetupError
from lightning_embcomp.strategies import TorchRecStrategy
from tests.pretend import GPU
from tests.strategies.launch import launch


@pytest.mark.parametrize(("optimizer", "built"), [("sgd", "late"), ("rowwise_adagrad", "early")])
def test_runs_on_a_gpu(optimizer: str, built: str, tmp_path: Path) -> None:
    """Training, pruning events, evaluation and checkpoints equal those on the CPU."""
    launch("tests.strategies.pretended", "training", optimizer, tmp_path, built)


def test_methods_that_stay_on_the_cpu_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = pl.Trainer(strategy=TorchRecStrategy(), accelerator="cpu", devices=2, logger=False)
    monkeypatch.setattr(TorchRecStrategy, "root_device", property(lambda strategy: GPU))
    DimensionPruning(target=0.5).check_trainer(trainer)
    with pytest.raises(SetupError, match="runs on cpu where tables are sharded so far, not on cuda:0"):
        MixedPrecisionSearch(bits=8).check_trainer(trainer)

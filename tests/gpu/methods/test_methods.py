"""Methods on a GPU against the same fits on the CPU, and what they must not do there: wait."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from lightning_embcomp import FrequencyAwareLR, ModelExport
from lightning_embcomp.engine.counters import counters_of
from lightning_embcomp.engine.routed import RoutedEmbeddings
from tests.pretended_fits import CASES, EVENTS, SGD, fit

pytestmark = pytest.mark.gpu
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
STEPS = 20
CHOOSING = {"sensitivity", "softmax", "together", "measured", "budget"}
"""Cases in which the last digit of a number may decide about a row or a width."""


def engines(module: torch.nn.Module) -> list[RoutedEmbeddings]:
    return [part for part in module.modules() if isinstance(part, RoutedEmbeddings)]


def numbers(module: torch.nn.Module) -> Tensor:
    """Full tables and the dense part."""
    tables = [e.read_rows(t, 0, table.rows) for e in engines(module) for t, table in enumerate(e.tables)]
    dense = [value for key, value in module.named_parameters() if ".engine." not in key]
    return torch.cat([part.detach().cpu().double().flatten() for part in (*tables, *dense)])


def assert_close(case: str, one: torch.nn.Module, two: torch.nn.Module) -> None:
    """Numbers agree to 1e-3, but for 1 in 1000, or 1 in 20 where something is chosen."""
    wanted, found = numbers(one), numbers(two)
    assert bool(found.isfinite().all())
    apart = (wanted - found).abs() > 1e-4 + 1e-3 * wanted.abs()
    assert float(apart.double().mean()) <= (0.05 if case in CHOOSING else 0.001)


@pytest.mark.parametrize("case", CASES)
def test_fits_equal_those_on_the_cpu(case: str) -> None:
    one, _ = fit(case, CPU, steps=STEPS)
    two, _ = fit(case, GPU, steps=STEPS)
    assert_close(case, one, two)
    for here, there in zip(engines(one), engines(two), strict=True):
        counters, others = counters_of(here), counters_of(there)
        if counters is not None and others is not None:  # they depend on ids alone, random bits included
            for values, theirs in zip(counters.values, others.values, strict=True):
                assert values is not None and theirs is not None and torch.equal(values, theirs.cpu())


class NoWaiting(pl.Callback):
    """Raises where the host waits, in steps without an event."""

    def __init__(self, events: set[int]) -> None:
        self.events = events
        self.device: set[str] = set()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        step = trainer.global_step + 1
        if step > 3 and step not in self.events:  # the first ones compile, and make constants
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")
        self.device |= {rows.device.type for engine in engines(pl_module) for rows in engine.split_embedding_weights()}


@pytest.fixture
def waiting_again() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("waiting_again")
@pytest.mark.parametrize("case", [name for name, (_, model) in CASES.items() if "none" not in model.values()])
def test_steps_do_not_wait(case: str) -> None:
    """With fused optimizers; other ones are given lists of rows whose lengths the host asks for."""
    callback = NoWaiting(EVENTS.get(case, set()))
    fit(case, GPU, callback, steps=STEPS)
    assert callback.device == {"cuda"}


@pytest.mark.parametrize("case", ["softmax", "half_life", "together", "not_fused"])
def test_a_checkpoint_of_a_gpu_resumes_on_the_cpu(case: str, tmp_path: Path) -> None:
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 8:
                trainer.save_checkpoint(tmp_path / "gpu.ckpt")

    one, _ = fit(case, GPU, Save())
    two, _ = fit(case, CPU, resume=tmp_path / "gpu.ckpt")
    assert_close(case, one, two)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("case", ["measured", "not_fused", "one_width"])
def test_16_bit_training(case: str, precision: str) -> None:
    module, _ = fit(case, GPU, steps=STEPS, precision=precision)
    assert bool(numbers(module).isfinite().all())
    for engine in engines(module):
        assert engine.loss_scaler is None
        assert engine.utility is None or bool(engine.utility.values.isfinite().all())


def test_tables_are_exported_from_a_gpu(tmp_path: Path) -> None:
    export = ModelExport(str(tmp_path / "served"), max_ne_loss=0.5)
    fit("together", GPU, export, steps=STEPS)
    assert export.report is not None and export.report.guard is not None
    assert export.report.guard.max_logit_difference < 1e-3


def test_fbgemm_counts_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    made = lambda: [FrequencyAwareLR(backend="fbgemm", log_every_n_steps=0)]  # noqa: E731
    monkeypatch.setitem(CASES, "fbgemm", (made, SGD))
    one, _ = fit("fbgemm", CPU, steps=STEPS)
    two, _ = fit("fbgemm", GPU, steps=STEPS)
    assert_close("fbgemm", one, two)

"""Methods on a GPU, rehearsed without one: whole fits on tensors that count as those of a GPU.

Fits are equal to those on the CPU, no operation mixes devices, and between events the host waits for nothing.
"""

from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_embcomp import ModelExport
from lightning_embcomp.engine.bag_layout import pooled_layout
from lightning_embcomp.engine.counters import CounterSettings, share_counters
from lightning_embcomp.engine.lookups import Call, DirectLookup, unscaled
from lightning_embcomp.engine.rates import RunningRates, TableRates, set_rates
from lightning_embcomp.engine.routed import RoutedEmbeddings
from lightning_embcomp.kernels.count import row_gains
from lightning_embcomp.methods.mpe.module import RowQuantizer
from tests.pretend import GPU, PretendGPU, pretended_gpu
from tests.pretended_fits import CASES, EVENTS, fit, scaled_on_cpu, states
from tests.triton_process import run_interpreted

from .engines import batch, make_engine, random_codes
from .test_devices import far_away  # noqa: F401 - a fixture

CPU = torch.device("cpu")


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-7, msg=f"{key}: {found[key]}, not {value}")


class Watch(pl.Callback):
    """Notes where the host waited in steps without an event."""

    def __init__(self, gpu: PretendGPU, events: set[int]) -> None:
        self.gpu, self.events = gpu, events
        self.before = 0
        self.found: list[tuple[int, tuple[str, str, str]]] = []
        self.held: set[torch.device] = set()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        self.before = len(self.gpu.waits)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        step = trainer.global_step
        # The first two make constants, which stay on the device.
        if step > 2 and step not in self.events:
            self.found += [(step, wait) for wait in self.gpu.waits[self.before :]]
        engines = [module for module in pl_module.modules() if isinstance(module, RoutedEmbeddings)]
        self.held |= {rows.device for engine in engines for rows in engine.split_embedding_weights()}


@pytest.mark.parametrize("case", CASES)
def test_fits_stay_on_their_device_and_do_not_wait(case: str) -> None:
    wanted = states(fit(case, CPU)[0])
    with pretended_gpu() as gpu:
        watch = Watch(gpu, EVENTS.get(case, set()))
        module, _ = fit(case, GPU, watch, pretended=True)
        assert watch.held == {GPU}
    found = states(module)
    assert_same(found, wanted)
    assert not watch.found


@pytest.mark.parametrize("case", ["softmax", "half_life", "together"])
def test_a_checkpoint_of_a_gpu_resumes_on_the_cpu(case: str, tmp_path: Path) -> None:
    whole = states(fit(case, CPU, steps=12)[0])

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
            if trainer.global_step == 8:
                trainer.save_checkpoint(tmp_path / "gpu.ckpt")

    with pretended_gpu():
        fit(case, GPU, Save(), pretended=True)
    found = states(fit(case, CPU, resume=tmp_path / "gpu.ckpt")[0])
    assert_same(found, whole)


def test_tables_are_exported_from_a_gpu(tmp_path: Path) -> None:
    exports = [ModelExport(str(tmp_path / name), max_ne_loss=0.5) for name in ("cpu", "gpu")]
    fit("together", CPU, exports[0])
    with pretended_gpu():
        fit("together", GPU, exports[1], pretended=True)
    one, two = (export.report for export in exports)
    assert one is not None and two is not None and one.guard is not None and two.guard is not None
    assert one.serving == two.serving and abs(one.guard.ne_after - two.guard.ne_after) < 1e-6
    assert two.guard.max_logit_difference < 1e-5


def test_measures_do_not_depend_on_the_factor_of_16_bit_training() -> None:
    """Utilities, sensitivities and steps are made from gradients, which are those of a loss that is multiplied."""

    class Measured(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
            [engine] = [module for module in pl_module.modules() if isinstance(module, RoutedEmbeddings)]
            assert engine.loss_scaler is not None and engine.utility is not None
            assert isinstance(engine.values, RowQuantizer)
            self.found = [engine.utility.values.float(), engine.values.state.error.clone()]

    def measured(factor: float) -> list[torch.Tensor]:
        callback = Measured()
        fit("measured", CPU, callback, steps=3, plugins=[scaled_on_cpu(factor)])
        return callback.found

    for one, two in zip(measured(1.0), measured(256.0), strict=True):
        assert float((one - two).norm() / one.norm()) < 0.02


def test_steps_that_are_skipped_leave_no_trace() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    found = unscaled(torch.tensor([8.0, torch.inf, -torch.inf, torch.nan]), scaler, power=2)
    assert found.tolist() == [0.5, 0.0, 0.0, 0.0]


def test_training_through_the_kernels_of_a_gpu_equals_that_of_the_cpu() -> None:
    """By Triton's interpreter."""
    differences = run_interpreted("tests.engine.interpreted_methods")
    assert len(differences) == 5
    for name, difference in differences.items():
        assert difference < 1e-5, name


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("fused", [True, False])
def test_kernels_are_handed_tensors_of_one_device(fused: bool, far_away: FakeTensorMode) -> None:  # noqa: F811
    """Counting and rates as the Triton kernels are called; they are not launched."""
    from lightning_embcomp.kernels.triton import widths_and_runs

    engine = make_engine("sgd" if fused else None, random_codes(1))
    counters = share_counters(engine, [0, 1, 2], CounterSettings(), "test")
    for t in (0, 2):
        set_rates(engine, t, TableRates(RunningRates(counters), 0.1), "test")
    given = batch(0)
    widths_and_runs(engine.columns)  # read once per engine, outside of training steps
    known = engine.columns.__dict__["_widths_and_runs"]
    with far_away:
        engine.to(GPU)
    engine.columns.__dict__["_widths_and_runs"] = known
    engine.counting._prepare()  # numbers of the host
    with far_away:
        ids, offsets = given.ids.to(GPU), given.offsets.to(GPU)
        layout = pooled_layout(engine.features, 8)
        call = Call(engine, layout, ids, offsets, None, None, engine.moves)
        counts = call.begin_backward(torch.empty(8, engine.output_dim, device=GPU), deferred=fused)
        assert counts is not None
        if fused:
            context = SimpleNamespace()
            rules = engine._direct_rules(None)
            assert rules is not None
            pooled = DirectLookup.forward(context, call, rules, torch.zeros(()))
            DirectLookup.backward(context, torch.ones_like(pooled))
        else:
            assert row_gains(counts, ids, offsets, layout).device == GPU
    assert {values.device for values in counters.values if values is not None} == {GPU}

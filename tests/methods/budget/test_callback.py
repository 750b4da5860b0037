"""The budget in a trainer: bytes that are true, states that come back, settings that are refused."""

import copy
import logging
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_embcomp import (
    DimensionPruning,
    FrequencyAwareLR,
    OwnershipError,
    PrecisionSearch,
    PruningSchedule,
    RowQuantization,
    SetupError,
)
from lightning_embcomp.callbacks.budget import CompressionBudget
from lightning_embcomp.data import SyntheticClickLog, SyntheticClickLogDataModule
from lightning_embcomp.engine.memory import engine_bytes
from lightning_embcomp.export import build, hosts_of
from lightning_embcomp.export.accounting import serving_bytes
from lightning_embcomp.export.errors import ExportError
from lightning_embcomp.export.loading import serve_tables
from lightning_embcomp.methods.budget import accounting, snapshot
from lightning_embcomp.methods.budget.config import BudgetControl
from lightning_embcomp.methods.budget.module import BudgetController
from lightning_embcomp.models import ClickModel
from tests.conformance.cases import assert_equal_states

ROWS = (40, 300, 3000)
DIM = 16
OFTEN = PruningSchedule(every_n_steps=5, early_steps=(2,))
SEARCH = PrecisionSearch(steps=5, groups=16, frequency="rank", reset=False)
PLAIN = 4 * DIM * sum(ROWS)


def budget(**settings: Any) -> CompressionBudget:
    control = settings.pop("control", {})
    given: dict[str, Any] = {"ratio": 8.0, "max_ne_loss": 0.02, "schedule": OFTEN}
    if settings.get("of") != "training":
        given["search"] = SEARCH
    return CompressionBudget(
        **{**given, **settings}, control=BudgetControl(**{"every_n_steps": 5, "step": 0.5, **control})
    )


def model(optimizer: str = "rowwise_adagrad") -> ClickModel:
    torch.manual_seed(3)
    return ClickModel(embedding_dim=DIM, dense_layers=(8,), over_layers=(16,), embedding_optimizer=optimizer)  # type: ignore[arg-type]


def data() -> SyntheticClickLogDataModule:
    log = SyntheticClickLog(num_rows=4000, num_embeddings=ROWS, num_dense=2)
    return SyntheticClickLogDataModule(log, batch_size=128)


def trainer(*callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "max_epochs": 2}
    quiet |= {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return pl.Trainer(callbacks=list(callbacks), **{**quiet, **settings})


def fit(module: pl.LightningModule, *callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    torch.manual_seed(4)
    runner = trainer(*callbacks, **settings)
    runner.fit(module, datamodule=data())
    return runner


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert not [key for key in one if not torch.equal(one[key], other[key])]


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "none"])
def test_serving_budget_is_met_by_the_exported_tables(optimizer: str) -> None:
    callback, module = budget(), model(optimizer)
    fit(module, callback)
    assert callback.met and callback.report is not None and callback.controller is not None
    assert callback.controller.budget == PLAIN // 8
    artefact = build(hosts_of(module), 8)
    exported = serving_bytes(serve_tables(artefact), artefact.manifest).total
    # Counted without what does not depend on rows: 700 bytes of descriptors of three tables.
    assert callback.report.size <= exported <= callback.report.size + 1000
    assert 0.95 * callback.controller.budget <= callback.report.size <= callback.controller.budget


def test_training_budget_is_met_by_the_storages() -> None:
    callback, module = budget(of="training", ratio=5.0), model()
    fit(module, callback)
    [host] = [part for part in module.modules() if hasattr(part, "engine")]
    held = engine_bytes(host.engine)
    assert callback.met and callback.report is not None and callback.report.size == held
    assert held <= (PLAIN + 4 * sum(ROWS)) / 5
    assert len(callback.members) == 1


def test_memory_is_a_number_of_bytes() -> None:
    callback = budget(ratio=None, memory="30 kB")
    fit(model(), callback)
    assert callback.met and callback.controller is not None and callback.controller.budget == 30_000


def test_both_methods_and_both_kinds_of_bytes_are_logged() -> None:
    callback, module = budget(), model()
    runner = fit(module, callback)
    logged = {name: float(value) for name, value in runner.callback_metrics.items() if name.startswith("budget/")}
    assert {name.partition("/")[2] for name in logged} == {
        *("multiplier", "bytes", "training_bytes", "serving_bytes", "share", "average_bits", "rolled_back", "met"),
        *("ne", "limit", "guard", "snapshot_bytes"),
    }
    assert logged["budget/bytes"] == logged["budget/serving_bytes"] < PLAIN / 4
    assert logged["budget/multiplier"] > 0 and logged["budget/average_bits"] < 8


def test_bytes_by_width_are_those_of_the_export() -> None:
    callback, module = budget(max_ne_loss=None, start=0.5), model()
    fit(module, callback)
    assert callback._plant is not None
    tables, [state] = callback._plant.pruner.tables, callback._plant.training.states  # type: ignore[union-attr]
    widths = state.widths.tolist()
    total = 0
    for table in tables:
        sizes = accounting.bytes_by_width(table, accounting.group_rows(table), widths)
        index = torch.tensor([widths.index(b) for b in state.bits[state.groups.of_table(table.index)].tolist()])
        total += int(sizes.gather(1, index[:, None]).sum())
    artefact = build(hosts_of(module), 8)
    rows = serving_bytes(serve_tables(artefact), artefact.manifest)
    assert total == rows.values + rows.row_parameters + rows.padding


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "sgd", "none"])
def test_a_snapshot_brings_everything_back(optimizer: str) -> None:
    """What follows a step, with training in between, leaves no trace; dense and row state included."""
    callback, module = budget(max_ne_loss=None, ratio=4.0), model(optimizer)
    runner = fit(module, callback)
    plant = callback._plant
    assert plant is not None and plant.training is not None
    module.trainer = runner
    before, saved = state_of(module), plant.save()
    optimizers = copy.deepcopy([optimizer.state_dict() for optimizer in runner.optimizers])
    adam = copy.deepcopy(plant.training.state_dict())
    bits, share = plant.training.states[0].bits.clone(), plant.share
    assert snapshot.nbytes(saved) > sum(tensor.nbytes for tensor in before.values()) - 1000
    for _ in range(2):  # a snapshot may be used again
        for method in ("precision", "width"):
            plant.act(method, plant.size() // 2)
        batch = next(iter(runner.datamodule.train_dataloader()))  # type: ignore[attr-defined]
        module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
        loss = module.training_step(batch, 0)
        loss.backward()
        for one in runner.optimizers:
            one.step()
            one.zero_grad()
        with pytest.raises(AssertionError):
            assert_equal(before, state_of(module))
        plant.restore(saved)
        assert_equal(before, state_of(module))
        assert torch.equal(plant.training.states[0].bits, bits) and plant.share == share
        for found, wanted in zip(runner.optimizers, optimizers, strict=True):
            _assert_same(found.state_dict(), wanted)
        _assert_same(plant.training.state_dict(), adam)


def _assert_same(one: Any, other: Any) -> None:
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            _assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        for a, b in zip(one, other, strict=True):
            _assert_same(a, b)
    else:
        assert one == other


class WorseAfterAStep(pl.Callback):
    """Spoils the last bias between the first step and the event that judges it."""

    def __init__(self, callback: CompressionBudget) -> None:
        self.callback = callback
        self.before: dict[str, Tensor] = {}
        self.after: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: object) -> None:
        controller = self.callback.controller
        assert controller is not None
        if controller.saved is not None and not self.before:
            self.before = {key: value.clone() for key, value in controller.saved["module"].items()}
            with torch.no_grad():
                list(pl_module.model.over_arch.parameters())[-1].add_(5.0)  # type: ignore[union-attr]
        elif self.before and not self.after:
            if self.callback.report is not None and self.callback.report.rolled_back:
                self.after = state_of(pl_module)


def test_a_run_that_leaves_the_guard_is_rolled_back() -> None:
    callback, module = budget(ratio=20.0), model()
    spoiler = WorseAfterAStep(callback)
    fit(module, callback, spoiler)
    assert callback.controller is not None and callback.controller.rollbacks >= 1
    assert_equal(spoiler.before, spoiler.after)
    assert callback.met


class WorseAfterTheLastGoodEvent(pl.Callback):
    """Spoils the last bias one step after every event that found the budget met."""

    def __init__(self, callback: CompressionBudget) -> None:
        self.callback = callback
        self.good: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: object) -> None:
        controller = self.callback.controller
        if controller is None or controller.kept is None or trainer.global_step < 48:
            return
        self.good = {key: value.clone() for key, value in controller.kept["module"].items()}
        with torch.no_grad():
            list(pl_module.model.over_arch.parameters())[-1].add_(5.0)  # type: ignore[union-attr]


def test_a_run_ends_with_the_last_good_state(tmp_path: Path) -> None:
    callback, module = budget(max_ne_loss=0.05), model()
    spoiler = WorseAfterTheLastGoodEvent(callback)
    last = pl.callbacks.ModelCheckpoint(dirpath=tmp_path, save_last=True, save_on_train_epoch_end=True)
    fit(module, callback, spoiler, last, enable_checkpointing=True)
    assert callback.met and spoiler.good
    assert_equal(spoiler.good, state_of(module))
    assert_equal(spoiler.good, torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # the second run writes no checkpoints
def test_a_resume_on_probation_is_bit_identical(tmp_path: Path) -> None:
    through, second = model(), model()
    callback, again = budget(ratio=20.0), budget(ratio=20.0)
    every = pl.callbacks.ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=13, save_top_k=-1, filename="{step}")
    fit(through, callback, every, enable_checkpointing=True)
    saved = torch.load(tmp_path / "step=13.ckpt", weights_only=True)["callbacks"]["CompressionBudget[*]"]
    assert saved["controller"]["saved"]["module"].keys() == through.state_dict().keys()
    torch.manual_seed(99)
    trainer(again).fit(second, datamodule=data(), ckpt_path=tmp_path / "step=13.ckpt")
    assert_equal(state_of(through), state_of(second))
    assert callback.report == again.report
    assert again.controller is not None and callback.controller is not None
    assert again.controller.price == callback.controller.price


def test_a_budget_out_of_reach_is_said(caplog: pytest.LogCaptureFixture) -> None:
    callback = budget(ratio=500.0, max_ne_loss=1e-6, control={"warmup_steps": 10, "recovery": 0.0})
    with pytest.warns(UserWarning, match=r"CompressionBudget\[\*\]: not met: [\d,]+ serving bytes, budget [\d,]+"):
        fit(model(), callback)
    assert not callback.met


def test_a_met_budget_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        fit(model(), budget())
    assert "serving bytes, budget" in caplog.text


def test_a_search_that_starts_anew_goes_all_the_way_at_once() -> None:
    search = PrecisionSearch(epochs=1, groups=16, frequency="rank")
    callback, module = budget(search=search, max_ne_loss=0.5), model()
    seen: list[float] = []

    class Watch(pl.Callback):
        def on_train_epoch_start(self, runner: pl.Trainer, pl_module: pl.LightningModule) -> None:
            assert callback._plant is not None
            seen.append(callback._plant.size())

    runner = trainer(callback, Watch())
    torch.manual_seed(4)
    runner.fit(module, datamodule=data())
    assert seen[1] <= PLAIN // 8 < seen[0]


def test_members_join_once_and_can_be_copied() -> None:
    callback = budget(max_ne_loss=None)
    runner = fit(model(), callback, max_epochs=1)
    names = [type(c).__name__ for c in runner.callbacks]  # type: ignore[attr-defined]
    assert names[:3] == ["DimensionPruning", "MixedPrecisionSearch", "CompressionBudget"]
    callback.setup(runner, runner.lightning_module, "fit")
    assert [type(c).__name__ for c in runner.callbacks] == names  # type: ignore[attr-defined]
    for copied in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert copied.controller is None and copied.members[0] is not callback.members[0]
        assert copied.state_key == "CompressionBudget[*]"


def test_a_rate_callback_works_beside_it() -> None:
    callback = budget(max_ne_loss=None)
    fit(model("sgd"), callback, FrequencyAwareLR(), max_epochs=1)
    assert callback.met


def test_the_order_of_callbacks_does_not_matter() -> None:
    first, second = model("sgd"), model("sgd")
    fit(first, FrequencyAwareLR(), budget(max_ne_loss=None), max_epochs=1)
    fit(second, budget(max_ne_loss=None), FrequencyAwareLR(), max_epochs=1)
    assert_equal_states(state_of(first), state_of(second))


def test_a_second_owner_is_named() -> None:
    with pytest.raises(OwnershipError, match=r"brings its own DimensionPruning\[\*\]"):
        fit(model(), budget(), DimensionPruning(target=0.5))
    with pytest.raises(OwnershipError, match="both DimensionPruning"):
        fit(model(), budget(), DimensionPruning(target=0.5, tables="t_feature_1"))


def test_a_guard_needs_validation_data() -> None:
    with pytest.raises(ExportError, match="no validation data for the NE guard"):
        fit(model(), budget(), limit_val_batches=0)


def test_a_checkpoint_of_other_bytes_is_refused(tmp_path: Path) -> None:
    fit(model(), budget(max_ne_loss=None, of="training"), max_epochs=1).save_checkpoint(tmp_path / "a.ckpt")
    other = budget(max_ne_loss=None)
    with pytest.raises(SetupError, match="written with of='training'"):
        other.load_state_dict({"of": "training"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": None}, "either memory .* or ratio"),
        ({"memory": "1GB"}, "either memory .* or ratio"),
        ({"ratio": 1.0}, "above 1, not 1.0"),
        ({"max_ne_loss": 0.0}, "must be positive, not 0.0"),
        ({"max_ne_loss": None, "reference_ne": 0.8}, "reference_ne has no effect"),
        ({"reference_ne": -1.0}, "above 0, not -1.0"),
        ({"start": 0.0}, "start is a share"),
        ({"of": "disk"}, "'serving' or 'training'"),
        ({"of": "training", "search": SEARCH}, "have no effect with of='training'"),
        ({"search": PrecisionSearch(method="softmax")}, "must be 'sensitivity'"),
        ({"search": PrecisionSearch(widths=(0, 8, 32))}, "use widths up to 8"),
        ({"quantization": RowQuantization(offset=True)}, "leave it out"),
        ({"control": {"step": 0.0}}, "step is a logarithm"),
        ({"control": {"every_n_steps": 0}}, "every_n_steps must be at least 1"),
        ({"control": {"tolerance": 1.0}}, "tolerance is a share"),
        ({"control": {"price_rate": 0.0}}, "price_rate must be positive"),
        ({"control": {"recovery": 1.0}}, "recovery is a share"),
        ({"control": {"warmup_steps": -1}}, "warmup_steps must not be negative"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        budget(**settings)


def test_default_control() -> None:
    assert BudgetController(10, max_loss=0.1).control == BudgetControl()

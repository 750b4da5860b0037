"""What only dimension pruning promises in a pipeline."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_embcomp import DimensionPruning, Granularity, OwnershipError, PruningSchedule, SetupError
from lightning_embcomp.engine.memory import table_memory
from lightning_embcomp.methods.fiited.module import BudgetError

from .cases import DIM, OFTEN, ROWS, data, fit, held_bytes, hosts, model, state_of, trainer


class Recorder(pl.Callback):
    """Bytes and logged values after every step."""

    def __init__(self) -> None:
        self.held: list[int] = []
        self.logged: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.held.append(held_bytes(pl_module))
        self.logged.append({key: float(value) for key, value in trainer.callback_metrics.items()})


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "sgd"])
@pytest.mark.parametrize("budget", ["80kB", "120kB"])
def test_byte_budget_is_held_at_every_step(budget: str, optimizer: str) -> None:
    recorder, module = Recorder(), model(embedding_optimizer=optimizer)
    fit(module, DimensionPruning(budget=budget, schedule=OFTEN), recorder)
    limit = int(budget[:-2]) * 1000
    assert len(recorder.held) == 25
    assert all(0.95 * limit <= held <= limit for held in recorder.held)


def test_infeasible_budget_is_refused() -> None:
    with pytest.raises(
        BudgetError, match=r"a budget of 2,000 bytes is not above the .* bytes that router, utilities and counters"
    ):
        fit(model(), DimensionPruning(budget="2kB"))


@pytest.mark.parametrize("target", [0.3, 0.65, 0.95])
def test_target_is_met_at_every_step(target: float) -> None:
    recorder, module = Recorder(), model()
    fit(module, DimensionPruning(target=target, schedule=OFTEN), recorder)
    plain = sum(ROWS) * DIM * 4
    weights = sum(table_memory(hosts(module)[0].engine, t).weights for t in range(3))
    assert 0 <= (1 - target) * plain + 1 - weights <= DIM + 1
    events = [step for step in range(1, 26) if OFTEN.is_event(step)]
    assert recorder.logged[0].get("fiited/live_ratio") is None
    for step in events:
        assert recorder.logged[step - 1]["fiited/live_ratio"] == pytest.approx(1 - target, abs=1e-3)
        assert recorder.logged[step - 1]["fiited/bytes"] == recorder.held[step - 1]
        assert 0 <= recorder.logged[step - 1]["fiited/churn"] < 1


def test_two_instances_on_different_tables() -> None:
    module = model()
    one = DimensionPruning(target=0.9, tables="t_feature_2", schedule=OFTEN)
    two = DimensionPruning(target=0.5, tables=["t_feature_1"], schedule=OFTEN)
    fit(module, one, two)
    engine = hosts(module)[0].engine
    live = [table_memory(engine, t).weights / (ROWS[t] * DIM * 4) for t in range(3)]
    assert live == pytest.approx([1.0, 0.5, 0.1], abs=0.01)
    assert one.pruner is not None and one.pruner.live_ratio() == live[2]


def test_two_instances_resume(tmp_path: Path) -> None:
    def callbacks() -> list[pl.Callback]:
        return [
            DimensionPruning(target=0.9, tables="t_feature_2", schedule=OFTEN),
            DimensionPruning(target=0.5, tables="t_feature_1", schedule=PruningSchedule(every_n_steps=7)),
        ]

    through, first, second = model(), model(), model()
    fit(through, *callbacks(), max_epochs=2)
    fit(first, *callbacks()).save_checkpoint(tmp_path / "half.ckpt")
    trainer(*callbacks(), max_epochs=2).fit(second, datamodule=data(), ckpt_path=tmp_path / "half.ckpt")
    one, other = state_of(through), state_of(second)
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_two_instances_on_one_table_name_both() -> None:
    with pytest.raises(OwnershipError) as caught:
        fit(model(), DimensionPruning(target=0.5), DimensionPruning(target=0.5, tables="t_feature_1"))
    for part in ("DimensionPruning[*]", "DimensionPruning[t_feature_1]", "t_feature_1'", "different tables"):
        assert part in str(caught.value)
    with pytest.raises(RuntimeError, match="state_key"):
        trainer(DimensionPruning(target=0.5), DimensionPruning(target=0.6))


def test_two_instances_that_measure_differently() -> None:
    with pytest.raises(ValueError, match="t_feature_2.*a collection of their own"):
        fit(
            model(),
            DimensionPruning(target=0.5, tables="t_feature_2"),
            DimensionPruning(target=0.5, tables="t_feature_1", granularity=Granularity(utility="frequency")),
        )


def test_second_run_with_another_cut_is_refused() -> None:
    module = model()
    fit(module, DimensionPruning(target=0.5))
    with pytest.raises(SetupError, match=r"already stored in 4 chunks with layout 'prefix', but 2 chunks"):
        fit(module, DimensionPruning(target=0.5, granularity=Granularity(chunks=2)))


def test_checkpoint_of_another_cut_is_refused() -> None:
    saved = DimensionPruning(target=0.5).state_dict()
    with pytest.raises(SetupError, match=r"written with chunks=4, layout='prefix'; this run has chunks=2"):
        DimensionPruning(target=0.5, granularity=Granularity(chunks=2)).load_state_dict(saved)


def test_no_events_after_the_last_step() -> None:
    recorder, module = Recorder(), model()
    fit(module, DimensionPruning(target=0.5, schedule=PruningSchedule(every_n_steps=2, last_step=6)), recorder)
    churn = [logged.get("fiited/churn") for logged in recorder.logged]
    assert len(set(churn[6:])) == 1
    schedule = PruningSchedule(every_n_steps=2, last_step=6)
    assert [step for step in range(30) if schedule.is_event(step)] == [2, 4, 6]


@pytest.mark.parametrize("utility", ["gradient", "frequency", "peak_gradient"])
def test_frequent_rows_are_the_widest(utility: str) -> None:
    module = model()
    settings = Granularity(utility=utility)  # type: ignore[arg-type]
    fit(module, DimensionPruning(target=0.8, granularity=settings, schedule=OFTEN), max_epochs=2)
    source = data()
    counts = source.id_counts("feature_2")
    codes = hosts(module)[0].engine.router.read(2, 0, ROWS[2])[0].float()
    frequent, rare = counts >= counts.sort(descending=True).values[30], counts <= 1
    assert codes[frequent].mean() > codes[rare].mean() + 1

"""What plans foresee, against shards."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest

from lightning_embcomp.strategies import ShardingError
from lightning_embcomp.strategies.resharding import ReshardOnImbalance, place
from tests.processes import run_processes


def test_shards_take_what_was_planned() -> None:
    """As a run starts, and after pruning events that go by what was measured."""
    run_processes(2, "tests.planners.sharded_worker", "table_wise", "row_wise", "column_wise", "data_parallel")


def test_moved_tables_train_on_as_before() -> None:
    """Losses are equal to the bit, and what cannot be moved is refused."""
    run_processes(2, "tests.planners.resharding_worker")


def test_tables_are_placed_by_load_and_room() -> None:
    assert place([5, 4, 3, 2], [1, 1, 1, 1], [0, 0, 1, 1], 2) == [0, 1, 1, 0]
    # No rank may hold more than the fullest does, 11: nothing can join the largest table.
    assert place([5, 4, 3, 2], [11, 9, 1, 1], [0, 1, 1, 1], 2) == [0, 1, 1, 1]
    assert place([0, 0], [1, 1], [1, 1], 2) == [1, 1]


@pytest.mark.parametrize("wrong", [{"every_n_steps": 0}, {"tolerance": 1.0}])
def test_settings_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ReshardOnImbalance(**wrong)


def test_other_strategies_have_nothing_to_move() -> None:
    callback = ReshardOnImbalance()
    trainer = pl.Trainer(accelerator="cpu", logger=False, callbacks=[callback], enable_checkpointing=False)
    with pytest.raises(ShardingError, match="strategy='torchrec'"):
        callback.on_train_start(trainer, pl.LightningModule())

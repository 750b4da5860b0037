"""What the engine refuses, and what it does after a move that failed."""

import signal
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lightning_embcomp.engine.layout import ClassMap, LogicalTable
from lightning_embcomp.engine.optimizer import FusedOptimizerSpec
from lightning_embcomp.engine.plan import FixedPlan
from lightning_embcomp.engine.routed import RoutedEmbeddings, RoutedOptions


def engine_of(rows: int = 200) -> RoutedEmbeddings:
    spec = FusedOptimizerSpec(kind="sgd", options={"learning_rate": 1.0})
    table = LogicalTable(name="a", rows=rows, dim=8, chunks=2)
    engine = RoutedEmbeddings([table], options=RoutedOptions(optimizer=spec))
    engine.move(FixedPlan([2]))
    engine.initialise(0, lambda weight: weight.fill_(1.0))
    engine.clear_row_state()
    return engine


class FailingPlan(FixedPlan):
    """Works when it is counted, and fails when rows move."""

    def __init__(self, error: BaseException | None) -> None:
        super().__init__([1])
        self.error, self.passes = error, 0

    def begin(self) -> None:
        self.passes += 1

    def codes(self, table: int, start: int, stop: int, current: Tensor) -> Tensor:
        if self.passes == 2:
            if self.error is not None:
                raise self.error
            signal.raise_signal(signal.SIGINT)
        return super().codes(table, start, stop, current)


@pytest.mark.parametrize("offsets", [[0, 3, 1, 4], [0, 2_000_000_000, 1, 4]])
def test_falling_offsets_are_refused(offsets: list[int]) -> None:
    with pytest.raises(ValueError, match="must not fall: bag 1"):
        engine_of()(torch.tensor([0, 1, 2, 3]), torch.tensor(offsets))


def test_a_failed_move_refuses_to_go_on() -> None:
    engine = engine_of()
    with pytest.raises(MemoryError):
        engine.move(FailingPlan(MemoryError()))
    ids, offsets = torch.tensor([0]), torch.tensor([0, 1])
    for use in (lambda: engine(ids, offsets), engine.state_dict, lambda: engine.move(FixedPlan([2]))):
        with pytest.raises(RuntimeError, match="load the last checkpoint"):
            use()


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Python's own handler, which a process started in the background does not have."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def test_an_interrupt_waits_until_rows_have_moved(ctrl_c: None) -> None:
    engine = engine_of()
    with pytest.raises(KeyboardInterrupt):
        engine.move(FailingPlan(None))
    assert engine(torch.tensor([199]), torch.tensor([0, 1])).detach()[0].tolist() == [1.0] * 4 + [0.0] * 4


def test_more_classes_than_a_byte_numbers_are_refused() -> None:
    tables = [LogicalTable(name=f"t{k}", rows=1, dim=20 * k, chunks=5, layout="chunks") for k in range(1, 10)]
    with pytest.raises(ValueError, match="279 row classes, more than 255"):
        ClassMap.of(tables)


def test_gradients_in_eval_mode_update_rows_but_no_utilities() -> None:
    engine = engine_of().eval()
    engine(torch.tensor([3]), torch.tensor([0, 1])).sum().backward()
    assert engine(torch.tensor([3]), torch.tensor([0, 1])).detach()[0].tolist() == [0.0] * 8

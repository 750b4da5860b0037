"""Bad ids of a GPU are reported when their answer has arrived, in order; the GPU is a stand-in."""

from collections import deque
from functools import partial

import pytest
import torch

from lightning_embcomp.kernels.route import IdOutOfRangeError, watch

GPU = torch.device("cuda", 0)


class Arrival:
    """An event that is over when told so."""

    def __init__(self) -> None:
        self.over = False

    def query(self) -> bool:
        return self.over

    def synchronize(self) -> None:
        self.over = True


def findings(first: int, value: int) -> watch.Findings:
    """Two features of 4 ids over tables of 10 and 20 rows; programs of 2 ids."""
    return watch.Findings(
        first=torch.tensor([first]),
        values=torch.full((4,), value),
        block=2,
        bounds=torch.tensor([0, 4, 8]),
        limits=torch.tensor([10, 20]),
    )


@pytest.fixture
def arrivals(monkeypatch: pytest.MonkeyPatch) -> list[Arrival]:
    """A good batch, one with a bad id, and another bad one, all on their way."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    events = [Arrival() for _ in range(3)]
    batches = [findings(watch.NEVER, 0), findings(5, 21), findings(1, -3)]
    on_their_way = deque(
        (partial(watch._raise_for, found), found.first, event) for found, event in zip(batches, events, strict=True)
    )
    monkeypatch.setitem(watch._waiting, GPU, on_their_way)  # type: ignore[arg-type]
    return events


def test_nothing_is_said_before_the_answer_is_there(arrivals: list[Arrival]) -> None:
    watch.check(GPU)
    arrivals[0].over = True
    watch.check(GPU)
    arrivals[1].over = True
    with pytest.raises(IdOutOfRangeError, match="id 21 of feature 1 at position 5 is outside 0..19"):
        watch.check(GPU)
    arrivals[2].over = True
    watch.check(GPU)  # the third is of the run that has ended


def test_waiting_brings_the_first_error(arrivals: list[Arrival]) -> None:
    with pytest.raises(IdOutOfRangeError, match="id 21 of feature 1"):
        watch.check(GPU, wait=True)
    watch.check(GPU, wait=True)


def test_nothing_is_said_of_a_run_that_ended_by_another_error(arrivals: list[Arrival]) -> None:
    watch.forget(torch.device("cpu"))
    assert watch._waiting[GPU]
    watch.forget(GPU)
    watch.check(GPU, wait=True)


def test_on_a_cpu_the_answer_is_there_at_once() -> None:
    watch.report(findings(watch.NEVER, 0))
    with pytest.raises(IdOutOfRangeError, match="id 21 of feature 0 at position 3"):
        watch.report(findings(3, 21))


def test_nothing_is_late_on_a_cpu() -> None:
    watch.check(torch.device("cpu"), wait=True)

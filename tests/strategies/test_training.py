"""Two processes train as one with the whole batch, under Lightning's Trainer."""

import pytest

from tests.strategies.launch import launch


@pytest.mark.parametrize(
    "scenario",
    ["optimizers_in_backward", "optimizers_of_the_module", "other_modules", "optimizer_kinds", "refusals"],
)
def test_two_processes(scenario: str) -> None:
    launch("tests.strategies.training", scenario)

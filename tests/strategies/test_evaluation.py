"""Evaluation, batches and options of the strategy, with two processes."""

from tests.strategies.launch import launch


def test_evaluation() -> None:
    launch("tests.strategies.evaluating", "evaluation")

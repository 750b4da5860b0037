"""Ids of the next batch on their way while this one trains."""

from tests.strategies.launch import launch


def test_ids_ahead() -> None:
    launch("tests.strategies.pipelining", "ids_ahead")

"""Two processes where little is as usual."""

from pathlib import Path

import pytest

from tests.strategies.launch import launch


@pytest.mark.parametrize("scenario", ["averages", "copies", "earlier_runs", "keywords", "moved_rates"])
def test_two_processes(scenario: str) -> None:
    launch("tests.strategies.edges", scenario)


def test_fewer_rows_than_processes(tmp_path: Path) -> None:
    launch("tests.strategies.edges", "few_rows", tmp_path)

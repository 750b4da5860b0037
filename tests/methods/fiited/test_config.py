"""Settings: what is accepted, and what the refusal of the rest says."""

from typing import Any

import pytest

from lightning_embcomp import DimensionPruning, Granularity, PruningSchedule
from lightning_embcomp.methods.fiited.config import check_target
from lightning_embcomp.sizes import parse_bytes


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (1, 1),
        (12345, 12345),
        ("7", 7),
        ("2GB", 2_000_000_000),
        ("2 gb", 2_000_000_000),
        (" 1.5KiB ", 1536),
        (".5MB", 500_000),
        ("512 MiB", 512 * 2**20),
        ("3TiB", 3 * 2**40),
        ("10B", 10),
        ("2G", 2_000_000_000),
        ("2K", 2000),
    ],
)
def test_sizes(given: int | str, wanted: int) -> None:
    assert parse_bytes(given) == wanted


@pytest.mark.parametrize(
    "given", ["", "GB", "-1", "-2GB", 0, "0", "0.1", "2 XB", "2 GBs", "1e9", "1,000", "two", "2GB2"]
)
def test_what_is_no_size_is_refused(given: int | str) -> None:
    with pytest.raises(ValueError, match="is not a size in bytes: write for example 2GB"):
        parse_bytes(given)


@pytest.mark.parametrize("target", [0, 0.0, 0.5, 0.9999])
def test_targets(target: float) -> None:
    assert check_target(target) == target


@pytest.mark.parametrize(
    ("target", "hint"),
    [(65, "for 65 % write 0.65"), (1, "for 1 % write 0.01"), (-0.1, "not -0.1"), (float("nan"), "nan")],
)
def test_targets_out_of_range(target: float, hint: str) -> None:
    with pytest.raises(ValueError, match=f"from 0 to below 1.*{hint}"):
        DimensionPruning(target=target)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "either target .* or budget"),
        ({"target": 0.5, "budget": 100}, "either target .* or budget"),
        ({"budget": "many"}, "'many' is not a size"),
        ({"target": 0.5, "scope": "row"}, "scope must be 'global' or 'table', not 'row'"),
        ({"target": 0.5, "scope": "table", "normalize": True}, "normalize has no effect"),
        ({"target": 0.5, "tables": []}, "give at least one table glob"),
    ],
)
def test_callback_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DimensionPruning(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps must be at least 1, not 0"),
        ({"early_steps": (3, 0)}, r"early_steps must be positive, not \(3, 0\)"),
        ({"decay": 0}, "decay must be over 0"),
        ({"decay": 1.01}, "at most 1, not 1.01"),
        ({"decay": float("nan")}, "decay"),
        ({"last_step": 0}, "last_step"),
    ],
)
def test_schedule_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PruningSchedule(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunks": 0}, "chunks must be at least 1, not 0"),
        ({"layout": "suffix"}, "layout must be 'prefix' or 'chunks', not 'suffix'"),
        ({"utility": "loss"}, "utility must be"),
        ({"falloff": 0}, "falloff must be over 0"),
        ({"falloff": 1.5}, "at most 1, not 1.5"),
        ({"hysteresis": -0.1}, "hysteresis must be a number that is not negative"),
        ({"hysteresis": float("nan")}, "hysteresis"),
        ({"sample_every_n_steps": 0}, "sample_every_n_steps must be at least 1"),
    ],
)
def test_granularity_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Granularity(**settings)


def test_events() -> None:
    schedule = PruningSchedule(every_n_steps=50, early_steps=(2, 7, 70), last_step=150)
    assert [step for step in range(-5, 400) if schedule.is_event(step)] == [2, 7, 50, 100, 150]
    assert [step for step in range(5) if PruningSchedule(every_n_steps=1, early_steps=()).is_event(step)] == [
        1,
        2,
        3,
        4,
    ]


def test_settings_cannot_be_changed_behind_the_checks() -> None:
    with pytest.raises(AttributeError):
        PruningSchedule().every_n_steps = 0  # type: ignore[misc]

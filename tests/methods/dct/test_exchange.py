"""The communication hook in several gloo processes, under DistributedDataParallel."""

from .launch import check, outputs, start


def test_two_workers() -> None:
    """Density 1, value types, overshoot, drift, figures, and gradients that cannot be exchanged."""
    names = (
        "whole_density",
        "value_types",
        "explosion",
        "later",
        "warm_up",
        "drift",
        "figures",
        "not_a_number",
        "sparse_gradients",
    )
    check("exchange_worker.py", 2, *names)


def test_error_feedback_of_four_workers() -> None:
    """50 steps of each kind against NumPy."""
    check("exchange_worker.py", 4, "references")


def test_death_of_a_worker() -> None:
    survivor, dead = outputs(start("exchange_worker.py", 2, "death"), timeout=60)
    assert "all checks passed" in survivor, survivor[-4000:]
    assert "all checks passed" not in dead

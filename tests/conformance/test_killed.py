"""A process of a sharded run is killed: the other one ends soon and says why, and the last checkpoint is whole."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests.conformance.test_sharded import WORKER, assert_close, references
from tests.processes import run_processes, start_processes

SPEC = "fiited:sgd"


@pytest.mark.parametrize("when", ["killed-training", "killed-saving"])
def test_killed(when: str, tmp_path: Path) -> None:
    references("synthetic", tmp_path, [f"{SPEC}:row_wise"])
    workers = start_processes(2, WORKER, when, "synthetic", str(tmp_path), f"{SPEC}:row_wise")
    said = workers[1].communicate(timeout=240)[0]
    died = time.monotonic()
    assert workers[1].returncode == -signal.SIGKILL, said
    said = workers[0].communicate(timeout=60)[0]
    assert time.monotonic() - died < 60
    assert workers[0].returncode != 0
    assert "lost contact" in said, said[-3000:]
    assert_close(
        run_processes(
            2, WORKER, "resume", "synthetic", str(tmp_path), f"{SPEC}:row_wise:last", f"{SPEC}:table_wise:last"
        )
    )

"""Bytes and lines of the profile, worked out by hand, and a run on small cases; fits of the growth of costs."""

import json
import sys
import warnings

import numpy as np
import pytest

from benchmarks import profile
from benchmarks.profile import QUICK, HotPath, limit, lines_of, measure, training

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch.distributed.optim scripts functions as it is imported
    from benchmarks.scale import fit
    from benchmarks.scale_ranks import together

WANTED = [
    "routing",
    "pooled lookup",
    "class outputs, there and back",
    "utilities",
    "grouping and update",
    "pruning event",
    "fake quantiser, six widths",
    "threshold selection, 1 %",
    "lookup of 4-bit rows",
    "lookup of rows of mixed bits",
    "expansion of packed rows",
    "export to a file, packed",
]


def test_lines_are_rounded_up_row_by_row() -> None:
    assert lines_of(np.array([0, 1, 64, 65, 256])) == 0 + 1 + 1 + 2 + 4


def test_limit_adds_what_is_streamed_and_what_is_fetched() -> None:
    path = HotPath(name="", step=print, streamed=3e9, lines=2e6)
    assert limit(path, bytes_per_second=6e9, seconds_per_line=1e-8) == pytest.approx(0.5 + 0.02)


def test_routing_and_updates_move_what_the_formulas_say() -> None:
    paths = {path.name: path for path in training(QUICK)}
    ids = QUICK.batch * QUICK.pooling
    assert (paths["routing"].streamed, paths["routing"].lines) == (13 * ids, ids)
    # 16 columns of 4 bytes are one line: no more lines than ids for lookups, and one more per row for its moment.
    lookup, update = paths["pooled lookup"], paths["grouping and update"]
    assert lookup.streamed == update.streamed == 5 * ids + 4 * QUICK.batch * QUICK.dim
    assert 0 < lookup.lines <= ids
    assert lookup.lines < update.lines <= 2 * lookup.lines
    assert paths["pruning event"].streamed > 6 * QUICK.rows


def test_a_path_is_measured_beside_copy_and_gather() -> None:
    found = measure(HotPath(name="p", step=lambda turn: None, streamed=640.0, lines=10, memory=4096), QUICK, 1)
    assert found["bytes_per_second"] * found["seconds"] == pytest.approx(640 + 10 * 64)
    wanted = 640 / found["copy_bytes_per_second"] + 10 / found["gather_lines_per_second"]
    assert found["limit_seconds"] == pytest.approx(wanted)
    assert found["share_of_limit"] == pytest.approx(wanted / found["seconds"])


def test_every_hot_path_is_profiled(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["profile", "--quick"])
    profile.main()
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [path["path"] for path in found] == WANTED
    assert all(path["seconds"] > 0 and path["bytes_per_second"] > 0 for path in found)


def test_a_power_law_is_fitted_with_its_deviation() -> None:
    assert fit([1, 2, 4], [3, 12, 48]) == {"exponent": 2.0, "r_squared": 1.0, "worst_factor": 1.0}
    # Logarithms to base 2: 0, 1, 0 over 0, 1, 2. The law is flat at 1/3, so the middle is 2/3 off.
    bent = fit([1, 2, 4], [1, 2, 1])
    assert bent["exponent"] == 0 and bent["r_squared"] == 0
    assert bent["worst_factor"] == pytest.approx(2 ** (2 / 3), abs=1e-5)


def test_processes_are_as_slow_as_the_slowest() -> None:
    found = [{"seconds": 1.0, "cpu_seconds": 0.5}, {"seconds": 3.0, "cpu_seconds": 0.7}]
    assert together(found) == {"seconds": 3.0, "cpu_seconds": pytest.approx(0.6)}

"""The benchmark on a GPU, run on small cases without one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.clock import Clock

CLOCK = Clock(torch.device("cpu"), 1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", ["routing", "rounding", "streams", "serving", "large"])
def test_parts_run(part: str) -> None:
    results = gpu.PARTS[part](CLOCK, True)
    assert results and all(value is not None for result in results for key, value in result.items() if "ms" in key)


def test_a_part_that_fails_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(clock: Clock, quick: bool) -> list[dict[str, Any]]:
        raise RuntimeError("no more memory")

    monkeypatch.setitem(gpu.PARTS, "routing", broken)
    monkeypatch.setitem(gpu.PARTS, "streams", lambda clock, quick: [{"ms": 1.0}])
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--device", "cpu", "--only", "routing", "streams"], tmp_path)
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert ended.value.code == 1
    assert report["failed"] == {"routing": "RuntimeError: no more memory"}
    assert report["streams"] == [{"ms": 1.0}] and "streams" in report["seconds"] and "machine" in report

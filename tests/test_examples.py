"""Every script of `examples/` runs, with its default sizes."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

_FOLDER = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def said(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    script, *arguments = request.param.split()
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    runpy.run_path(str(_FOLDER / script), run_name="__main__")
    return capsys.readouterr().out


def numbers(text: str) -> list[float]:
    return [float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*\.?\d*", text)]


@pytest.mark.parametrize("said", ["existing_trainer.py"], indirect=True)
def test_existing_trainer(said: str) -> None:
    before, after = numbers(said[said.index("table weights") :])
    assert before == 2 * 20_000 * 32
    assert 0.08 * before < after <= 0.1 * before


@pytest.mark.parametrize("said", ["torchrec_fused.py"], indirect=True)
def test_torchrec_fused(said: str) -> None:
    before, after, *kinds = numbers(said[said.index("embedding bytes") :])
    assert before == 50_200 * 33 * 4
    assert after == sum(kinds)
    assert after < 0.25 * before


@pytest.mark.parametrize("said", ["existing_dlrm.py"], indirect=True)
def test_existing_dlrm(said: str) -> None:
    first, last = (numbers(said[said.index(text) :])[0] for text in ("loss after one", "loss after two more"))
    assert last < 0.1 < first < 0.69
    assert numbers(said[said.index("predictions") :])[0] == 40 * 512
    plain, held = numbers(said[said.index("embedding bytes") :])
    assert plain == 70_024 * 17 * 4
    assert held < 0.3 * plain


@pytest.mark.parametrize("said", ["out_of_core_table.py --rows 100_000 --steps 10"], indirect=True)
def test_out_of_core_table(said: str) -> None:
    full, held, *_ = numbers(said[said.index("the table in full") :])
    assert full == 26.0
    assert held < 0.1 * full


def said_by_processes(script: str) -> list[list[float]]:
    """Numbers that the two processes of a script print; the second is started by the first."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, str(_FOLDER / script)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    lines = sorted(re.findall(r"process \d: [^\n]*? bytes(?: held)?(?=\s|$|process)(?! plain)", done.stdout))
    assert len(lines) == 2, done.stdout
    return [numbers(line)[1:] for line in lines]


def test_two_processes() -> None:
    held = said_by_processes("two_processes.py")
    assert [rows for rows, _, _ in held] == [44_125, 44_125]
    assert sum(mine for _, _, mine in held) < 0.3 * sum(plain for _, plain, _ in held)


def test_thresholded() -> None:
    for sent, plain, rows, plain_rows in said_by_processes("thresholded.py"):
        assert sent < 0.2 * plain and rows < 0.2 * plain_rows


@pytest.mark.parametrize("said", ["frequency_lr.py"], indirect=True)
def test_frequency_lr(said: str) -> None:
    losses = [numbers(line)[0] for line in said.splitlines() if "validation NE" in line]
    assert len(losses) == 3 and all(0.7 < loss < 1 for loss in losses)
    state, rare, frequent = numbers(said[said.index("  1 byte") :])
    assert (state, frequent < 0.5 * rare) == (1, True)


@pytest.mark.parametrize("said", ["export_and_serve.py"], indirect=True)
def test_export_and_serve(said: str) -> None:
    plain, disk, *_ = numbers(said[said.index("plain float32 tables") :].replace("float32", ""))
    assert plain == 20_200 * 16 * 4 > 4 * disk
    change = numbers(said[said.index("largest logit change") :])[0]
    assert 0 < change < 0.2


@pytest.mark.parametrize("said", ["mixed_precision.py"], indirect=True)
def test_mixed_precision(said: str) -> None:
    assert numbers(said[said.index("bits per value") :])[0] <= 32 / 20
    plain, disk = numbers(said[said.index("float32 tables") :].replace("float32", ""))[:2]
    assert plain == 22_200 * 16 * 4 > 18 * disk
    assert numbers(said[said.index("largest difference") :]) == [0.0]


def test_every_script_is_tested_and_listed() -> None:
    scripts = {path.name for path in _FOLDER.glob("*.py")}
    assert set(re.findall(r"\b(\w+\.py)\b", Path(__file__).read_text())) & scripts == scripts
    linked = set(re.findall(r"\]\(([^)]+)\)", (_FOLDER / "README.md").read_text()))
    assert {path.name for path in _FOLDER.iterdir() if path.suffix in (".py", ".yaml")} <= linked
    assert all((_FOLDER / link).exists() for link in linked)

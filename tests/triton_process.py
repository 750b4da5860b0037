"""Modules that use Triton without a GPU, in processes of their own: Triton reads its setting when it is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

_ROOT = Path(__file__).resolve().parents[1]


def run_interpreted(module: str) -> Any:
    """What a module prints as JSON in its last line; skips the test where the interpreter does not work."""
    pytest.importorskip("triton")
    if version("triton") < "3.7" and version("numpy") >= "2.4":
        pytest.skip(
            "the interpreter of Triton 3.6 and older fails with NumPy 2.4: it makes numbers of 1-element arrays"
        )
    return _run(module, TRITON_INTERPRET="1")


def run_compiled(module: str) -> Any:
    """What a module prints as JSON in its last line, where kernels are compiled."""
    pytest.importorskip("triton")
    return _run(module, TRITON_INTERPRET="0")


def _run(module: str, **environment: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module],
        cwd=_ROOT,
        env={**os.environ, "PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])

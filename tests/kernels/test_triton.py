"""Triton kernels without a GPU: run by Triton's interpreter, and compiled for a GPU that is not there.

In processes of their own: which of the two happens is settled when Triton is imported.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

_ROOT = Path(__file__).resolve().parents[2]


def run(module: str, **environment: str) -> Any:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", f"tests.kernels.{module}"],
        cwd=_ROOT,
        env={**os.environ, "PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_kernels_equal_their_twins() -> None:
    pytest.importorskip("triton")
    if version("triton") < "3.7" and version("numpy") >= "2.4":
        pytest.skip(
            "the interpreter of Triton 3.6 and older fails with NumPy 2.4: it makes numbers of 1-element arrays"
        )
    results = run("interpreted", TRITON_INTERPRET="1")
    assert len(results) > 80
    failed = {name: error for name, error in results.items() if error}
    assert not failed, "\n".join(f"{name}\n{error[-1500:]}" for name, error in failed.items())


def test_kernels_compile_for_a_gpu() -> None:
    """Hopper; ``ptxas`` comes with Triton."""
    results = run("compiled", TRITON_INTERPRET="0")
    assert not results["errors"], "\n".join(error[-1500:] for error in results["errors"].values())
    assert not results["missing"], "no check launches these kernels"

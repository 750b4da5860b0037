"""Run the commands of the page for sceptics, and record what they print: ``python docs/record_checks.py [NAME ...]``.

Without names all of them run, one after the other. Those of real data need ``EMBCOMP_DATA``. Run it with nothing else
going on, since the page shows the times; where that cannot be, say so with ``--busy``, and the page says it too.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(_ROOT))

from benchmarks.machine import describe  # noqa: E402

_CHECKS = {
    "memory": "python examples/out_of_core_table.py --rows 20_000_000 --dim 64 --target 0.95",
    "demo": "python -m lightning_embcomp.demo",
    "export": "python examples/export_and_serve.py",
    "precision": "python examples/mixed_precision.py",
    "frequency": "python examples/frequency_lr.py",
    "two_processes": "python examples/two_processes.py",
    "thresholded": "python examples/thresholded.py",
    "plan": "embcomp plan --tables examples/plans/dlrm_v2.yaml -c examples/plans/prune_65.yaml"
    " --world-size 2 --hbm 40GB",
    "quality": "python -m benchmarks.quality run --dataset criteo_80k --method fiited --target 0.8 --seed 0 --force",
    "plain": "python -m pytest -q tests/engine/test_lookup.py tests/engine/test_trained_rows.py",
}
_PROGRAMS = {"python": [sys.executable], "embcomp": [sys.executable, "-m", "lightning_embcomp.cli"]}
_NOISE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|^.*(?:it/s|Epoch \d+/\d+).*$", flags=re.MULTILINE)


def main() -> int:
    """Run and record.

    Returns:
        Exit status: 1 if a command failed.
    """
    parser = argparse.ArgumentParser(description="Record what the commands of the page for sceptics print.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(_CHECKS)}; all by default")
    parser.add_argument("--busy", action="store_true", help="the machine does other things: times say nothing")
    args = parser.parse_args()
    failed = 0
    for name in args.names or _CHECKS:
        record = run(_CHECKS[name]) | {"busy": args.busy}
        failed |= bool(record["status"])
        text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
        (_ROOT / "docs" / "checks" / f"{name}.json").write_text(text, encoding="utf-8")
        print(f"{name}: status {record['status']}, {record['seconds']} s", flush=True)
    return failed


def run(command: str) -> dict[str, object]:
    """Run one command from the root of the repository.

    Args:
        command: As a user types it.

    Returns:
        Command, status, seconds, what it printed, and the machine.
    """
    first, *rest = shlex.split(command)
    environment = os.environ | {"COLUMNS": "110", "NO_COLOR": "1", "PYTHONPATH": str(_ROOT)}
    start = time.perf_counter()
    done = subprocess.run(
        [*_PROGRAMS[first], *rest], cwd=_ROOT, env=environment, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - start
    lines = [line.rstrip() for line in _NOISE.sub("", done.stdout).splitlines()]
    return {
        "command": f".venv/bin/{command}",
        "status": done.returncode,
        "seconds": round(seconds, 1),
        "output": re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n"),
        "machine": describe(),
    }


if __name__ == "__main__":
    raise SystemExit(main())

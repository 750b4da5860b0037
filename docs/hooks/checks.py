"""Recorded runs of the commands on the page for sceptics; ``docs/record_checks.py`` records them."""

from __future__ import annotations

import json
from typing import Any

from docs.hooks import ROOT

RECORDS = ROOT / "docs" / "checks"


def render(name: str) -> str:
    """One command, the time that it took, and what it printed.

    Args:
        name: Of the record.

    Returns:
        Markdown.

    Raises:
        ValueError: If the record is that of a run that failed.
    """
    record: dict[str, Any] = json.loads((RECORDS / f"{name}.json").read_text(encoding="utf-8"))
    if record["status"]:
        raise ValueError(f"the run of {record['command']!r} failed with status {record['status']}")
    machine = record["machine"]
    takes = "The machine was busy, so that times say nothing: not more than" if record.get("busy") else "Takes"
    return "\n\n".join(
        [
            f"```bash\n{record['command']}\n```",
            f"{takes} {duration(record['seconds'])} ({machine['processor']}, {machine['cores']} cores;"
            f" commit `{machine['commit']}`). Prints:",
            f"```text\n{record['output'].strip()}\n```",
        ]
    )


def duration(seconds: float) -> str:
    """How long something takes, no more exact than it will be elsewhere.

    Args:
        seconds: Measured.

    Returns:
        Words.

    Example:
        >>> duration(7.2), duration(41.0), duration(200.0)
        ('about 10 seconds', 'about 50 seconds', 'about 4 minutes')
    """
    if seconds < 90:
        return f"about {10 * (int(seconds) // 10 + 1)} seconds"
    return f"about {int(seconds) // 60 + 1} minutes"


def where(machine: dict[str, Any]) -> str:
    """What a measurement ran on.

    Args:
        machine: As in the results of the benchmarks.

    Returns:
        Words.
    """
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    at = f", commit `{machine['commit']}`" if machine.get("commit") else ""
    return f"{machine['processor']}, {machine['cores']} cores; Python {machine['python']}, {versions}{at}"

"""The help of every ``embcomp`` command, as the terminal shows it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from docs.hooks import ROOT

# One process for all: what takes time is to import torch.
_SCRIPT = """
import contextlib, io, json, sys
from lightning_embcomp import cli

said = {}
for command in (None, *cli.TRAINER_COMMANDS, *cli.COMMANDS):
    if command not in (None, "fit", *cli.COMMANDS):
        continue
    sys.argv = ["embcomp", *([command] if command else []), "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        cli.main()
    said[command or ""] = out.getvalue()
print(json.dumps(said))
"""


def render() -> str:
    """One section per command.

    Returns:
        Markdown.
    """
    said = help_texts()
    parts = [f"```text\n{said.pop('').strip()}\n```"]
    for command, text in said.items():
        block = f"```text\n{text.strip()}\n```"
        if command == "fit":
            # Some hundred lines.
            collapsed = "\n".join("    " + line if line else "" for line in block.splitlines())
            block = f'??? note "embcomp fit --help"\n\n{collapsed}'
        parts.append(f"## embcomp {command}\n\n{block}")
    return "\n\n".join(parts)


def help_texts() -> dict[str, str]:
    """Run ``--help`` of the program and its commands; of LightningCLI's, that of ``fit`` alone.

    Returns:
        Text by command, that of the program under an empty name.

    Raises:
        ValueError: If a command has no help.
    """
    environment = os.environ | {"COLUMNS": "100", "NO_COLOR": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", _SCRIPT], capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
    if run.returncode:
        raise ValueError(f"the help of embcomp cannot be read:\n{run.stderr}")
    said: dict[str, str] = json.loads(run.stdout.splitlines()[-1])
    empty = [command for command, text in said.items() if "usage:" not in text]
    if empty:
        raise ValueError(f"no help of embcomp {', '.join(empty)}")
    return said

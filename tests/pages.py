"""Blocks of code in Markdown pages, for tests that run what the project tells its users."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ".venv/bin/"
ELSEWHERE = {"source .venv/bin/activate", "python3 -m venv .venv"}
"""Lines of bash that concern no file or command of the project."""
_KNOWN = {"make", "embcomp", "pip", "python"}


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text(page), flags=re.MULTILINE | re.DOTALL)


def bash_lines(*pages: str) -> list[str]:
    lines = [line for page in pages for block in blocks(page, "bash") for line in block.splitlines()]
    return [line.partition(" #")[0].strip() for line in lines if line.strip()]


def split(line: str) -> list[str]:
    """Words of a command, without the folder of the environment."""
    first, *others = shlex.split(line)
    return [first.removeprefix(PROGRAMS), *others]


def run_blocks(page: str) -> dict[str, Any]:
    """Run the Python blocks of a page in order, in the current folder; what they define."""
    torch.manual_seed(0)
    said: dict[str, Any] = {"__name__": "page"}
    for number, block in enumerate(blocks(page, "python"), start=1):
        exec(compile(block, f"{page}, python block {number}", "exec"), said)
    return said


def script(words: list[str]) -> str:
    """The file that a command of Python runs; of `python -m benchmarks NAME` that of the benchmark."""
    if words[1] != "-m":
        return words[1]
    module = ".".join(words[2:4]) if words[2] == "benchmarks" and len(words) > 3 else words[2]
    path = module.replace(".", "/")
    return f"{path}/__main__.py" if (ROOT / path).is_dir() else f"{path}.py"


def check_files_of(line: str) -> None:
    """Fail if a line of bash names a command or file that does not exist."""
    if line in ELSEWHERE:
        return
    words = split(line)
    assert words[0] in _KNOWN, f"unknown command in {line!r}"
    files = [words[i + 1] for i, word in enumerate(words) if word in ("-r", "-c")]
    for file in [*files, *([script(words)] if words[0] == "python" else [])]:
        assert (ROOT / file).is_file(), f"{file} in {line!r} does not exist"
